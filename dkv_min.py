"""Delayed KV caching for masked diffusion language models (dKV-Cache, arXiv 2505.15781), as three loops to read.

A masked diffusion model writes by starting from masks and revealing a few tokens per step. Attention is bidirectional, so
every revealed token changes the keys and values of all others, and the usual KV cache does not apply. But a token's K/V
settle soon after it is revealed. So keep the K/V of all positions in buffers, and at each step run only some positions,
the active ones: they write their own K/V and attend to everybody's. A cache is a choice of which positions to run.

    generate_none      all, at every step
    generate_decode    masks, and what was revealed one step ago; everything every `refresh` steps      (dKV-Cache-Decode)
    generate_greedy    what is revealed now, what was revealed one step ago, a window of masks near by  (dKV-Cache-Greedy)

"One step ago" is the delay in the name: a token is run once more after it was revealed, with its real id as input where
there was a mask, and only those K/V are kept. The loops differ in their cache and in the block between the rulers.
The exact rules are those of the authors' code for LLaDA; tests/test_golden.py holds these loops to its traces.

Letters: B prompts, P prompt positions (longest), G = gen_length, T = P + G, L = block_length, V = n_vocab. A block is
decoded before the next begins; k tokens are revealed in a step; m positions can be revealed in it; n positions run.
In the loops: s the Batch, prompts and settings; lo the first column of the block; i the step in it, c the tokens revealed
before that step; cand the candidates, the columns of which k are revealed; pos the columns run, None for all; rows where the
candidates stand among them; just what the step has revealed.
"""
import operator
import time
from dataclasses import dataclass

import torch

from model import gather_rows, packed

CACHES = ("none", "decode", "greedy")
REMASKING = ("low_confidence", "random", "left_to_right")
REFRESH = {"none": 1, "decode": 8, "greedy": 2}  # those of the authors' reports


class KVCache:
    """Keys (after RoPE) and values of every layer, each a tensor (n_layer, B, T, n_kv_head, head_dim) indexed by position.
    Attention does not care about the order of its keys, so nothing is ever moved: K/V are overwritten where they stand."""
    def __init__(self, model, B, T):
        config, w = model.config, model.wte.weight
        self.k, self.v = torch.empty(2, config.n_layer, B, T, config.n_kv_head, config.head_dim, dtype=w.dtype, device=w.device)
        self.T = T
        self.row = torch.arange(B, device=w.device)[:, None]

    def update(self, layer, pos, k, v):
        """Writes k, v (B, n, n_kv_head, head_dim) at pos (B, n), None: at 0..n-1; -> all K, V of the layer."""
        K, V = self.k[layer], self.v[layer]
        if pos is None:
            K[:, :k.shape[1]], V[:, :k.shape[1]] = k, v
        else:
            K[self.row, pos], V[self.row, pos] = k, v
        return K, V


@dataclass
class Result:
    tokens: list         # per prompt: prompt and generated ids
    forwards: int        # calls of the model; one on the doubled rows of guidance is one
    positions_run: list  # per prompt: positions that went through the network, summed over the steps
    positions_full: list # the same if every one of those steps had run them all
    seconds: float


@dataclass
class Batch:
    """What the loops work on: the prompts that are still being answered, left-padded to one length, and the settings."""
    x: torch.Tensor             # (B, T) int64: prompts, what is revealed so far, masks
    out: torch.Tensor           # the same for all prompts, those that have left the batch included
    live: list                  # which prompts x holds
    pads: list                  # left padding of every prompt
    pad: torch.Tensor | None    # (B,) the same for the rows of x, None if there is none
    order: torch.Tensor | None  # (B, G) columns in the order in which to reveal them, None: by confidence
    noise: torch.Tensor | None  # (B, steps, L) uniform numbers, None at temperature 0
    schedule: list              # unmask_schedule() of a block
    config: object              # the model's
    P: int
    T: int
    block_length: int
    refresh: int
    window: int
    delay: bool
    temperature: float
    cfg_scale: float
    stop_at_eos: bool
    suppress_eos: str | None
    on_step: object
    run: list                   # positions run so far, per prompt
    full: list                  # what no cache would have run
    forwards: int = 0

# ---------------------------------------------------------------------------------------------------------------------
# the three loops

def generate_none(model, s):
    """No cache: every step runs the whole sequence. Agrees with llada_generate.py of the authors (LLaDA's generate.py)."""
    for lo in range(s.P, s.T, s.block_length):
        for i, (c, k) in enumerate(s.schedule):
            cand = candidates(s, lo, c, k)                                     # (B, m) where a token may be revealed now
            # ----------------------------------------------------------------- which positions run: all
            pos, rows = None, cand
            # -----------------------------------------------------------------
            logits = forward(model, s, pos, rows, cache=None)                  # (B, m, V)
            just = reveal(s, lo, cand, k, logits)                              # (B, k) what was revealed in this step
            report(s, pos, just)
        if not finish_block(s, lo):
            break


def generate_decode(model, s):
    """dKV-Cache-Decode. Agrees with llada_dkv_cache_decode.py of the authors. Stale are the K/V of the prompt and of tokens
    revealed earlier than one step ago, until the next step that runs all."""
    for lo in range(s.P, s.T, s.block_length):
        cache, just = new_cache(model, s), None                                # as in the reference, each block starts anew
        for i, (c, k) in enumerate(s.schedule):
            cand = candidates(s, lo, c, k)                                     # (B, m) where a token may be revealed now
            # ----------------------------------------------------------------- which positions run
            if i < 2 or i % s.refresh == 0:  # all. At step 1 too: the authors store nothing at step 0
                pos, rows = None, cand
            else:                            # masks, and what was revealed one step ago; older tokens keep their K/V
                masks = first_masks(s, lo, s.T - lo - c)                       # (B, all masks), ascending
                pos = torch.cat([masks, just], 1) if s.delay else masks
                rows = torch.searchsorted(masks, cand.contiguous())            # the masks stand first in pos
            # -----------------------------------------------------------------
            logits = forward(model, s, pos, rows, cache)                       # (B, m, V)
            just = reveal(s, lo, cand, k, logits)                              # (B, k) what was revealed in this step
            report(s, pos, just)
        if not finish_block(s, lo):
            break


def generate_greedy(model, s):
    """dKV-Cache-Greedy. Agrees with llada_dkv_cache_greedy.py of the authors. Stale are the K/V of all but a handful, masks
    included. What a step reveals has to be known before it runs, so this one needs an order known ahead."""
    for lo in range(s.P, s.T, s.block_length):
        cache, just = new_cache(model, s), None                                # as in the reference, each block starts anew
        for i, (c, k) in enumerate(s.schedule):
            cand = candidates(s, lo, c, k)                                     # (B, k) what will be revealed now
            # ----------------------------------------------------------------- which positions run
            if i % s.refresh == 0:           # all; step 1 is no exception here
                pos, rows = None, cand
            else:                            # revealed now, revealed one step ago, a window; the rest keep K/V, even masks
                near = nearest_masks(s, cand, s.T - lo - c - k)                # (B, k * s.window or fewer)
                pos = torch.cat([cand, just, near] if s.delay else [cand, near], 1)
                rows = torch.arange(k, device=pos.device).expand_as(cand)
            # -----------------------------------------------------------------
            logits = forward(model, s, pos, rows, cache)                       # (B, k, V)
            just = reveal(s, lo, cand, k, logits)                              # (B, k) what was revealed in this step
            report(s, pos, just)
        if not finish_block(s, lo):
            break

# ---------------------------------------------------------------------------------------------------------------------
# what the loops share, in the order in which a step uses it

def unmask_schedule(block_length, steps):
    """How many tokens each of a block's steps reveals: block_length // steps, one more in the first block_length % steps
    (get_num_transfer_tokens of LLaDA's generate.py). -> [(revealed before the step, revealed in it)]"""
    ks = [block_length // steps + (i < block_length % steps) for i in range(steps)]
    return [(sum(ks[:i]), k) for i, k in enumerate(ks)]


def new_cache(model, s):
    return KVCache(model, len(s.x) * (2 if s.cfg_scale else 1), s.T)  # guidance doubles the rows


def first_masks(s, lo, n):
    """The first n masked columns from column lo on, ascending, (B, n). All rows have equally many masks at any time, and
    the loop knows how many: nothing has to be counted on the device."""
    masked = s.x[:, lo:] == s.config.mask_id
    return masked.byte().argsort(dim=1, descending=True, stable=True)[:, :n] + lo


def candidates(s, lo, c, k):
    """Where a token may be revealed in this step, (B, m), and so where logits are needed: the next k of the order where
    that is known ahead; else all masks of the block, of which the most confident will be taken."""
    if s.order is not None:
        return s.order[:, lo - s.P + c:lo - s.P + c + k]
    return first_masks(s, lo, s.block_length - c)


def nearest_masks(s, cand, n_free):
    """dKV-Greedy's window: for each target in turn the `window` nearest masks that are not taken yet, walking outwards,
    left side first, across decoded tokens and across the end of the block. n_free: masks left beside the targets."""
    free = (s.x == s.config.mask_id).scatter(1, cand, False)                   # (B, T)
    column = torch.arange(s.T, device=s.x.device)
    near = []
    for target in cand.split(1, dim=1):                                        # (B, 1)
        n = min(s.window, n_free)
        n_free -= n
        away = column - target
        walk = (2 * away.abs() - (away < 0).long()).masked_fill(~free, 2 * s.T)  # t-1, t+1, t-2, ... = 1, 2, 3, ...
        near.append(walk.topk(n, dim=1, largest=False).indices)
        free = free.scatter(1, near[-1], False)
    return torch.cat(near, 1)


def forward(model, s, pos, rows, cache):
    """Runs the columns pos (B, n) (None: all) and returns float32 logits of `rows` of them: (B, m, V), the mask excluded.
    With guidance the batch is doubled, as in LLaDA's generate.py: the second half has masks for its prompt."""
    x = s.x if pos is None else s.x.gather(1, pos)
    pad = s.pad
    if s.cfg_scale:
        column = torch.arange(s.T, device=x.device)[None] if pos is None else pos
        x = torch.cat([x, x.masked_fill(column < s.P, s.config.mask_id)])
        pos, rows, pad = (t if t is None else torch.cat([t, t]) for t in (pos, rows, pad))
    logits = model(x, pos, cache, rows, pad)[..., :s.config.n_vocab]           # ids without a token are never emitted
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if s.cfg_scale:
        logits, free = logits.chunk(2)
        logits = free + (s.cfg_scale + 1) * (logits - free)
    if s.config.mask_id < s.config.n_vocab:
        logits[..., s.config.mask_id] = -torch.inf                             # nor is the mask
    return logits


def reveal(s, lo, cand, k, logits):
    """Proposes a token for each wanted position and writes k of them into s.x: all if the order is known ahead, else the
    most confident. -> their columns (B, k)."""
    if s.suppress_eos == "logits":
        logits[..., s.config.eos_id] = -torch.inf
    drawn = draw(s, cand - lo, logits) if s.temperature else None              # (B, m)
    if s.order is None:
        best = confidence(s, logits, drawn).argsort(dim=1, descending=True, stable=True)[:, :k]  # ties: the leftmost
        cand, logits, drawn = cand.gather(1, best), gather_rows(logits, best), drawn if drawn is None else drawn.gather(1, best)
    s.x.scatter_(1, cand, logits.argmax(-1) if drawn is None else drawn)
    return cand


def draw(s, column, logits):
    """Samples a token for every row of logits (B, m, V) at the columns (B, m) of the block -> (B, m): the inverse of the
    distribution function, at a number that belongs to the prompt, the step and the position."""
    u = s.noise[:, s.forwards].gather(1, column)                               # (B, m)
    odds = ((logits.double() - logits.amax(-1, keepdim=True)) / s.temperature).softmax(-1).cumsum(-1)  # (B, m, V)
    drawn = torch.searchsorted(odds, (u * odds[..., -1])[..., None], right=True).squeeze(-1)
    return drawn.where(drawn < odds.shape[-1], logits.argmax(-1))              # behind all odds: they are NaN


def confidence(s, logits, drawn):
    """Log probability, at temperature 1, of the drawn tokens, None: of the most probable ones, (B, m): LLaDA's
    low-confidence remasking."""
    if s.suppress_eos == "confidence":  # a position that proposes the end is revealed when nothing better is left
        drawn = logits.argmax(-1) if drawn is None else drawn
        logits = logits.clone()
        for end in (s.config.eos_id, s.config.eot_id):
            if end is not None:
                logits[..., end] = -torch.inf
    p = logits.log_softmax(-1)
    return p.amax(-1) if drawn is None else p.gather(-1, drawn[..., None]).squeeze(-1)


def report(s, pos, just):
    """Counts the positions run, and shows the step to whoever watches."""
    s.forwards += 1
    for j in s.live:
        s.full[j] += s.T - s.pads[j]
        s.run[j] += s.T - s.pads[j] if pos is None else pos.shape[1]
    if s.on_step:
        live, column = torch.tensor(s.live, device=s.x.device), torch.arange(s.T, device=s.x.device)
        tokens = s.out.index_copy(0, live, s.x)
        run, decoded = torch.zeros(2, *tokens.shape, dtype=torch.bool, device=s.x.device)
        run[live] = True if pos is None else run[live].scatter(1, pos, True)
        decoded[live] = decoded[live].scatter(1, just, True)
        # from columns of the padded batch to columns of each prompt; behind the end of a shorter one: -1 and False
        column = column + torch.tensor(s.pads, device=s.x.device)[:, None]
        end, column = column >= s.T, column.clamp(max=s.T - 1)
        s.on_step(s.forwards - 1, tokens.gather(1, column).masked_fill(end, -1), run.gather(1, column) & ~end, decoded.gather(1, column) & ~end)


def finish_block(s, lo):
    """With stop_at_eos, prompts whose block holds EOS get EOS in all that follows and leave the batch (the one place
    where a loop waits for the device). -> whether anything is left to do"""
    if s.stop_at_eos:
        hi = lo + s.block_length
        done = (s.x[:, lo:hi] == s.config.eos_id).any(1)
        s.x[:, hi:] = s.x[:, hi:].masked_fill(done[:, None], s.config.eos_id)
        keep = (~done).nonzero().flatten()
        if len(keep) < len(s.live) or hi == s.T:
            s.out[s.live] = s.x
            s.x, s.live = s.x[keep], [s.live[r] for r in keep.tolist()]
            s.pad, s.order, s.noise = (t if t is None else t[keep] for t in (s.pad, s.order, s.noise))
    return len(s.live) > 0

# ---------------------------------------------------------------------------------------------------------------------
# the entry

@torch.inference_mode()
def generate(model, prompts, *, cache="none", gen_length=128, steps=None, block_length=None, refresh=None, window=4,
             temperature=0.0, remasking=None, cfg_scale=0.0, stop_at_eos=False, suppress_eos=None, order=None, delay=True,
             generator=None, on_step=None):
    """Answers prompts by masked diffusion, with or without a delayed KV cache. -> Result

    prompts      list of lists of ids, of any lengths from 1 on. Each is answered as if it were alone.
    cache        "none", "decode" or "greedy"
    gen_length   tokens to generate; steps (None: gen_length) over all blocks; block_length (None: gen_length) of a block
    refresh      every how many steps of a block everything is run. None: 8 for decode and 2 for greedy, as the authors report;
                 a block's steps or more: never
    window       masks that greedy runs around each token that it reveals
    temperature  0: the most probable token
    remasking    what is revealed first: "low_confidence" (none, decode by default), "random" (greedy by default), or
                 "left_to_right"; greedy needs one of the last two, or an order
    cfg_scale    classifier-free guidance, 0: none
    stop_at_eos  do not begin further blocks behind one that holds EOS
    suppress_eos "logits": EOS is never emitted; "confidence": positions that propose EOS or EOT are revealed last;
                 this one has no effect in an order known ahead
    order        per prompt, the positions P..P+gen_length-1 (P: its own length) in the order in which to reveal them, block
                 after block; implies random remasking
    delay        False: K/V are kept from the step that revealed the token (to show why not to)
    generator    a torch.Generator, or one per prompt; None: torch's global one
    on_step      called after each step with (step, tokens, run, decoded): its number from 0 on; (B, T) int64 ids; (B, T)
                 bool, positions run and positions revealed in it. Columns count from each prompt's own start, -1 and
                 False stand behind the end of a shorter one.

    Raises ValueError, one sentence, for what a user got wrong.
    """
    began = time.perf_counter()
    config = model.config
    steps = gen_length if steps is None else steps
    block_length = gen_length if block_length is None else block_length
    refresh = REFRESH.get(cache) if refresh is None else refresh
    if remasking is None:
        remasking = "random" if cache == "greedy" or order is not None else "low_confidence"
    settings = dict(block_length=block_length, refresh=refresh, window=window, delay=delay, temperature=temperature, cfg_scale=cfg_scale,
                    stop_at_eos=stop_at_eos, suppress_eos=suppress_eos)
    check(config, cache=cache, gen_length=gen_length, steps=steps, remasking=remasking, order=order, **settings)
    prompts = check_prompts(config, prompts, gen_length)
    B, P, L = len(prompts), max(map(len, prompts)), block_length
    pads, device = [P - len(p) for p in prompts], model.wte.weight.device
    given = check_generators(generator, B)
    rngs = [own_generator(g) for g in given] if temperature or (remasking == "random" and order is None) else []
    columns = None
    if order is not None:
        columns = [[q + pad for q in row] for row, pad in zip(check_order(order, prompts, gen_length, L), pads)]
    elif remasking == "random":
        columns = torch.stack([torch.cat([torch.randperm(L, generator=g) + lo for lo in range(P, P + gen_length, L)]) for g in rngs])
    elif remasking == "left_to_right":
        columns = [list(range(P, P + gen_length))] * B
    x = torch.tensor([p[:1] * pad + p + [config.mask_id] * gen_length for p, pad in zip(prompts, pads)], device=device)
    s = Batch(x=x, out=x.clone() if stop_at_eos else x, live=list(range(B)), pads=pads, pad=torch.tensor(pads, device=device) if any(pads) else None,
              order=None if columns is None else torch.as_tensor(columns, device=device),
              noise=torch.stack([torch.rand(steps, L, generator=g) for g in rngs]).to(device) if temperature else None,
              schedule=unmask_schedule(L, steps * L // gen_length), config=config, P=P, T=P + gen_length, run=[0] * B, full=[0] * B, on_step=on_step, **settings)
    with packed(model):
        {"none": generate_none, "decode": generate_decode, "greedy": generate_greedy}[cache](model, s)
    tokens = [row[pad:] for row, pad in zip(s.out.tolist(), pads)]  # waits for the device
    return Result(tokens, s.forwards, s.run, s.full, time.perf_counter() - began)


def check(config, *, cache, gen_length, steps, block_length, refresh, window, delay, temperature, cfg_scale, stop_at_eos, suppress_eos, remasking, order=None):
    """Raises ValueError at the first of generate's settings that cannot work."""
    def need(good, sentence):
        if not good:
            raise ValueError(sentence)
    for name, value, known in (("cache", cache, CACHES), ("remasking", remasking, REMASKING), ("suppress_eos", suppress_eos, (None, "logits", "confidence"))):
        need(value in known, f"{name} is {value!r}, and has to be one of {', '.join(map(str, known))}")
    for name, value, low in (("gen_length", gen_length, 1), ("steps", steps, 1), ("block_length", block_length, 1), ("refresh", refresh, 1), ("window", window, 0)):
        need(type(value) is int and value >= low, f"{name} is {value!r}, and has to be a whole number of at least {low}")
    for name, value in (("temperature", temperature), ("cfg_scale", cfg_scale)):
        need(isinstance(value, (int, float)) and 0 <= value <= 1e6, f"{name} is {value!r}, and has to be a number from 0 to 1e6")
    need(gen_length % block_length == 0, f"gen_length {gen_length} is no multiple of block_length {block_length}")
    blocks = gen_length // block_length
    need(blocks <= steps <= gen_length, f"steps is {steps}, and has to lie between {blocks}, the number of blocks, and {gen_length}, the tokens to generate")
    need(steps % blocks == 0, f"steps {steps} is no multiple of the number of blocks, {gen_length} / {block_length} = {blocks}")
    need(cache != "greedy" or remasking != "low_confidence", "the greedy cache has to know ahead what is revealed next: use remasking random or left_to_right, or give an order")
    need(order is None or remasking == "random", f"an order is given, so remasking {remasking!r} cannot decide: leave it out")
    need(config.eos_id is not None or not (stop_at_eos or suppress_eos), "this model has no eos_id, so stop_at_eos and suppress_eos cannot work")


def int_lists(name, lists):
    try:
        return [[operator.index(i) for i in row] for row in lists]
    except (TypeError, ValueError):
        raise ValueError(f"{name} has to be a list of lists of whole numbers, one list per prompt") from None


def check_prompts(config, prompts, gen_length):
    """-> prompts as lists of ints, or ValueError."""
    prompts = int_lists("prompts", prompts)
    if not prompts or not all(prompts):
        raise ValueError("there is no prompt: give at least one, of at least one token" if not prompts else f"prompt {prompts.index([])} is empty: it needs at least one token")
    for j, p in enumerate(prompts):
        if config.mask_id in p:
            raise ValueError(f"prompt {j} holds the mask id {config.mask_id}: masks are what is generated")
        if not 0 <= min(p) <= max(p) < config.vocab_size:
            raise ValueError(f"prompt {j} holds an id outside 0..{config.vocab_size - 1}: {min(p) if min(p) < 0 else max(p)}")
        if len(p) + gen_length > config.max_len:
            raise ValueError(f"prompt {j} has {len(p)} tokens, which with gen_length {gen_length} is more than the model's {config.max_len}")
    return prompts


def check_order(order, prompts, gen_length, block_length):
    """-> order as lists of ints, or ValueError."""
    order = int_lists("order", order)
    if len(order) != len(prompts):
        raise ValueError(f"order has {len(order)} lists, and has to have one for each of the {len(prompts)} prompts")
    for j, (row, p) in enumerate(zip(order, prompts)):
        for lo in range(0, gen_length, block_length):
            block = range(len(p) + lo, len(p) + lo + block_length)
            if len(row) != gen_length or sorted(row[lo:lo + block_length]) != list(block):
                raise ValueError(f"order {j} has to hold each of the positions {len(p)}..{len(p) + gen_length - 1} once, block after block: its entries {lo}..{lo + block_length - 1} are not the positions {block[0]}..{block[-1]}")
    return order


def check_generators(generator, B):
    """-> the generator (or None) of each prompt, or ValueError."""
    given = list(generator) if isinstance(generator, (list, tuple)) else [generator] * B
    if len(given) != B or not all(g is None or isinstance(g, torch.Generator) for g in given):
        raise ValueError(f"generator has to be a torch.Generator, or a list of them for the {B} prompts")
    return given


def own_generator(g):
    """A generator on the CPU for one prompt alone, seeded by one draw from the given one: what a prompt draws depends
    neither on the others nor on the cache."""
    return torch.Generator().manual_seed(int(torch.randint(2**32, (), generator=g, device=g.device if g else "cpu")))


def cache_cost(prompt_len, gen_length=128, steps=None, block_length=None, cache="none", refresh=None, window=4, delay=True):
    """Positions that one prompt runs, by arithmetic instead of by running: what Result.positions_run has to be. An upper
    bound where stop_at_eos ends early.

    With c tokens of the block revealed before step i and k in it, a step that does not run all T positions runs
        decode: the masks, rest - c, and the k' revealed one step ago
        greedy: k, the k' revealed one step ago, and k * window masks, or what there is left of masks
    where rest counts the masks when the block begins (this block's and all later ones)."""
    steps, block_length, refresh = steps or gen_length, block_length or gen_length, refresh or REFRESH[cache]
    total, T = 0, prompt_len + gen_length
    schedule = unmask_schedule(block_length, steps * block_length // gen_length)
    for rest in range(gen_length, 0, -block_length):
        for i, (c, k) in enumerate(schedule):
            ago = schedule[i - 1][1] if delay else 0
            if cache == "none" or i % refresh == 0 or (cache == "decode" and i == 1):
                total += T
            elif cache == "decode":
                total += rest - c + ago
            else:
                total += k + ago + min(k * window, rest - c - k)
    return total
