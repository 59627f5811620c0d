"""The other axis: which tokens a step proposes, and which of them it reveals. The loops choose the
positions that run; what is here knows nothing of caches."""
import torch

def unmask_schedule(L, steps):
    """[(tokens revealed before the step, tokens revealed in it)] for the steps of a block of L:
    L // steps each, one more in the first L % steps. LLaDA's get_num_transfer_tokens."""
    ks = [L // steps + (i < L % steps) for i in range(steps)]
    return [(sum(ks[:i]), k) for i, k in enumerate(ks)]

def steps(s, lo):
    """The steps of the block at column lo -> i, c tokens revealed before it, k revealed in it."""
    for i, (c, k) in enumerate(s.schedule):
        yield i, c, k

def reveal(s, lo, cand, k, logits):
    """Writes k tokens into s.x: all candidates where the order is known ahead, else the most
    confident ones. cand (B, m), logits (B, m, V) -> the columns that were revealed (B, k)."""
    if s.suppress_eos == "logits":
        logits[..., s.config.eos_id] = -torch.inf
    drawn = draw(s, cand - lo, logits) if s.temperature else None              # (B, m)
    if s.order is None:
        score = confidence(s, logits, drawn)
        best = score.argsort(dim=1, descending=True, stable=True)[:, :k]       # ties: the leftmost
        cand, logits = cand.gather(1, best), logits.take_along_dim(best[..., None], 1)
        drawn = drawn if drawn is None else drawn.gather(1, best)
    s.x.scatter_(1, cand, logits.argmax(-1) if drawn is None else drawn)
    return cand

def draw(s, column, logits):
    """Samples a token for each of logits (B, m, V) at columns (B, m) of the block -> (B, m).
    Inverse-CDF sampling with a uniform draw fixed per prompt, step and column: the draw depends
    neither on the batch nor on the cache."""
    u = s.noise[:, s.step].gather(1, column)                                   # (B, m)
    scaled = (logits.double() - logits.amax(-1, keepdim=True)) / s.temperature
    cdf = scaled.softmax(-1).cumsum(-1)                                        # (B, m, V)
    at = (u * cdf[..., -1])[..., None]
    drawn = torch.searchsorted(cdf, at, right=True).squeeze(-1)
    return drawn.where(drawn < cdf.shape[-1], logits.argmax(-1))  # NaN ends up after the last id

def confidence(s, logits, drawn):
    """Log probability at temperature 1 of the drawn tokens, or of the most probable ones where
    drawn is None, (B, m). LLaDA's low-confidence remasking reveals the highest."""
    if s.suppress_eos == "confidence":  # a position that proposes the end comes last
        drawn = logits.argmax(-1) if drawn is None else drawn
        logits = logits.clone()
        for end in (s.config.eos_id, s.config.eot_id):
            if end is not None:
                logits[..., end] = -torch.inf
    logp = logits.log_softmax(-1)
    if drawn is None:
        return logp.amax(-1)
    return logp.gather(-1, drawn[..., None]).squeeze(-1)
