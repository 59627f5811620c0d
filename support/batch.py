"""Prompts of several lengths in one batch, who is still running, and counting: what the loops need
and a first reading can skip. Prompts are left-padded to one length. A prompt that has reached its
end leaves the batch."""
from dataclasses import dataclass

import torch

from support.decoding import unmask_schedule
from support.settings import check_generators, check_order

@dataclass
class Book:
    out: torch.Tensor  # (all prompts, T) like Batch.x, finished ones included
    live: list         # which prompts Batch.x holds
    pads: list         # left padding of every prompt
    run: list          # positions run so far, per prompt
    full: list         # positions that running everything would have taken
    on_step: object

def start(model, prompts, how, order, generator, on_step):
    """-> the fields of a Batch. how: what settings.check returns."""
    config, device = model.config, model.wte.weight.device
    B, G, L, steps = len(prompts), how["gen_length"], how["block_length"], how["steps"]
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
    elif how["remasking"] == "left_to_right":
        columns = [list(range(P, P + G))] * B
    noise = None
    if how["temperature"]:
        noise = torch.stack([torch.rand(steps, L, generator=g) for g in rngs]).to(device)

    masks = [config.mask_id] * G
    x = torch.tensor([p[:1] * pad + p + masks for p, pad in zip(prompts, pads)], device=device)
    out = x.clone() if how["stop_at_eos"] else x  # else the same tensor: no row leaves
    same = ("temperature", "cfg_scale", "suppress_eos", "stop_at_eos")
    return dict(x=x, P=P, T=P + G, L=L, config=config, noise=noise,
                schedule=unmask_schedule(L, steps * L // G),
                order=None if columns is None else torch.as_tensor(columns, device=device),
                pad=torch.tensor(pads, device=device) if any(pads) else None,
                book=Book(out, list(range(B)), pads, [0] * B, [0] * B, on_step),
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
    for j in s.book.live:
        length = s.T - s.book.pads[j]
        s.book.full[j] += length
        s.book.run[j] += length if pos is None else pos.shape[1]
    if s.book.on_step:
        device = s.x.device
        live = torch.tensor(s.book.live, device=device)
        tokens = s.book.out.index_copy(0, live, s.x)                           # (all prompts, T)
        run, revealed = torch.zeros(2, *tokens.shape, dtype=torch.bool, device=device)
        run[live] = True if pos is None else run[live].scatter(1, pos, True)
        revealed[live] = revealed[live].scatter(1, new, True)
        # columns of the padded batch -> columns of each prompt, -1 and False after its end
        pads = torch.tensor(s.book.pads, device=device)[:, None]
        column = torch.arange(s.T, device=device) + pads
        end, column = column >= s.T, column.clamp(max=s.T - 1)
        tokens, run, revealed = (t.gather(1, column) for t in (tokens, run, revealed))
        s.book.on_step(s.step - 1, tokens.masked_fill(end, -1), run & ~end, revealed & ~end)

def end_block(s, lo):
    """With stop_at_eos, prompts whose block contains EOS get EOS in the rest and leave the batch:
    the one place where a loop waits for the device. -> whether anything is left to do"""
    if s.stop_at_eos:
        hi = lo + s.L
        done = (s.x[:, lo:hi] == s.config.eos_id).any(1)                       # (B,)
        s.x[:, hi:] = s.x[:, hi:].masked_fill(done[:, None], s.config.eos_id)
        keep = (~done).nonzero().flatten()
        if len(keep) < len(s.book.live) or hi == s.T:
            s.book.out[s.book.live] = s.x
            s.x, s.book.live = s.x[keep], [s.book.live[r] for r in keep.tolist()]
            s.pad, s.order, s.noise = (t if t is None else t[keep]
                                       for t in (s.pad, s.order, s.noise))
    return len(s.book.live) > 0

def read_out(s):
    """-> the ids of every prompt, without padding."""
    return [row[pad:] for row, pad in zip(s.book.out.tolist(), s.book.pads)]
