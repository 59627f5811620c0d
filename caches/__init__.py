"""Every other way to choose the positions that run: one loop a file, of the shape of the three in
dkv_min.py, which come first. They differ in what stands between two lines "# ----".

    prefill, pd    the prompt once                        dKV-Cache-Prefill and -PD
    local          Decode within the block                ours
    freecache      what is finished is frozen             FreeCache (FlashDLM)
    prefix, dual   everything once a block                Fast-dLLM
    window         the first masks, a window is attended  Window-Diffusion
    entropy        everything after a doubtful token      EntropyCache, as we read it
    guided         as you like, see there                 Guided Diffusion: a guider says how many
    autoregressive the newest token                       the rival: a causal model's KV cache
"""
import dkv_min
from caches import autoregressive, entropy, fast_dllm, freecache, guided, local, prefill, window

LOOPS, COSTS = dict(dkv_min.LOOPS), dict(dkv_min.COSTS)
for file in prefill, local, freecache, fast_dllm, window, entropy, autoregressive, guided:
    LOOPS |= file.LOOPS
    COSTS |= file.COSTS
CACHES = tuple(LOOPS)
