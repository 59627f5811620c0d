"""FreeCache (FlashDLM, arXiv 2505.21467): what is finished is frozen. The K/V of the prompt are
those of the first step, the K/V of a block those of its last step. There is no refresh."""
from dkv_min import candidates, forward, new_cache
from support.batch import end_block, record
from support.decoding import reveal, steps

def generate_freecache(model, s, delay=False):
    """Agrees with src/model/llada_v2/generate.py of flash-dlm-experimental. As published, the
    tokens that a block's last step reveals are frozen as the masks that they were in it. With
    dKV-Cache's delay the block runs once more, at the first step of the next one."""
    cache = new_cache(model, s)
    for lo in range(s.P, s.T, s.L):
        for i, c, k in steps(s, lo):
            cand = candidates(s, lo, c, k)
            # ------------------------------------------------- which positions run
            if lo == s.P and i == 0:  # all
                pos, rows = None, cand
            else:  # the block and all after it; with the delay the block before it, once
                pos = lo - s.L if delay and i == 0 else lo
                rows = cand - pos
            # -------------------------------------------------
            logits = forward(model, s, pos, rows, cache)
            new = reveal(s, lo, cand, k, logits)
            record(s, pos, new)
        B, stay = len(s.x), end_block(s, lo)
        if not stay:
            break
        cache.keep(stay, B)

LOOPS = {"freecache": generate_freecache}
COSTS = {"freecache": lambda at, delay:
         at.T if at.lo == at.P and at.i == 0 else
         at.T - at.lo + at.shift + (delay and at.i == 0) * at.L}
