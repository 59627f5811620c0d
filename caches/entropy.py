"""EntropyCache (arXiv 2603.18489), as we read its abstract and its figure: no official code exists.
Known: everything runs after a step that revealed a token of high entropy, else the masks of a
window and the tokens revealed last. Guessed: what the window is (the block, or the first masks of
it), that entropy is in nats at temperature 1, that the first step of a block is like any other."""
import torch

from dkv_min import candidates, first_masks, forward, new_cache
from support.batch import end_block, record
from support.decoding import reveal, steps

def generate_entropy(model, s, tau=0.2, recent=64, window=None):
    """`tau`: entropy in nats above which the next step runs everything; on the toy, which is sure
    of what it writes, 0.5 never does, and less than 0.2 gains nothing. `recent`: tokens revealed
    last that run. `window`: the first masks of the block that run and may be revealed; None: all.
    Rows decide for themselves: this loop waits for the device once a step."""
    cache, T = new_cache(model, s), s.T
    full = torch.ones_like(s.x[:, :1], dtype=torch.bool)                       # (B, 1)
    last = s.x[:, :0]                                                          # (B, up to recent)
    for lo in range(s.P, s.T, s.L):
        for i, c, k in steps(s, lo):
            masks = first_masks(s, lo, min(window or s.L, s.L - c), lo + s.L)
            cand = candidates(s, lo, c, k)[:, :window].contiguous()
            # ------------------------------------------------- which positions run
            # in some rows the masks and the last tokens, in the others all: T fills the shorter
            busy = masks[:, :1] < T
            pos = torch.cat([masks, last], 1).where(busy, T)                   # (B, n)
            rows = torch.searchsorted(masks, cand)
            if (full & busy).any():
                short = max(0, T - pos.shape[1])
                pos = torch.nn.functional.pad(pos, (0, short), value=T)
                every = torch.arange(pos.shape[1], device=pos.device).clamp(max=T)
                pos = every.where(full & busy, pos)
                rows = cand.where(full, rows)
            # -------------------------------------------------
            logits = forward(model, s, pos, rows, cache)
            new = reveal(s, lo, cand, k, logits)
            record(s, pos, new)
            # the largest entropy of what was revealed decides on the next step
            told = (s.x.gather(1, cand) != s.config.mask_id) & (cand < T)      # (B, m)
            nats = torch.special.entr(logits.softmax(-1)).sum(-1)              # (B, m)
            doubt = (told & (nats > tau)).any(1, keepdim=True)
            full = doubt.where(told.any(1, keepdim=True), full)
            # of a step the most confident is the latest; T goes to the front
            last = torch.cat([last, new.flip(1)], 1)
            last = last.gather(1, (last < T).byte().argsort(dim=1, stable=True))
            last = last[:, max(0, last.shape[1] - recent):]
        B, stay = len(s.x), end_block(s, lo)
        if not stay:
            break
        cache.keep(stay, B)
        full, last = full[stay], last[stay]

LOOPS, COSTS = {"entropy": generate_entropy}, {}  # no closed form: the text decides
