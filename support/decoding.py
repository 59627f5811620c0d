"""The other axis: which tokens a step proposes, and which of them it reveals. The loops choose the
positions that run; what is here knows nothing of caches."""
import itertools
import math

import torch

def unmask_schedule(L, steps):
    """[(tokens revealed before the step, tokens revealed in it)] for the steps of a block of L:
    L // steps each, one more in the first L % steps. LLaDA's get_num_transfer_tokens."""
    ks = [L // steps + (i < L % steps) for i in range(steps)]
    return [(sum(ks[:i]), k) for i, k in enumerate(ks)]

def block_schedules(G, L, steps, kind):
    """-> the schedule of each block of L of G tokens. kind "dream": a step from time t to s reveals
    the share 1 - s/t of all masks, rounded down, and a block's last step the rest, as Dream's
    diffusion_generate does, and FreeCache's in blocks. Float32, as there."""
    blocks = G // L
    n = steps // blocks
    if kind == "llada":
        return [unmask_schedule(L, n)] * blocks
    time, found = torch.linspace(1, 1e-3, steps + 1), []
    for b in range(blocks):
        c, block = 0, []
        for i in range(b * n, b * n + n):
            share = int((G - b * L - c) * (1 - time[i + 1] / time[i]))
            k = min(share, L - c) if i < b * n + n - 1 else L - c
            block.append((c, k))
            c += k
        found.append(block)
    return found

def steps(s, lo):
    """The steps of the block at column lo -> i, c tokens revealed before it, k revealed in it.
    Under a threshold the block ends when no row has a mask in it; c is the least that any row has
    revealed, k the most that any may reveal. Counting them waits for the device."""
    s.lo = lo
    if s.schedule is not None:
        for i, (c, k) in enumerate(s.schedule[(lo - s.P) // s.L]):
            s.turn = s.step
            yield i, c, k
        return
    for i in itertools.count():
        masked = s.x[:, lo:lo + s.L] == s.config.mask_id                       # (B, L)
        if not (left := int(masked.sum(1).max())):
            return
        s.turn = lo - s.P + i  # the same in a batch as alone
        yield i, s.L - left, left

def reveal(s, lo, cand, k, logits):
    """Writes k tokens into s.x: all candidates where the order is known ahead, else the most
    confident ones, under a threshold those that reach it and always the first.
    cand (B, m), logits (B, m, V) -> the columns that were revealed (B, k), the most confident
    first, and T where a row reveals fewer than another."""
    if s.suppress_eos == "logits":
        logits[..., s.config.eos_id] = -torch.inf
    logits = keep_likely(logits, s.top_p, s.top_k)
    drawn = draw(s, (cand - lo).clamp(max=s.L - 1), logits) if s.temperature else None   # (B, m)
    if s.order is None:
        score = confidence(s, logits, drawn).masked_fill(cand == s.T, -torch.inf)
        score, best = score.sort(dim=1, descending=True, stable=True)          # ties: the leftmost
        if s.threshold is not None:
            sure = score >= math.log(s.threshold)
            sure[:, 0] = True
            k = int(sure.sum(1).max())
        best = best[:, :k]
        cand, logits = cand.gather(1, best), logits.take_along_dim(best[..., None], 1)
        drawn = drawn if drawn is None else drawn.gather(1, best)
        if s.threshold is not None:
            cand = cand.where(sure[:, :k], s.T)
    s.x.scatter_(1, cand, logits.argmax(-1) if drawn is None else drawn)
    return cand

def keep_likely(logits, top_p, top_k):
    """logits (B, m, V), -inf for tokens that are not among the most probable ones that sum up to
    top_p, or not among the top_k, ties included. Dream's code divides by the temperature first."""
    if top_p is not None:
        value, at = logits.sort(dim=-1, descending=True)
        p = value.softmax(-1)
        tail = p.cumsum(-1) - p > top_p  # the first one never
        logits = logits.masked_fill(tail.scatter(-1, at, tail), -torch.inf)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits

def draw(s, column, logits):
    """Samples a token for each of logits (B, m, V) at columns (B, m) of the block -> (B, m).
    Inverse-CDF sampling with a uniform draw fixed per prompt, step and column: the draw depends
    neither on the batch nor on the cache."""
    u = s.noise[:, s.turn].gather(1, column)                                   # (B, m)
    wide = logits.float() if logits.device.type == "mps" else logits.double()  # mps has no float64
    scaled = (wide - logits.amax(-1, keepdim=True)) / s.temperature
    cdf = scaled.softmax(-1).cumsum(-1)                                        # (B, m, V)
    at = (u * cdf[..., -1])[..., None]
    drawn = torch.searchsorted(cdf, at, right=True).squeeze(-1)
    return drawn.where(drawn < cdf.shape[-1], logits.argmax(-1))  # NaN ends up after the last id

def confidence(s, logits, drawn):
    """What low-confidence remasking reveals the highest of, (B, m): the log probability at
    temperature 1 of the drawn tokens, or of the most probable ones where drawn is None."""
    if s.suppress_eos == "confidence":  # a position that proposes the end comes last
        drawn = logits.argmax(-1) if drawn is None else drawn
        logits = logits.clone()
        for end in (s.config.eos_id, s.config.eot_id):
            if end is not None:
                logits[..., end] = -torch.inf
    logp = logits.log_softmax(-1)
    score = logp.amax(-1) if drawn is None else logp.gather(-1, drawn[..., None]).squeeze(-1)
    if s.remasking == "margin":  # first minus second probability
        first, second = logp.exp().topk(2, dim=-1).values.unbind(-1)
        score = score.where(score == -torch.inf, first - second)
    elif s.remasking == "entropy":
        score = score.where(score == -torch.inf, -torch.special.entr(logp.exp()).sum(-1))
    return score.masked_fill(score.isnan(), -torch.inf)  # a filter has left nothing but an end
