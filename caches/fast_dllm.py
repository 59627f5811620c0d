"""Fast-dLLM's two caches (arXiv 2505.22618): everything runs at the first step of a block, then
the block, decoded tokens included, and with the prefix cache all masks after it as well."""
from dkv_min import candidates, columns, forward, new_cache
from support.batch import end_block, record
from support.decoding import reveal, steps

def generate_prefix(model, s):
    """Agrees with generate_with_prefix_cache of NVlabs/Fast-dLLM, llada/generate.py. The K/V before
    the block are stale."""
    for lo in range(s.P, s.T, s.L):
        cache = new_cache(model, s)
        for i, c, k in steps(s, lo):
            cand = candidates(s, lo, c, k)
            # ------------------------------------------------- which positions run
            if i == 0:  # all
                pos, rows = None, cand
            else:  # the block and all after it
                pos, rows = lo, cand - lo
            # -------------------------------------------------
            logits = forward(model, s, pos, rows, cache)
            new = reveal(s, lo, cand, k, logits)
            record(s, pos, new)
        if not end_block(s, lo):
            break

def generate_dual(model, s):
    """Agrees with generate_with_dual_cache of the same file. K/V outside the block are stale."""
    for lo in range(s.P, s.T, s.L):
        cache = new_cache(model, s)
        for i, c, k in steps(s, lo):
            cand = candidates(s, lo, c, k)
            # ------------------------------------------------- which positions run
            if i == 0:  # all
                pos, rows = None, cand
            else:  # the block
                pos, rows = columns(s, lo, lo, lo + s.L), cand - lo
            # -------------------------------------------------
            logits = forward(model, s, pos, rows, cache)
            new = reveal(s, lo, cand, k, logits)
            record(s, pos, new)
        if not end_block(s, lo):
            break

LOOPS = {"prefix": generate_prefix, "dual": generate_dual}
COSTS = {"prefix": lambda at: at.T if at.i == 0 else at.T - at.lo + at.shift,
         "dual": lambda at: at.T if at.i == 0 else at.L}
