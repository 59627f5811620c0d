"""Ours: Decode that runs only the masks of its block. It takes the delay of dKV-Cache-Decode, and
the frozen masks after the block of Fast-dLLM's dual cache. Elastic-Cache and d2Cache also run a few
masks and what was just revealed, but choose and refresh by attention maps: this is a recombination,
not an invention."""
import torch

from dkv_min import candidates, first_masks, forward, new_cache
from support.batch import end_block, record
from support.decoding import reveal, steps

def generate_local(model, s, refresh=None, delay=True):
    """Until the next block or refresh (None: never), the K/V of everything but the masks of the
    block and what was revealed one step ago are stale. Exact with one layer."""
    for lo in range(s.P, s.T, s.L):
        cache, new = new_cache(model, s), None
        for i, c, k in steps(s, lo):
            cand = candidates(s, lo, c, k)
            # ------------------------------------------------- which positions run
            if i % (refresh or s.L) == 0:  # all
                pos, rows = None, cand
            else:  # the masks of the block, and what was revealed one step ago
                masks = first_masks(s, lo, s.L - c, lo + s.L)
                pos = torch.cat([masks, new], 1) if delay else masks
                rows = torch.searchsorted(masks, cand.contiguous())
            # -------------------------------------------------
            logits = forward(model, s, pos, rows, cache)
            new = reveal(s, lo, cand, k, logits)
            record(s, pos, new)
        if not end_block(s, lo):
            break

LOOPS = {"local": generate_local}
COSTS = {"local": lambda at, refresh, delay:
         at.T if at.i % (refresh or at.L) == 0 else at.L - at.c + delay * at.ago}
