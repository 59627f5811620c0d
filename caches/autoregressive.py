"""The rival: a causal model with the usual KV cache, as one more active set. The token revealed one
step ago runs, attends to all before it, and proposes the token after it. Nothing is ever stale."""
from dkv_min import candidates, columns, forward, new_cache
from support.batch import end_block, record
from support.decoding import reveal, steps

def generate_autoregressive(model, s):
    """Exact. Every token is a block of its own, so a prompt leaves in the step that reveals EOS."""
    cache = new_cache(model, s)
    for lo in range(s.P, s.T, s.L):
        for i, c, k in steps(s, lo):
            cand = candidates(s, lo, c, k)
            # ------------------------------------------------- which positions run
            # the columns before these: the whole prompt, then the newest token
            pos = columns(s, lo, 1 if lo == s.P else lo, lo + 1)
            rows = cand - pos[:, :1]
            cache.T = lo  # what comes after is not written yet
            # -------------------------------------------------
            logits = forward(model, s, pos, rows, cache)
            new = reveal(s, lo, cand, k, logits)
            record(s, pos, new)
        B, stay = len(s.x), end_block(s, lo)
        if not stay:
            break
        cache.keep(stay, B)

LOOPS = {"autoregressive": generate_autoregressive}
COSTS = {"autoregressive": lambda at: at.P if at.lo == at.P else 1}
