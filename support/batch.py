"""Prompts of several lengths in one batch, who is still running, and counting: what the loops need
and a first reading can skip. Prompts are left-padded to one length. A prompt that has reached its
end leaves the batch."""
from dataclasses import dataclass

import torch

from support.decoding import block_schedules
from support.settings import check_generators, check_order

@dataclass
class Book:
    out: torch.Tensor    # (all prompts, T + 1) like Batch.x, finished ones included
    live: torch.Tensor   # (B,) which prompts Batch.x holds
    pads: torch.Tensor   # left padding of every prompt
    run: torch.Tensor    # positions run so far, per prompt
    steps: torch.Tensor  # steps in which it had something to run
    on_step: object
    guider_forwards: int = 0
    guider_run: torch.Tensor | None = None  # positions that the guider has read, per prompt

    def read(self, where, T):
        """Counts what a guider reads: columns where (B, n), T for none."""
        real = (where >= self.pads[self.live, None]) & (where < T)
        self.guider_forwards += 1
        self.guider_run.index_add_(0, self.live, real.sum(1))

def start(model, prompts, how, order, generator, on_step):
    """-> the fields of a Batch. how: what settings.check returns."""
    config, device = model.config, model.wte.weight.device
    B, G = len(prompts), how["gen_length"]
    # two caches take none: to the autoregressive one a token is a block, to guided all of them
    L = how["block_length"] or (1 if how["cache"] == "autoregressive" else G)
    steps = how["steps"] or G  # none is given with a threshold: G are the most
    P = max(map(len, prompts))
    pads = [P - len(p) for p in prompts]
    given = check_generators(generator, B)
    shuffled = how["remasking"] == "random" and order is None
    rngs = [own_generator(g) for g in given] if how["temperature"] or shuffled else []

    columns = None  # by confidence
    if order is not None:
        order = check_order(order, prompts, G, L)
        columns = [[q + pad for q in row] for row, pad in zip(order, pads)]
    elif shuffled:
        blocks = range(P, P + G, L)
        columns = torch.stack([torch.cat([torch.randperm(L, generator=g) + lo for lo in blocks])
                               for g in rngs])
    elif how["remasking"] == "left_to_right" or how["cache"] == "autoregressive":
        columns = [list(range(P, P + G))] * B
    noise = None
    if how["temperature"]:
        noise = torch.stack([torch.rand(steps, L, generator=g) for g in rngs]).to(device)

    masks = [config.mask_id] * G  # the first token stands in the padding and in the spare column
    x = torch.tensor([p[:1] * pad + p + masks + p[:1] for p, pad in zip(prompts, pads)],
                     device=device)
    out = x.clone() if how["stop_at_eos"] else x  # else the same tensor: no row leaves
    pad, live = torch.tensor(pads, device=device), torch.arange(B, device=device)
    same = ("threshold", "temperature", "top_p", "top_k", "remasking", "cfg_scale", "suppress_eos",
            "stop_at_eos")
    return dict(x=x, P=P, T=P + G, L=L, config=config, noise=noise,
                schedule=None if how["threshold"] or how["cache"] == "guided" else
                block_schedules(G, L, steps, how["schedule"]),
                un=config.shift and how["cache"] in ("decode", "pd", "autoregressive"),
                order=None if columns is None else torch.as_tensor(columns, device=device),
                pad=pad if any(pads) else None,
                book=Book(out, live, pad, *x.new_zeros(2, B), on_step, 0, x.new_zeros(B)),
                **{name: how[name] for name in same})

def own_generator(g):
    """A CPU generator for one prompt, seeded by one draw from the given one: what a prompt draws
    depends neither on the other prompts nor on the cache."""
    device = g.device if g else "cpu"
    seed = torch.randint(2**32, (), generator=g, device=device)
    return torch.Generator().manual_seed(int(seed))

def record(s, pos, new):
    """Counts the positions run, and shows the step to on_step. pos (B, n) or None, new (B, k)."""
    s.step += 1
    book, live, pos = s.book, s.book.live, s.ran  # with a shift more than the loop's pos
    if pos is None:
        pos = torch.arange(s.T, device=s.x.device).expand(len(s.x), -1)        # (B, T)
    if s.schedule is None:  # a row that reveals nothing waits for the others
        pos = pos.masked_fill((new == s.T).all(1, keepdim=True), s.T)
    ran = ((pos >= book.pads[live, None]) & (pos < s.T)).sum(1)                # (B,)
    book.run.index_add_(0, live, ran)
    book.steps.index_add_(0, live, ran.sign())
    if book.on_step:
        tokens = book.out.index_copy(0, live, s.x)                             # (all, T + 1)
        run, revealed = torch.zeros(2, *tokens.shape, dtype=torch.bool, device=s.x.device)
        run[live] = run[live].scatter(1, pos, True)
        revealed[live] = revealed[live].scatter(1, new, True)
        # columns of the padded batch -> columns of each prompt, -1 and False after its end
        column = torch.arange(s.T, device=s.x.device) + book.pads[:, None]
        end, column = column >= s.T, column.clamp(max=s.T - 1)
        tokens, run, revealed = (t.gather(1, column) for t in (tokens, run, revealed))
        book.on_step(s.step - 1, tokens.masked_fill(end, -1), run & ~end, revealed & ~end)

def end_block(s, lo):
    """With stop_at_eos, prompts whose block contains EOS get EOS in the rest and leave the batch,
    which waits for the device. -> a list of the rows that stay. A cache that outlives the block has
    to drop the others."""
    stay = list(range(len(s.x)))
    if s.stop_at_eos:
        hi = lo + s.L
        done = (s.x[:, lo:hi] == s.config.eos_id).any(1)                       # (B,)
        s.x[:, hi:] = s.x[:, hi:].masked_fill(done[:, None], s.config.eos_id)
        stay = (~done).nonzero().flatten().tolist()
        if len(stay) < len(s.x) or hi == s.T:
            s.book.out[s.book.live] = s.x
            s.x, s.book.live, s.pad, s.order, s.noise = (
                t if t is None else t[stay] for t in (s.x, s.book.live, s.pad, s.order, s.noise))
    return stay

def read_out(s):
    """-> the fields of a Result that lie on the device, without padding."""
    book = s.book
    out, pads, run, steps = (t.tolist() for t in (book.out, book.pads, book.run, book.steps))
    full = [n * (s.T - pad) for n, pad in zip(steps, pads)]
    return dict(tokens=[row[pad:s.T] for row, pad in zip(out, pads)], steps=steps,
                positions_run=run, positions_full=full, guider_forwards=book.guider_forwards,
                guider_positions=book.guider_run.tolist())
