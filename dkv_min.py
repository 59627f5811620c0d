"""KV caching for masked diffusion language models (dKV-Cache, arXiv 2505.15781), as three loops.

A masked diffusion model starts from a row of masks and reveals a few tokens per step. Attention is
bidirectional, so each revealed token changes the keys and values of every other position, and the
usual KV cache does not apply. But a token's K/V settle soon after it is revealed. So keep the K/V
of all positions in buffers indexed by position, and at each step run only some positions. Those
write their K/V and attend to the whole buffer. A cache is a choice of which positions run.

    generate_none    all positions, every step
    generate_decode  all masks, and the tokens revealed one step ago          (dKV-Cache-Decode)
    generate_greedy  the tokens revealed now, those revealed one step ago,
                     and a few masks around them                              (dKV-Cache-Greedy)

Both caches run everything again every `refresh` steps. "One step ago" is the delay in the name: the
step that reveals a token still ran it as a mask, so the token is run once more, as itself, and only
those K/V are kept. The rules are those of the authors' code for LLaDA (horseee/dKV-Cache), and
tests/test_golden.py replays its traces. The loops differ where two lines "# ----" say so. caches/
has the other caches of the field, each a loop of the same shape.

Shapes: B rows, P prompt positions, T = P + gen_length, V = n_vocab. A block of L positions is
finished before the next one starts. In the loops
    lo    the first column of the block
    i     the step within the block
    c, k  how many tokens of the block are revealed before the step, and how many in it
    cand  (B, m) columns where the step may reveal a token
    pos   (B, n) columns that run; a number for that column and all after it; None for all
    rows  (B, m) where cand are in pos, and so which rows need logits (B, m, V)
    new   (B, k) columns that the step revealed

Under a threshold (support/decoding.py) rows reveal different numbers. Then c is the least that any
row has revealed, k the most that any may reveal, and a row with less to run than another runs the
spare column T: it is written, never attended, and never holds a mask. A row whose block is finished
runs nothing else until the others are done.

The words of the paper and of its code: refresh is cache_reloading_step there, window window_size,
an order known in advance denoising_index, and unmask_schedule get_num_transfer_tokens.
"""
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from support import batch
from support.batch import end_block, record
from support.decoding import block_schedules, reveal, steps, unmask_schedule
from support.settings import REMASKING, check, check_lengths, check_prompts, loop_settings

# --------------------------------------------------------------------------------------------------
# the cache, and what the loops work on

class KVCache:
    """Keys (after RoPE) and values of all layers, (n_layer, B, T + 1, n_kv_head, head_dim), by
    column; the last one is the spare column. Softmax does not care about the order of its keys, so
    nothing moves: K/V change in place."""
    def __init__(self, model, B, T):
        c, w = model.config, model.wte.weight
        shape = (c.n_layer, B, T + 1, c.n_kv_head, c.head_dim)
        self.k = torch.empty(shape, dtype=w.dtype, device=w.device)
        self.v = torch.empty(shape, dtype=w.dtype, device=w.device)
        self.row = torch.arange(B, device=w.device)[:, None]                   # (B, 1)
        self.T = T

    def update(self, layer, pos, k, v):
        """Writes k, v (B, n, n_kv_head, head_dim) at columns pos (B, n), or at 0..n-1 where pos is
        None -> all K, V of the layer, (B, T, n_kv_head, head_dim)."""
        K, V = self.k[layer], self.v[layer]
        if pos is None:
            K[:, :k.shape[1]], V[:, :k.shape[1]] = k, v
        else:
            K[self.row, pos], V[self.row, pos] = k, v
        return K[:, :self.T], V[:, :self.T]

    def keep(self, rows, B):
        """Drops all rows of the batch but these, a list; with guidance in both halves of B rows."""
        if len(rows) < B:
            both = [half + r for half in range(0, len(self.row), B) for r in rows]
            self.k, self.v, self.row = self.k[:, both], self.v[:, both], self.row[:len(both)]

@dataclass
class Batch:
    x: torch.Tensor             # (B, T + 1) int64 unfinished rows: prompt, answer, spare column
    P: int                      # prompts are left-padded to this length
    T: int                      # columns; the spare one comes after them
    L: int                      # block_length
    schedule: list | None       # for each block [(c, k)] of its steps; None: known step by step
    threshold: float | None     # reveal what is as probable as this, instead of the schedule
    config: object              # the model's
    un: bool                    # shifted logits, in decode, pd, autoregressive: see place
    order: torch.Tensor | None  # (B, gen_length) columns in reveal order; None: by confidence
    noise: torch.Tensor | None  # (B, steps, L) uniform draws; None at temperature 0
    pad: torch.Tensor | None    # (B,) left padding of each row; None if there is none
    temperature: float
    top_p: float | None
    top_k: int | None
    remasking: str
    cfg_scale: float
    suppress_eos: str | None
    stop_at_eos: bool
    book: batch.Book            # which prompts are left, positions run, on_step
    step: int = 0               # calls of the model so far
    lo: int = 0                 # of the step: its block's first column,
    turn: int = 0               # its place in noise,
    ran: torch.Tensor | None = None  # and the columns that ran

@dataclass
class Result:
    tokens: list          # per prompt: its ids and the generated ones
    forwards: int         # calls of the model (a call on guidance's doubled rows is one)
    steps: list           # per prompt: the calls in which it had something to run
    positions_run: list   # per prompt: positions that went through the network, over all steps
    positions_full: list  # the same if every one of those steps had run everything
    guider_forwards: int  # of Guided Diffusion's guider, elsewhere 0
    guider_positions: list
    seconds: float

# --------------------------------------------------------------------------------------------------
# the three loops

def generate_none(model, s):
    """No cache. Agrees with llada_generate.py, which is LLaDA's generate.py."""
    for lo in range(s.P, s.T, s.L):
        for i, c, k in steps(s, lo):
            cand = candidates(s, lo, c, k)
            # ------------------------------------------------- which positions run: all
            pos, rows = None, cand
            # -------------------------------------------------
            logits = forward(model, s, pos, rows, cache=None)
            new = reveal(s, lo, cand, k, logits)
            record(s, pos, new)
        if not end_block(s, lo):
            break

def generate_decode(model, s, refresh=8, delay=True):
    """dKV-Cache-Decode, llada_dkv_cache_decode.py. Until the next refresh, the K/V of the prompt
    and of tokens revealed two or more steps ago are stale."""
    for lo in range(s.P, s.T, s.L):
        cache, new = new_cache(model, s), None  # every block starts with an empty cache
        for i, c, k in steps(s, lo):
            cand = candidates(s, lo, c, k)
            # ------------------------------------------------- which positions run
            if i < 2 or i % refresh == 0:  # all. i = 1 too: the authors' code keeps nothing of 0
                pos, rows = (lo, cand - lo) if s.config.shift and i % refresh else (None, cand)
            else:  # the masks, and what was revealed one step ago
                masks = first_masks(s, lo, s.T - lo - c)
                pos = torch.cat([masks, new], 1) if delay else masks
                rows = torch.searchsorted(masks, cand.contiguous())  # masks come first, ascending
            # -------------------------------------------------
            logits = forward(model, s, pos, rows, cache)
            new = reveal(s, lo, cand, k, logits)
            record(s, pos, new)
        if not end_block(s, lo):
            break

def generate_greedy(model, s, refresh=2, window=4, delay=True):
    """dKV-Cache-Greedy, llada_dkv_cache_greedy.py. Everything outside pos is stale, masks included.
    It has to know what a step reveals before the step runs, so it needs an order fixed ahead."""
    for lo in range(s.P, s.T, s.L):
        cache, new = new_cache(model, s), None  # every block starts with an empty cache
        for i, c, k in steps(s, lo):
            cand = candidates(s, lo, c, k)
            # ------------------------------------------------- which positions run
            if i % refresh == 0:  # all; i = 1 is not an exception here
                pos, rows = None, cand
            else:  # revealed now, revealed one step ago, a window of masks
                near = nearest_masks(s, cand, window, s.T - lo - c - k)
                pos = torch.cat([cand, new, near] if delay else [cand, near], 1)
                rows = torch.arange(k, device=pos.device).expand_as(cand)  # cand come first
            # -------------------------------------------------
            logits = forward(model, s, pos, rows, cache)
            new = reveal(s, lo, cand, k, logits)
            record(s, pos, new)
        if not end_block(s, lo):
            break

LOOPS = {"none": generate_none, "decode": generate_decode, "greedy": generate_greedy}
CACHES = tuple(LOOPS)

# --------------------------------------------------------------------------------------------------
# what the loops share, in the order in which a step uses it

def new_cache(model, s):
    return KVCache(model, len(s.x) * (2 if s.cfg_scale else 1), s.T)  # guidance doubles the rows

def columns(s, lo, start, end):
    """Columns start..end-1, (B, end - start); T in rows whose block, the one at lo, is finished."""
    unfinished = (s.x[:, lo:lo + s.L] == s.config.mask_id).any(1, keepdim=True)
    return torch.arange(start, end, device=s.x.device).where(unfinished, s.T)

def first_masks(s, lo, n, end=None):
    """Columns of the first n masks from lo to end (None: T), ascending, (B, n); T fills rows that
    have fewer. The loop knows the most that a row has: nothing is counted on the device."""
    end = end or s.T
    masked = s.x[:, lo:end] == s.config.mask_id                                # (B, end - lo)
    return columns(s, lo, lo, end).where(masked, s.T).sort(dim=1).values[:, :n].contiguous()

def candidates(s, lo, c, k):
    """Columns where this step may reveal a token, (B, m): the next k of an order that is known
    ahead (m = k), or else all masks of the block."""
    if s.order is not None:
        return s.order[:, lo - s.P + c:lo - s.P + c + k]
    return first_masks(s, lo, s.L - c, lo + s.L)

def nearest_masks(s, cand, window, n_left):
    """Greedy's window: for each target in turn the `window` nearest masks that are not taken yet,
    left before right, across revealed tokens and the end of the block. n_left: masks that are not
    targets. -> (B, k * window), fewer where there are not enough masks"""
    available = (s.x[:, :s.T] == s.config.mask_id).scatter(1, cand, False)     # (B, T)
    column, near = torch.arange(s.T, device=s.x.device), []
    for target in cand.split(1, dim=1):                                        # (B, 1)
        n = min(window, n_left)
        n_left -= n
        # offsets -1, 1, -2, 2, ... have the ranks 1, 2, 3, 4, ...
        offset = column - target                                               # (B, T)
        rank = 2 * offset.abs() - (offset < 0).long()
        rank = rank.masked_fill(~available, 2 * s.T)
        near.append(rank.topk(n, dim=1, largest=False).indices)
        available = available.scatter(1, near[-1], False)
    return torch.cat(near, 1)

def place(s, pos, rows):
    """-> (B, n) columns that run, None for all, and (B, m) which of them propose the tokens of the
    candidates at pos[rows]: themselves, or with shifted logits the columns before them."""
    shift, T = int(s.config.shift), s.T
    if pos is None:
        return None, rows - shift
    if isinstance(pos, int):  # column pos - shift is row 0: the rows stay
        return columns(s, s.lo, pos - shift, T), rows
    if s.un:  # all one to the left: "un" of the authors' code for Dream, which freezes masks too
        return pos.where(pos == T, pos - 1), rows
    if shift:  # the columns before the candidates run as well, each column once
        n = pos.shape[1]
        cand = pos.gather(1, rows.clamp(max=n - 1)).where(rows < n, T)         # (B, m)
        before = cand.where(cand == T, cand - 1)
        pos = torch.cat([pos, before], 1).sort(dim=1).values                   # (B, n + m)
        pos[:, 1:] = pos[:, 1:].where(pos[:, 1:] != pos[:, :-1], T)
        most = int((pos < T).sum(1).max())  # waits for the device
        pos = pos.sort(dim=1).values[:, :most].contiguous()
        rows = torch.searchsorted(pos, before)
    return pos, rows

def forward(model, s, pos, rows, cache, seen=None):
    """Runs columns pos (B, n) -> the float32 logits of `rows` (B, m) among them, (B, m, V). seen
    (B, T) bool: the columns that are attended, None: all. With guidance the batch is doubled, the
    second half with its prompt masked (LLaDA's generate.py)."""
    pos, rows = place(s, pos, rows)
    s.ran = pos
    x, pad = (s.x[:, :s.T] if pos is None else s.x.gather(1, pos)), s.pad      # (B, n)
    rows = rows.clamp(max=x.shape[1] - 1)  # of a spare candidate, T, any row will do
    if s.cfg_scale:
        column = torch.arange(s.T, device=x.device)[None] if pos is None else pos
        x = torch.cat([x, x.masked_fill(column < s.P, s.config.mask_id)])
        pos, rows, pad, seen = (t if t is None else torch.cat([t, t])
                                for t in (pos, rows, pad, seen))
    logits = model(x, pos, cache, rows, pad, seen)
    # rows of the head that pad the vocabulary are never emitted, nor is the mask
    logits = logits[..., :s.config.n_vocab]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if s.cfg_scale:
        logits, uncond = logits.chunk(2)
        logits = uncond + (s.cfg_scale + 1) * (logits - uncond)
    if s.config.mask_id < s.config.n_vocab:
        logits[..., s.config.mask_id] = -torch.inf
    return logits

# --------------------------------------------------------------------------------------------------
# the entry

# not cuDNN: on an H100 it plans for 35 ms when a shape is new, which it is in most steps
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

def find(table, cache):
    """LOOPS or COSTS: this file's, or for another cache those of caches/."""
    import caches  # here, because caches/ imports this file
    return globals()[table] if cache in CACHES else getattr(caches, table)

@torch.inference_mode()
def generate(model, prompts, *, cache="none", gen_length=128, steps=None, block_length=None,
             schedule="llada", threshold=None, temperature=0.0, top_p=None, top_k=None,
             remasking=None, cfg_scale=0.0, stop_at_eos=False, suppress_eos=None, order=None,
             generator=None, on_step=None, **settings):
    """Generates gen_length tokens after each prompt -> Result. Arguments that cannot work raise a
    ValueError of one sentence.

    prompts      list of lists of ids, of any lengths; each is answered as if it were alone
    cache        "none", "decode", "greedy", or one of caches/
    gen_length   tokens to generate
    steps        denoising steps over all blocks; None: gen_length
    block_length tokens of a block; None: gen_length
    schedule     how many tokens a step reveals: "llada", as many in each; "dream", Dream's counts,
                 with steps that reveal none, and more steps than tokens if you like
    threshold    instead of steps: each step reveals the tokens of the block whose probability at
                 temperature 1 reaches it, and always the most probable one
    temperature  0: the most probable token
    top_p, top_k draw only from the most probable tokens, of this sum or this many; they count for
                 the confidence as well, which a temperature never does
    remasking    which tokens come first: by "low_confidence" (the default), by "margin" (first
                 minus second probability) or "entropy", "random" (greedy's default) or
                 "left_to_right" (a causal model's); greedy needs one of the last two
    cfg_scale    classifier-free guidance; 0: off
    stop_at_eos  start no block after one that contains EOS
    suppress_eos "logits": never emit EOS; "confidence": reveal positions that propose EOS or EOT
                 last, which has no effect in an order known ahead
    order        per prompt, its positions P..P+gen_length-1 in reveal order, block by block
    generator    a torch.Generator, or one per prompt; None: torch's global one
    on_step      called after each step with (step, tokens (B, T) int64, run (B, T) bool, revealed
                 (B, T) bool); columns count from each prompt's own start, and -1 and False fill
                 the end of shorter rows
    **settings   those of the loop, as in its signature; None means the default
                 refresh  steps of a block from one run of everything to the next (8, greedy 2)
                 window   masks that greedy runs around each token that it reveals (4)
                 delay    False: keep the K/V of the step that revealed the token (to see why not)
    """
    began = time.perf_counter()
    loops = find("LOOPS", cache)
    how = check(model.config, loops, cache=cache, gen_length=gen_length, steps=steps,
                block_length=block_length, schedule=schedule, threshold=threshold,
                temperature=temperature, top_p=top_p, top_k=top_k, remasking=remasking,
                cfg_scale=cfg_scale, stop_at_eos=stop_at_eos, suppress_eos=suppress_eos,
                order=order, **settings)
    prompts = check_prompts(model.config, prompts, gen_length)
    s = Batch(**batch.start(model, prompts, how, order, generator, on_step))
    with sdpa_kernel(ATTENTION):
        loops[cache](model, s, **loop_settings(loops[cache], settings))
    counts = batch.read_out(s)  # waits for the device
    return Result(forwards=s.step, seconds=time.perf_counter() - began, **counts)

# positions that a step runs. `at` has the letters of the top, the block's schedule, m masks that
# are left, and how many tokens were revealed one step `ago`
COSTS = {
    "none": lambda at: at.T,
    "decode": lambda at, refresh, delay:
        at.T if at.i % refresh == 0 else at.T - at.shift * (at.lo - 1) if at.i == 1 else
        at.m + delay * at.ago,
    "greedy": lambda at, refresh, window, delay:
        at.T if at.i % refresh == 0 else at.k + delay * at.ago + min(at.k * window, at.m - at.k),
}

def cache_cost(prompt_len, gen_length=128, steps=None, block_length=None, cache="none",
               schedule="llada", threshold=None, shift=False, **settings):
    """Positions that one prompt runs, in closed form. Result.positions_run has to equal it, and
    with stop_at_eos to be at most that. shift: of the model's config; settings: as in generate."""
    costs, loops = find("COSTS", cache), find("LOOPS", cache)
    moves = shift and cache in ("greedy", "local", "dual", "window")  # see place: no fixed number
    if threshold is not None or moves or cache not in costs:
        what = "a threshold" if threshold is not None else f"cache {cache!r}"
        raise ValueError(f"there is no closed form for {what}{' with shifted logits' * moves}: "
                         f"there is one, without a threshold, for {', '.join(find('COSTS', None))}")
    settings = loop_settings(loops[cache], settings)
    steps, T = steps or gen_length, prompt_len + gen_length
    L = 1 if cache == "autoregressive" else block_length or gen_length
    check_lengths(gen_length, steps, L, schedule, **settings)
    total = 0
    for lo, block in zip(range(prompt_len, T, L), block_schedules(gen_length, L, steps, schedule)):
        for i, (c, k) in enumerate(block):
            at = SimpleNamespace(P=prompt_len, T=T, L=L, lo=lo, i=i, c=c, k=k, m=T - lo - c,
                                 ago=block[i - 1][1] if i else 0, schedule=block, shift=shift)
            total += costs[cache](at, **settings)
    return total
