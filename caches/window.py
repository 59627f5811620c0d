"""Window-Diffusion (arXiv 2601.20332): between two refreshes only the first masks run, and masks
beyond a window are not even attended."""
import torch

from dkv_min import candidates, first_masks, forward, new_cache
from support.batch import end_block, record
from support.decoding import reveal, steps

def generate_window(model, s, refresh=32, window=64, active=16):
    """Agrees with llada/model/modeling_llada.py of vhicrgit/Window-Diffusion, which has one block.
    A refresh runs everything and begins a phase. `active`: masks that the other steps run, beside
    the tokens revealed in the phase. `window`: masks that are attended, as they are after the
    refresh. Both are counted from the block's first column on."""
    for lo in range(s.P, s.T, s.L):
        cache, seen = new_cache(model, s), None
        for i, c, k in steps(s, lo):
            cand = candidates(s, lo, c, k)
            # ------------------------------------------------- which positions run, which are seen
            if i % refresh == 0:  # all
                pos, rows, seen = None, cand, None
            else:  # the first masks, and what the phase has revealed
                masks = first_masks(s, lo, min(active, s.T - lo - c))
                cand = cand[:, :active].contiguous()
                pos = torch.cat([masks, *phase], 1)
                rows = torch.searchsorted(masks, cand).where(cand < s.T, s.T)
            # -------------------------------------------------
            logits = forward(model, s, pos, rows, cache, seen)
            new = reveal(s, lo, cand, k, logits)
            record(s, pos, new)
            if i % refresh == 0:
                near = first_masks(s, lo, min(window, s.T - lo))
                known = s.x != s.config.mask_id                                # (B, T + 1)
                seen = known.scatter(1, near, True)[:, :s.T]                   # (B, T)
            # of what a refresh reveals, only the next step runs it: the delay
            phase = [new] if i % refresh < 2 else [*phase, new]
        if not end_block(s, lo):
            break

def window_cost(at, refresh, window, active):
    """The first masks, and all that was revealed since the phase's second step, or just now."""
    phase = at.i % refresh
    if phase == 0:
        return at.T
    since = at.schedule[at.i - max(phase - 1, 1)][0]
    return min(active, at.m) + at.c - since

LOOPS, COSTS = {"window": generate_window}, {"window": window_cost}
