"""A masked diffusion language model in one file, from the leaves up: config, norm, rotary
positions, attention, MLP, block, model; then the loss that it is trained with, saving and loading.

The network is LLaDA's (arXiv 2502.09992): a Llama-style transformer without the causal mask. Every
position attends to every other one, and the logits at a position predict the token at that position
(no shift). Two booleans of the config make it Dream's, or an autoregressive model's. One thing is
unusual, and dkv_min.py rests on it: forward() runs only the positions that it is given, and takes
the keys and values of all others from a cache.

Shapes: B rows, T positions in all, n positions run now, m positions that need logits, C = n_embd,
nh heads, nkv key/value heads, hs head size, V = vocab_size.
"""
import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from support import checkpoint, fast_cpu
from support.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# the network

@dataclass
class Config:
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4           # fewer than n_head: grouped-query attention
    n_embd: int = 256
    n_ff: int = 688              # hidden width of the MLP
    vocab_size: int = 1024       # rows of the embedding and of the head
    n_vocab: int = 1024          # ids below this may be emitted (the mask never is)
    max_len: int = 256           # prompt and generated tokens together
    mask_id: int = 0
    eos_id: int | None = None    # ends a text, and fills the rest of the answer
    eot_id: int | None = None    # ends a turn of a chat; many models have none
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    # two booleans make three families: LLaDA has neither, Dream shift, GPT and Qwen both
    shift: bool = False          # the logits at a position are about the token after it
    causal: bool = False         # attend to no later position
    tied: bool = False           # head and embedding are one tensor

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    def fault(self):
        """What is wrong with these numbers, in words, or None."""
        return checkpoint.config_fault(self)

# LLaDA-8B: 8,015,581,184 parameters. Ids from 126349 on are rows of the embedding without a token
LLADA_8B = Config(n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, n_ff=12288, vocab_size=126464,
                  n_vocab=126349, max_len=4096, mask_id=126336, eos_id=126081, eot_id=126348,
                  rope_theta=500000.0, norm_eps=1e-5)

def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))

class RMSNorm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x):
        # the statistics in float32, the product with the weight in x's dtype, as LLaDA has it
        y = F.rms_norm(at_least_float32(x), x.shape[-1:], eps=self.eps)
        return self.weight * y.to(x.dtype)                                     # (B, n, C)

def rope(pos, head_dim, theta):
    """Cosines and sines of positions, pos (B, n) -> two of (B, n, 1, hs) float32. Half-split:
    dimension i turns with i + hs/2, so the first half of the sines is negated. They are computed in
    every forward, once for all layers: no table to store, to move to a device or to outgrow."""
    i = torch.arange(0, head_dim, 2, device=pos.device, dtype=torch.float32)
    angles = pos[..., None, None].float() * theta ** -(i / head_dim)              # (B, n, 1, hs/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

def rotate(x, cos, sin):
    """Rotary positions: x (B, n, heads, hs), cos and sin (B, n, 1, hs)."""
    y = at_least_float32(x)  # rope_full_precision of LLaDA
    half_turned = y.roll(y.shape[-1] // 2, dims=-1)
    return torch.addcmul(y * cos, half_turned, sin).to(x.dtype)                # (B, n, heads, hs)

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.n_kv_head != config.n_head
        kv_width = config.n_kv_head * config.head_dim
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=config.qkv_bias)
        self.k = nn.Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.o = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos_sin, mask, store, rows=None):
        """x (B, n, C) gives keys and values; the queries are those of rows (B, m), None: of all.
        store(k, v) writes (B, n, nkv, hs) to the cache -> all that is attended (B, T, nkv, hs)."""
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q, self.k, self.v))
        # keys are cached after the rotation: a position never moves
        q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)                        # (B, n, heads, hs)
        if rows is not None:
            q = q.take_along_dim(rows[..., None, None], 1)                     # (B, m, nh, hs)
            if mask is not None and mask.shape[2] > 1:  # causal: a mask for each query
                mask = mask.take_along_dim(rows[:, None, :, None], 2)          # (B, 1, m, T)
        q, k, v = (t.transpose(1, 2) for t in (q, *store(k, v)))               # (B, heads, ., hs)
        if self.written_out_is_faster(q, k):
            score = q @ k.transpose(2, 3) * self.head_dim ** -0.5              # (B, nh, m, T)
            if mask is not None:
                score = score.masked_fill(~mask, -torch.inf)
            y = score.softmax(-1).to(v.dtype) @ v                              # (B, nh, m, hs)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.grouped)
        return self.o(y.transpose(1, 2).flatten(2))                            # (B, m, C)

    def written_out_is_faster(self, q, k):
        """Training in bfloat16 on a CPU: forward and backward take half the time of the kernel."""
        return (q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu"
                and not self.grouped and k.shape[2] <= 512)

class MLP(nn.Module):
    """SwiGLU."""
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.down = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))                    # (B, n, C)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos_sin, mask, store, rows=None):
        y = self.attn(self.attn_norm(x), cos_sin, mask, store, rows)
        # every position gives keys and values, but only these rows go through the rest
        x = y + (x if rows is None else x.take_along_dim(rows[..., None], 1))
        return x + self.mlp(self.mlp_norm(x))

class DiffusionLM(nn.Module):
    """The masked diffusion transformer. `extra` is a dict of plain values that travels with a
    checkpoint; checkpoint.EXTRA lists them."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.extra = {}
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if name.endswith(("o.weight", "down.weight")):  # GPT-2's scaling of the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif name.endswith(".bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, pos=None, cache=None, rows=None, pad=None, seen=None):
        """Runs the given positions and returns logits.

        tokens (B, n) int64     ids of the active positions
        pos    (B, n) int64     their places in the sequence; None means 0..n-1
        cache  KVCache | None   K/V of all T positions: written at pos, attended over whole;
                                None: attend to these n alone
        rows   (B, m) int64     which of the n rows need logits; None means all
        pad    (B,) int64       left padding of each row: never attended, and rotary positions count
                                from its end, so that a padded row computes what it would alone
        seen   (B, T) bool      the positions that are attended; None means all
        -> (B, m, V), in the dtype of the weights
        """
        B, n = tokens.shape
        assert pos is None or pos.shape == (B, n), f"pos: got {pos.shape}, expected {(B, n)}"
        assert rows is None or len(rows) == B, f"rows: got {rows.shape}, expected ({B}, m)"
        # who is where, and who is attended
        device, mask = tokens.device, None
        where = torch.arange(n, device=device)[None] if pos is None else pos   # (B or 1, n)
        keys = where if cache is None else torch.arange(cache.T, device=device)[None]
        if self.config.causal:
            mask = keys[:, None] <= where[..., None]                           # (B or 1, n, T)
        if pad is not None:
            first = pad[:, None, None]
            if self.config.causal:  # padding attends to itself: a row of no keys would be NaN
                first = first.minimum(where[..., None])                        # (B, n, 1)
            real = keys[:, None] >= first                                      # (B, 1 or n, T)
            mask = real if mask is None else mask & real
            where = (where - pad[:, None]).clamp(min=0)                        # (B, n)
        if seen is not None:
            mask = seen[:, None] if mask is None else mask & seen[:, None]
        mask = mask if mask is None else mask[:, None]                         # (B, 1, 1 or n, T)
        cos_sin = rope(where, self.config.head_dim, self.config.rope_theta)    # (B or 1, n, 1, hs)
        x = self.wte(tokens)                                                   # (B, n, C)
        for i, block in enumerate(self.blocks):
            store = partial(cache.update, i, pos) if cache is not None else lambda k, v: (k, v)
            # after the last layer nobody attends: only rows that need logits go through it
            last = i == len(self.blocks) - 1
            x = block(x, cos_sin, mask, store, rows if last else None)
        return self.head(self.norm(x))                                         # (B, m, V)

# --------------------------------------------------------------------------------------------------
# the loss

def diffusion_noise(frozen, eps=1e-3, generator=None):
    """Draws the masks of one training step: per row t is uniform in (0, 1], and each token is
    masked with p = (1-eps)t + eps (LLaDA, arXiv 2502.09992, section 2; its GUIDELINES.md).

    frozen (B, T) bool: positions that are never masked, the prompt and the padding.
    -> masked (B, T) bool, weight (B, T) float32: 1/p over the number of the row's free positions
    """
    B, T = frozen.shape
    t = 1 - torch.rand(B, 1, device=frozen.device, generator=generator)
    p = (1 - eps) * t + eps
    masked = (torch.rand(B, T, device=frozen.device, generator=generator) < p) & ~frozen
    free = (~frozen).sum(1, keepdim=True).clamp(min=1)  # length of the answer, EOS padding counted
    return masked, (1 / (p * free)).expand(B, T)

def diffusion_loss(model, tokens, masked, weight, pad=None):
    """Cross entropy of the masked tokens, each times its weight, summed over a row and averaged
    over the rows. With masks and weights of diffusion_noise it is LLaDA's bound on the negative
    log likelihood, in nats per free token.
    tokens (B, T) int64, masked (B, T) bool, weight (B, T) float32, pad (B,) -> () float32"""
    weight = weight * masked
    # logits only where they count: the masked positions of each row first, as many as the most
    counts = weight > 0
    rows = counts.byte().argsort(dim=1, descending=True, stable=True)[:, :counts.sum(1).max()]
    logits = model(tokens.masked_fill(masked, model.config.mask_id), rows=rows, pad=pad)
    targets = tokens.gather(1, rows)                                           # (B, m)
    ce = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (ce.view_as(rows) * weight.gather(1, rows)).sum() / len(tokens)

def every_token(frozen):
    """The counterpart of diffusion_noise for causal_loss: all free positions, each counts alike."""
    return ~frozen, 1 / (~frozen).sum(1, keepdim=True).clamp(min=1).expand(frozen.shape)

def causal_loss(model, tokens, masked, weight, pad=None):
    """diffusion_loss of a causal model: each token at `masked` is predicted from those before it,
    and nothing is masked in the input -> () float32"""
    logits = model(tokens[:, :-1], pad=pad)                                    # (B, T - 1, V)
    ce = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (ce.view_as(tokens[:, 1:]) * (weight * masked)[:, 1:]).sum() / len(tokens)

# --------------------------------------------------------------------------------------------------
# one file with config, weights, tokenizer and extra: nothing else is needed to sample

def stored(model):
    """-> {name: tensor} of a file: a tied head is the embedding, and is stored once."""
    return {name: p for name, p in model.state_dict().items()
            if name != "head.weight" or not model.config.tied}

def save(path, model, tokenizer=None):
    """Writes a checkpoint, atomically; weights keep their dtype. Raises ValueError if it cannot."""
    weights = {name: p.detach().cpu() for name, p in stored(model).items()}
    data = {"format": checkpoint.FORMAT, "config": dataclasses.asdict(model.config),
            "weights": weights, "tokenizer": tokenizer.state() if tokenizer else None,
            "extra": model.extra}
    with checkpoint.atomic_write(path) as f:
        torch.save(data, f)

def load(path, device="cpu", dtype=None):
    """-> (model in eval mode, tokenizer or None). dtype: None for that of the file, a torch.dtype,
    or "auto" (fast_cpu.pick_dtype). Weights are mapped from disk, not copied, as long as device and
    dtype allow. No code of the file is run. On a CPU the linear layers are packed (fast_cpu.pack).
    Raises ValueError, one sentence, for a file that is missing, damaged or not ours."""
    data = checkpoint.read_checkpoint(path)
    try:
        config = Config(**data["config"])
        fault, weights = config.fault(), data["weights"]
        if fault or config.n_layer > len(weights):  # before a model of a billion layers is made
            raise ValueError(fault or f"n_layer {config.n_layer} is more than the weights have")
        with torch.device("meta"):  # shapes only; the weights come from the file
            model = DiffusionLM(config)
        checkpoint.check_weights(weights, stored(model))
        model.load_state_dict(weights, assign=True, strict=not config.tied)
        if config.tied:
            model.head.weight = model.wte.weight
        model.extra = checkpoint.check_extra(data["extra"])
        tokenizer = Tokenizer.from_state(data["tokenizer"]) if data["tokenizer"] else None
    except Exception as e:  # whatever somebody else's file brings about here
        reason = checkpoint.first_line(e)
        raise ValueError(f"{path} does not fit together: {reason}") from None
    model.requires_grad_(False).eval()
    if dtype == "auto":
        parameters = sum(p.numel() for p in model.parameters())
        dtype = fast_cpu.pick_dtype(parameters, model.wte.weight.dtype, torch.device(device).type)
    return fast_cpu.pack(model.to(device=device, dtype=dtype)), tokenizer
