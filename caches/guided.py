"""Guided Diffusion (FlashDLM, arXiv 2505.21467): the diffusion model proposes a token for every
mask, and a small causal model, the guider, decides how many of them a step keeps: the leading run
that it accepts, and at least one. What is written are the diffusion model's own tokens."""
import torch

from dkv_min import KVCache, candidates, columns, forward, new_cache
from support.batch import end_block, record
from support.decoding import steps

def generate_guided(model, s, guider=None, accept="deterministic", accept_top_k=5, ratio=0.5,
                    accept_threshold=None, window=None, speculative=False):
    """Agrees with guided_diffusion/diff_spec_utils_assisted.py of flash-dlm-experimental, whose K/V
    lie where they belong. `accept` is a rule of `accepted`; "self" takes no guider. `window`: None
    freezes the prompt after the first step; (left, right) runs so many columns around the last
    revealed one, freezes what is before and hides what is after: (0, gen_length) is FreeCache.
    `speculative`: the guider's token is taken at the first disagreement, and so it decides all."""
    cache, T = new_cache(model, s), s.T
    if guider:
        guide = KVCache(guider, len(s.x), T)
        guide.T = T - 1  # the last column proposes nothing, and is never read
    for lo in range(s.P, T, s.L):
        for i, c, k in steps(s, lo):
            cand = candidates(s, lo, c, k)  # all masks of a row follow each other
            # ------------------------------------------------- which positions run, which are seen
            if i == 0:  # all
                pos, rows, seen = None, cand, None
            elif window is None:  # all after the prompt
                pos, rows = columns(s, lo, s.P, T), cand - s.P
            else:
                cand, pos, rows, seen = around(s, cand, *window)
            # -------------------------------------------------
            logits = forward(model, s, pos, rows, cache, seen)
            draft = logits.argmax(-1)                                          # (B, m)
            if guider:
                # it reads the newest token and the drafts, at first the prompt too. What it read of
                # rejected drafts is overwritten before anything attends to it
                read = s.x.scatter(1, cand, draft)                             # (B, T + 1)
                where = columns(s, lo, 0, T - 1) if i == 0 else cand.where(cand == T, cand - 1)
                at = (cand - 1).clamp(max=T - 2) if i == 0 else None
                tokens = read.gather(1, where).clamp(max=guider.config.vocab_size - 1)
                logits = guider(tokens, where, guide, at, s.pad).float()
                logits = logits[..., :min(guider.config.n_vocab, s.config.n_vocab)]
                for mask_id in {s.config.mask_id, guider.config.mask_id}:
                    logits[..., mask_id:mask_id + 1] = -torch.inf  # never agreed upon
                s.book.read(where, s.T)
            good = accepted(accept, draft, logits, accept_top_k, ratio, accept_threshold)
            n = good.long().cumprod(1).sum(1, keepdim=True)                    # (B, 1)
            if speculative:
                draft = draft.where(torch.arange(draft.shape[1], device=n.device) < n,
                                    logits.argmax(-1))
                n = n + 1
            new = keep(s, cand, draft, n.clamp(min=1))
            record(s, pos, new)
        end_block(s, lo)

def around(s, cand, left, right):
    """-> the candidates, the columns that run, where the former are among the latter, and which
    columns are attended: `left` columns up to the last revealed one, and `right` from it on."""
    last, T = cand[:, :1] - 1, s.T                                             # (B, 1)
    start = (last - left).maximum(s.book.pads[s.book.live, None])
    end = (last + right).clamp(max=T)
    pos = start + torch.arange(min(left + right, T), device=cand.device)       # (B, left + right)
    pos = pos.where((pos < end) & (cand[:, :1] < T), T)
    cand = cand[:, :right - 1]
    cand = cand.where(cand < end, T)
    return (cand, pos, (cand - start).where(cand < T, T),
            torch.arange(T, device=cand.device) < end)                         # (B, T)

def accepted(rule, draft, logits, top_k, ratio, threshold):
    """draft (B, m), the guider's logits (B, m, V), or of "self" the model's own -> (B, m) bool."""
    V = logits.shape[-1]
    own = logits.gather(-1, draft.clamp(max=V - 1)[..., None])                 # (B, m, 1)
    own = own.masked_fill(draft[..., None] >= V, -torch.inf)
    best = logits.amax(-1, keepdim=True)
    if rule == "deterministic":
        return logits.argmax(-1) == draft
    if rule in ("topk", "topk_relative"):
        good = (logits > own).sum(-1) < top_k
        return good & ((own - best).exp() >= ratio)[..., 0] if rule == "topk_relative" else good
    p = (own - logits.logsumexp(-1, keepdim=True)).exp()[..., 0]
    return p >= (0.9 if threshold is None else threshold) if rule == "self" else (
        p > (0.1 if threshold is None else threshold))

def keep(s, cand, draft, n):
    """Writes the first n (B, 1) drafts of each row -> their columns, T where a row has fewer. With
    stop_at_eos what follows an EOS is EOS: the row is finished."""
    first = torch.arange(cand.shape[1], device=cand.device) < n                # (B, m)
    if s.stop_at_eos:
        ends = (draft == s.config.eos_id) & first & (cand < s.T)
        after = ends.long().cumsum(1) - ends.long() > 0
        first &= ~after
    new = cand.where(first, s.T)
    s.x.scatter_(1, new, draft)
    if s.stop_at_eos:
        ended = ends.any(1, keepdim=True) & (s.x == s.config.mask_id)          # (B, T + 1)
        s.x.masked_fill_(ended, s.config.eos_id)
    return new[:, :int(first.sum(1).max())]

LOOPS, COSTS = {"guided": generate_guided}, {}  # no closed form: the guider decides
