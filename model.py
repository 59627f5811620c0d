"""A masked diffusion language model in one file, from the leaves to the root: config, norm, rotary positions, attention,
MLP, block, model; then the loss it is trained with, the checkpoint file, and the tokenizer that travels inside it.

The network is LLaDA's (arXiv 2502.09992): a Llama-style transformer without the causal mask. Every position sees every
other one, and the logits at a position predict the token at that position (no shift). One thing is unusual, and all of
dkv_min.py rests on it: forward() runs only the positions it is given, and finds the keys and values of all others in a cache.

Letters in shapes: B rows, T positions in all, n positions run now, m positions that need logits, C width (n_embd),
nh heads, nkv key/value heads, hs head size, V rows of the embedding (vocab_size).
"""
import base64
import contextlib
import dataclasses
import math
import os
import pickle
import pickletools
import reprlib
import unicodedata
import zipfile
from dataclasses import dataclass
from functools import partial

import regex  # comes with tiktoken
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# the network

@dataclass
class Config:
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4           # fewer than n_head: grouped-query attention
    n_embd: int = 256
    n_ff: int = 688              # hidden width of the MLP
    vocab_size: int = 1024       # rows of the embedding and of the head
    n_vocab: int = 1024          # ids below this may be emitted (the mask never is); the rest are rows without a token
    max_len: int = 256           # prompt and generated tokens together
    mask_id: int = 0
    eos_id: int | None = None    # ends a text, and fills the rest of the answer
    eot_id: int | None = None    # ends a turn of a chat; many models have none
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    def fault(self):
        """What is wrong with these numbers, in words, or None. A config may come from somebody else's file."""
        for f in dataclasses.fields(self):
            v = getattr(self, f.name)
            if v is None and f.name in ("eos_id", "eot_id"):
                continue
            kind = (int, float) if f.type is float else f.type if isinstance(f.type, type) else int
            if not isinstance(v, kind) or (isinstance(v, bool) and f.type is not bool):
                return f"{f.name} has the wrong type: {reprlib.repr(v):.60}"  # what a file holds may be endless
            low = 0 if f.name.endswith("_id") or f.name == "qkv_bias" else 1e-12 if isinstance(v, float) else 1
            if not low <= v < 2**31:
                return f"{f.name} is out of range: {v!r}"
            if f.name.endswith("_id") and v >= self.vocab_size:
                return f"{f.name} {v} is not below vocab_size {self.vocab_size}"
        if self.n_embd % self.n_head or self.head_dim % 2:
            return f"n_embd {self.n_embd} does not split into {self.n_head} heads of even size"
        if self.n_head % self.n_kv_head:
            return f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}"
        if self.n_vocab > self.vocab_size:
            return f"n_vocab {self.n_vocab} is above vocab_size {self.vocab_size}"
        for end in (self.eos_id, self.eot_id):
            if end is not None and (end >= self.n_vocab or end == self.mask_id):
                return f"eos_id and eot_id have to be ids below n_vocab {self.n_vocab} other than the mask's: {end}"
        if self.n_vocab <= (self.mask_id < self.n_vocab) + (self.eos_id is not None):
            return f"n_vocab {self.n_vocab} leaves no id to write beside the mask's and the end's"
        return None


# LLaDA-8B is this setting: 8,015,581,184 parameters. Ids from 126349 on are rows of the embedding without a token.
LLADA_8B = Config(n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, n_ff=12288, vocab_size=126464, n_vocab=126349,
                  max_len=4096, mask_id=126336, eos_id=126081, eot_id=126348, rope_theta=500000.0, norm_eps=1e-5)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gather_rows(x, rows):
    """Picks positions: x (B, n, d), rows (B, m) -> (B, m, d)."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def fill_eight(x):
    """x (B, n) -> (B, n rounded up to a multiple of 8), the last column repeated."""
    return torch.cat([x, x[:, -1:].expand(-1, -x.shape[1] % 8)], 1)


class Linear(nn.Linear):
    blocks = None  # while packed() holds: the matrix as oneDNN lays it out for itself, and the bias


def linear(x, *layers):
    """x (..., in) through each of the layers -> [(..., out)]. Packed, they are one product."""
    if layers[0].blocks is None:
        return [layer(x) for layer in layers]
    return torch.ops.mkldnn._linear_pointwise(x, *layers[0].blocks, "none", [], None).split([layer.out_features for layer in layers], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x):
        return self.weight * F.rms_norm(at_least_float32(x), x.shape[-1:], eps=self.eps).to(x.dtype)


def rope(pos, head_dim, theta):
    """Cosines and sines of the given positions, pos (B, n) -> two of (B, n, hs) float32. Half-split layout: dimension i turns
    with i + hs/2, so the first half of the sines is negated. Computed afresh in every forward (once, not once a layer): there
    is no table to store, to move to a device or to outgrow."""
    inv_freq = theta ** -(torch.arange(0, head_dim, 2, device=pos.device, dtype=torch.float32) / head_dim)
    angles = pos[..., None].float() * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Rotary positions: x (B, n, heads, hs), cos and sin (B, n, hs) as rope() gives them."""
    y = at_least_float32(x)
    return torch.addcmul(y * cos[:, :, None], y.roll(y.shape[-1] // 2, dims=-1), sin[:, :, None]).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        kv_width = config.n_kv_head * config.head_dim
        self.q = Linear(config.n_embd, config.n_embd, bias=config.qkv_bias)
        self.k = Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.v = Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.o = Linear(config.n_embd, config.n_embd, bias=False)
        self.grouped = config.n_kv_head != config.n_head

    def forward(self, x, cos_sin, mask, store, rows=None):
        """x (B, n, C) gives keys and values; the queries are those of rows (B, m), None: of all. store puts K, V
        (B, n, nkv, hs) into the cache and returns all that is attended (B, T, nkv, hs). Never causal."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in linear(x, self.q, self.k, self.v))  # (B, n, heads, hs)
        q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        if rows is not None:
            q = gather_rows(q.flatten(2), rows).unflatten(-1, (-1, self.head_dim))                  # (B, m, nh, hs)
        q, k, v = (t.transpose(1, 2) for t in (q, *store(k, v)))                                    # (B, heads, positions, hs)
        if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu" and not self.grouped and k.shape[2] <= 512:
            # training on a CPU: written out, there and back takes less than half the time of torch's kernel (bench.py --train)
            score = q @ k.transpose(2, 3) * self.head_dim ** -0.5                                   # (B, nh, m, T)
            y = (score if mask is None else score.masked_fill(~mask, -torch.inf)).softmax(-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.grouped)    # (B, nh, m, hs)
        return linear(y.transpose(1, 2).flatten(2), self.o)[0]


class MLP(nn.Module):
    """SwiGLU."""
    def __init__(self, config):
        super().__init__()
        self.gate = Linear(config.n_embd, config.n_ff, bias=False)
        self.up = Linear(config.n_embd, config.n_ff, bias=False)
        self.down = Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = linear(x, self.gate, self.up)
        return linear(F.silu(gate) * up, self.down)[0]


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos_sin, mask, store, rows=None):
        y = self.attn(self.attn_norm(x), cos_sin, mask, store, rows)
        x = y + (x if rows is None else gather_rows(x, rows))  # every position gives keys and values, but only these rows go on
        return x + self.mlp(self.mlp_norm(x))


# What a checkpoint may tell sample.py besides: defaults, what stands around a prompt, prompts to show or problems to solve.
EXTRA = {"gen_length": int, "block_length": int, "known_order": str, "template": str, "chat": str, "prompts": list, "problems": list}


class DiffusionLM(nn.Module):
    """The masked diffusion transformer. `extra` is a dict of plain values that travels with a checkpoint (EXTRA)."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.extra = {}
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith(("o.weight", "down.weight")):  # GPT-2's scaling of what is added to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif name.endswith(".bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, pos=None, cache=None, rows=None, pad=None):
        """Runs the given positions and returns logits.

        tokens (B, n) int64     ids of the active positions
        pos    (B, n) int64     where they stand in the sequence; None means 0..n-1
        cache  KVCache | None   K/V of all T positions: written at pos, attended over whole; None: attend to these n alone
        rows   (B, m) int64     which of the n rows need logits; None means all
        pad    (B,) int64       left padding of each row: its first pad positions are never attended, and rotary
                                positions count from behind them, so that a padded row computes what it would alone
        -> (B, m, V), in the dtype of the weights
        """
        B, n, m = *tokens.shape, None if rows is None else rows.shape[1]
        assert pos is None or pos.shape == (B, n), f"pos: got {tuple(pos.shape)}, expected {(B, n)}"
        assert rows is None or rows.shape[0] == B, f"rows: got {tuple(rows.shape)}, expected ({B}, m)"
        if self.head.blocks is not None:  # oneDNN makes a kernel, in half a millisecond, for every number of rows that is new to it
            rows = rows if rows is None else fill_eight(rows)
            if cache is not None and pos is not None:  # running a position twice changes nothing
                tokens, pos = fill_eight(tokens), fill_eight(pos)
        where = torch.arange(n, device=tokens.device)[None] if pos is None else pos                 # (B or 1, n)
        mask = None
        if pad is not None:
            keys = where if cache is None else torch.arange(cache.T, device=tokens.device)[None]    # what is attended
            mask = (keys >= pad[:, None])[:, None, None, :]                                         # (B, 1, 1, T)
            where = (where - pad[:, None]).clamp(min=0)
        cos_sin = [r.expand(B, -1, -1) for r in rope(where, self.config.head_dim, self.config.rope_theta)]  # (B, n, hs) each
        x = self.wte(tokens)                                                                        # (B, n, C)
        for i, block in enumerate(self.blocks):
            store = partial(cache.update, i, pos) if cache is not None else lambda k, v: (k, v)
            # after the last layer nobody attends: only the rows that need logits have to get through it
            x = block(x, cos_sin, mask, store, rows if i == len(self.blocks) - 1 else None)
        return linear(self.norm(x), self.head)[0][:, :m]                                            # (B, m, V)


@contextlib.contextmanager
def packed(model):
    """While it holds, a CPU multiplies by copies of the matrices that are packed for oneDNN, and by those of the same input
    at once: a few rows, which are all that a cache leaves to run, take half the time or less (README, "Speed").
    Nothing is packed elsewhere, nor if the copies would take more than 4 GB. The weights must not change meanwhile."""
    groups = []
    for m in getattr(model, "modules", list)():  # a stand-in for a model may have none
        if isinstance(m, Attention):
            groups += [(m.q, m.k, m.v), (m.o,)]
        elif isinstance(m, MLP):
            groups += [(m.gate, m.up), (m.down,)]
        elif isinstance(m, DiffusionLM):
            groups += [(m.head,)]
    weights = [layer.weight for group in groups for layer in group]
    fit = all(w.device.type == "cpu" and w.dtype in (torch.float32, torch.bfloat16) for w in weights) and sum(w.nbytes for w in weights) < 2**32
    groups = [group for group in groups if fit and group[0].blocks is None and torch.backends.mkldnn.is_available()]
    try:
        for group in groups:
            w, b = (torch.cat([getattr(layer, name) for layer in group]) if getattr(group[0], name) is not None else None for name in ("weight", "bias"))
            group[0].blocks = torch.ops.mkldnn._reorder_linear_weight(w), b
        yield
    finally:
        for group in groups:
            group[0].blocks = None

# ---------------------------------------------------------------------------------------------------------------------
# the loss

def diffusion_noise(frozen, eps=1e-3, generator=None):
    """Draws the masks of one training step: per row t is uniform in (0, 1], each token is masked with p = (1-eps)t + eps
    (LLaDA, arXiv 2502.09992, section 2; its GUIDELINES.md).

    frozen (B, T) bool: positions that are never masked, the prompt and the padding. None frozen is the pretraining form.
    -> masked (B, T) bool, weight (B, T) float32: 1/p over the number of the row's free positions
    """
    B, T = frozen.shape
    t = 1 - torch.rand(B, 1, device=frozen.device, generator=generator)
    p = (1 - eps) * t + eps
    masked = (torch.rand(B, T, device=frozen.device, generator=generator) < p) & ~frozen
    free = (~frozen).sum(1, keepdim=True).clamp(min=1)  # the length of the answer, EOS padding counted
    return masked, (1 / (p * free)).expand(B, T)


def diffusion_loss(model, tokens, masked, weight, pad=None):
    """Cross entropy of the masked tokens, each times its weight, summed over a row and averaged over the rows. With masks
    and weights of diffusion_noise it is LLaDA's bound on the negative log likelihood, in nats per free token.
    tokens (B, T) int64, masked (B, T) bool, weight (B, T) float32, pad (B,) as in forward -> () float32."""
    weight = weight * masked
    rows = (weight > 0).byte().argsort(dim=1, descending=True, stable=True)[:, :(weight > 0).sum(1).max()]  # logits only where they count
    logits = model(tokens.masked_fill(masked, model.config.mask_id), rows=rows, pad=pad)               # (B, m, V)
    ce = F.cross_entropy(logits.float().flatten(0, 1), tokens.gather(1, rows).flatten(), reduction="none").view_as(rows)
    return (ce * weight.gather(1, rows)).sum() / len(tokens)

# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer

class Tokenizer:
    """Byte-level BPE by tiktoken, built from what lies in the checkpoint; nothing is ever downloaded.

    ranks    {bytes: id} of what text is cut into, in the order of the merges
    pattern  the regex that cuts text into pieces first
    special  {text: id} of the tokens that no text spells (mask, end of text, ...)
    unmerged {bytes: id} of tokens that no merge makes: decoded, but never encoded to
    nfc      text is brought into Unicode's form NFC first (Qwen2 does)
    prefix_space  text that does not begin with a space gets one (some of GPT-2's kin do)
    """
    def __init__(self, ranks, pattern, special, unmerged=None, nfc=False, prefix_space=False):
        unmerged = unmerged or {}
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        ids = [*ranks.values(), *special.values(), *unmerged.values()]
        if missing or len(set(ids)) < len(ids):
            raise ValueError(f"the tokenizer lacks the single bytes {missing[:4]}" if missing else "two tokens of the tokenizer share an id")
        if min(ids) < 0:
            raise ValueError(f"the tokenizer has the id {min(ids)}")
        if regex.match(pattern, ""):
            raise ValueError("the tokenizer's pattern matches the empty text")
        self.ranks, self.pattern, self.special, self.unmerged, self.nfc, self.prefix_space = ranks, pattern, special, unmerged, nfc, prefix_space
        # tiktoken takes one number for a token's id and for its place in the order of the merges: it gets the place
        self.encoding = tiktoken.Encoding("dkv-min", pat_str=pattern, mergeable_ranks={b: i for i, b in enumerate(ranks)}, special_tokens={})
        self.ids = list(ranks.values())
        self.bytes = {i: b for part in (ranks, unmerged) for b, i in part.items()} | {i: s.encode() for s, i in special.items()}
        self.any_special = regex.compile("(" + "|".join(regex.escape(s) for s in sorted(special, key=len, reverse=True)) + ")")  # the longest first

    def encode(self, text, special=False):
        """str -> list of ids. Text that spells a special token is text, unless `special` is set."""
        ids = []
        for i, piece in enumerate(self.any_special.split(text) if special and self.special else [text]):
            if i % 2:
                ids.append(self.special[piece])
                continue
            if self.nfc:
                piece = unicodedata.normalize("NFC", piece)
            if self.prefix_space and piece and piece[0] != " ":
                piece = " " + piece
            try:
                ids += [self.ids[i] for i in self.encoding.encode_ordinary(piece)]
            except BaseException as e:  # a panic of tiktoken's Rust is no Exception
                if type(e).__name__ != "PanicException":
                    raise
                raise ValueError(f"the tokenizer's pattern gives up on this text: {first_line(e)}") from None
        return ids

    def decode(self, ids):
        """Ids -> str. Never raises: unknown ids give nothing, bytes that are no UTF-8 give U+FFFD."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")

    def state(self):
        """What a checkpoint keeps: plain strings and ints. Ranks are lines of `base64 id`, as in tiktoken's own files."""
        ranks, unmerged = ("".join(f"{base64.b64encode(b).decode()} {i}\n" for b, i in part.items()) for part in (self.ranks, self.unmerged))
        return {"ranks": ranks, "pattern": self.pattern, "special": self.special, "unmerged": unmerged, "nfc": self.nfc, "prefix_space": self.prefix_space}

    @classmethod
    def from_state(cls, state):
        ranks, unmerged = ({base64.b64decode(b): int(i) for b, i in map(str.split, part.splitlines())} for part in (state["ranks"], state.get("unmerged", "")))
        return cls(ranks, state["pattern"], dict(state["special"]), unmerged, bool(state.get("nfc")), bool(state.get("prefix_space")))

# ---------------------------------------------------------------------------------------------------------------------
# the checkpoint: one file with config, weights, tokenizer and extra, so that nothing else is needed to sample

def first_line(e):
    return getattr(e, "strerror", None) or (str(e).strip() or type(e).__name__).splitlines()[0]


def save_file(path, data):
    """torch.save, but the file appears whole or not at all: written beside the target, then renamed over it."""
    temp = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temp, "wb") as f:
            torch.save(data, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    except (OSError, RuntimeError) as e:  # torch wraps a full disk in a RuntimeError
        raise ValueError(f"cannot write {path}: {first_line(e)}") from None
    finally:
        if os.path.exists(temp):
            os.remove(temp)


# what an index may name: torch's own unpickler runs no code either, but would call bytearray(2**40)
NAMES = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict", *(f"torch {kind}Storage" for kind in "Float Double Half BFloat16 Long Int Short Char Byte Bool".split())}


def load_file(path):
    """torch.load without its dangers: runs no code from the file, maps the tensors from disk, and looks at the zip's
    directory before it reads a record, and at the index before it is unpickled. -> what was saved. Anything that is no
    such file: ValueError."""
    try:
        size = os.path.getsize(path)
        if not os.path.isfile(path):
            raise ValueError("it is a directory or a device")
        with zipfile.ZipFile(path) as z:
            records = z.infolist()
            indexes = [r for r in records if r.filename.lower().endswith(".pkl")]
            if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
                raise ValueError("it has compressed records, which torch never writes")
            if sum(r.file_size for r in records) > size:
                raise ValueError("its records claim to be larger than the file")
            if sum(r.file_size for r in indexes) > 2**23:
                raise ValueError("its index is larger than 8 MiB")
            for n, (op, arg, _) in enumerate(op for r in indexes for op in pickletools.genops(z.read(r))):
                if n == 500_000:
                    raise ValueError("its index has more than 500,000 entries")
                if op.proto > 2 or op.name == "PROTO" and arg != 2 or op.name == "GLOBAL" and arg not in NAMES:
                    raise pickle.UnpicklingError
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is truncated, or is no checkpoint") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is no checkpoint of ours: it holds more than tensors and plain values") from None
    except Exception as e:  # a damaged pickle can raise anything
        raise ValueError(f"cannot load {path}: {first_line(e).split('. This ')[0]}") from None


def save(path, model, tokenizer=None):
    """Writes the checkpoint at once and whole; weights keep their dtype. Raises ValueError if it cannot."""
    weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
    save_file(path, {"format": "dkv-min 1", "config": dataclasses.asdict(model.config), "weights": weights,
                     "tokenizer": tokenizer.state() if tokenizer else None, "extra": model.extra})


def load(path, device="cpu", dtype=None):
    """-> (model, tokenizer): the model in eval mode, in the stored dtype unless one is given; the tokenizer None where the
    file has none. Weights are mapped from disk, not copied, as long as device and dtype allow.
    A file that is missing, truncated, foreign or does not fit together: ValueError, one sentence."""
    data = load_file(path)
    if not isinstance(data, dict) or data.get("format") != "dkv-min 1":
        raise ValueError(f"{path} is no checkpoint of dkv-min (format 1)")
    try:
        config = Config(**data["config"])
        if fault := config.fault():
            raise ValueError(fault)
        weights = data["weights"]
        if config.n_layer > len(weights):
            raise ValueError(f"n_layer is {config.n_layer}, and there are {len(weights)} weights in all")
        with torch.device("meta"):
            model = DiffusionLM(config)
        expected, stored = model.state_dict(), weights["wte.weight"].dtype
        if set(weights) != set(expected):
            raise ValueError(f"{min(set(weights) ^ set(expected))} is {'missing' if set(expected) - set(weights) else 'unexpected'}")
        if stored not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"the weights are {stored}, expected floats of 16, 32 or 64 bits")
        for name, p in expected.items():
            w = weights[name]
            if w.shape != p.shape or w.dtype != stored or not w.is_contiguous():
                raise ValueError(f"{name} is {tuple(w.shape)} {w.dtype}, expected {tuple(p.shape)} {stored}")
        model.load_state_dict(weights, assign=True)
        tokenizer = Tokenizer.from_state(data["tokenizer"]) if data["tokenizer"] else None
        model.extra = dict(data["extra"])
        for name, kind in EXTRA.items():
            if name in model.extra and not (isinstance(model.extra[name], kind) and model.extra[name]):
                raise ValueError(f"extra {name} is {reprlib.repr(model.extra[name]):.60}, expected {kind.__name__}")
        texts = [*model.extra.get("prompts", []), *(text for question, answer in model.extra.get("problems", []) for text in (question, answer))]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("extra prompts and problems have to be texts and pairs of texts")
    except Exception as e:  # whatever somebody else's file brings about here
        raise ValueError(f"{path} does not fit together: {first_line(e)}") from None
    return model.requires_grad_(False).to(device=device, dtype=dtype).eval(), tokenizer
