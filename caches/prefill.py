"""dKV-Cache-Prefill and -PD (arXiv 2505.15781): the prompt runs in the first step only. Prefill
runs everything after it at every step. PD is Prefill and Decode together."""
import torch

from dkv_min import candidates, first_masks, forward, new_cache
from support.batch import end_block, record
from support.decoding import reveal, steps

def generate_prefill(model, s):
    """The K/V of the prompt are stale from the second step on."""
    cache = new_cache(model, s)
    for lo in range(s.P, s.T, s.L):
        for i, c, k in steps(s, lo):
            cand = candidates(s, lo, c, k)
            # ------------------------------------------------- which positions run
            if lo == s.P and i == 0:  # all
                pos, rows = None, cand
            else:  # all after the prompt
                pos, rows = s.P, cand - s.P
            # -------------------------------------------------
            logits = forward(model, s, pos, rows, cache)
            new = reveal(s, lo, cand, k, logits)
            record(s, pos, new)
        B, stay = len(s.x), end_block(s, lo)
        if not stay:
            break
        cache.keep(stay, B)

def generate_pd(model, s, refresh=8, delay=True):
    """The K/V of the prompt are stale from the second step on, and until the next refresh those of
    tokens revealed two or more steps ago, earlier blocks included."""
    cache, new = new_cache(model, s), None
    for lo in range(s.P, s.T, s.L):
        for i, c, k in steps(s, lo):
            cand = candidates(s, lo, c, k)
            # ------------------------------------------------- which positions run
            if lo == s.P and i == 0:  # all
                pos, rows = None, cand
            elif i < 2 or i % refresh == 0:  # all after the prompt
                pos, rows = s.P, cand - s.P
            else:  # the masks, and what was revealed one step ago
                masks = first_masks(s, lo, s.T - lo - c)
                pos = torch.cat([masks, new], 1) if delay else masks
                rows = torch.searchsorted(masks, cand.contiguous())
            # -------------------------------------------------
            logits = forward(model, s, pos, rows, cache)
            new = reveal(s, lo, cand, k, logits)
            record(s, pos, new)
        B, stay = len(s.x), end_block(s, lo)
        if not stay:
            break
        cache.keep(stay, B)

LOOPS = {"prefill": generate_prefill, "pd": generate_pd}
COSTS = {
    "prefill": lambda at: at.T if at.lo == at.P and at.i == 0 else at.T - at.P + at.shift,
    "pd": lambda at, refresh, delay:
        at.T if at.lo == at.P and at.i == 0 else
        at.T - at.P + at.shift if at.i < 2 or at.i % refresh == 0 else
        at.m + delay * at.ago,
}
