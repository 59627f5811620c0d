"""Files that appear whole or not at all; and other people's files, read without running code."""
import contextlib
import dataclasses
import os
import pickle
import pickletools
import reprlib
import zipfile

import torch

FORMAT = "dkv-min 1"
# what a checkpoint may hold for sample.py: defaults, the text around a prompt, prompts to show, or
# problems to solve
EXTRA = {"gen_length": int, "block_length": int, "known_order": str, "schedule": str,
         "remasking": str, "template": str, "chat": str, "prompts": list, "problems": list}

def first_line(e):
    """The reason of an exception in a few words. torch wraps a full disk in an error of its own:
    the OSError that came before it says more."""
    cause = e
    while cause and not getattr(cause, "strerror", None):
        cause = cause.__context__
    return cause.strerror if cause else (str(e).strip() or type(e).__name__).splitlines()[0]

@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """with atomic_write(path) as f: what is written to f replaces path when all of it is on the
    disk. If anything fails, path stays as it was. Raises ValueError if path cannot be written."""
    temp = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temp, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    except (OSError, RuntimeError) as e:
        raise ValueError(f"cannot write {path}: {first_line(e)}") from None
    finally:
        if os.path.exists(temp):
            os.remove(temp)

# the names that a checkpoint's pickle may use. torch's own unpickler runs no code either, but
# would call bytearray(2**40)
KINDS = "Float Double Half BFloat16 Long Int Short Char Byte Bool"
NAMES = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict",
         *(f"torch {kind}Storage" for kind in KINDS.split())}

def check_zip(path):
    """Raises ValueError or UnpicklingError for a file that torch.save does not write: looks at the
    zip's directory before it reads a record, and at the pickle before anything is unpickled."""
    with zipfile.ZipFile(path) as z:
        records = z.infolist()
        pickles = [r for r in records if r.filename.lower().endswith(".pkl")]
        if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size
               for r in records):
            raise ValueError("it has compressed records, which torch never writes")
        if sum(r.file_size for r in records) > os.path.getsize(path):
            raise ValueError("its records claim to be larger than the file")
        if sum(r.file_size for r in pickles) > 2**23:
            raise ValueError("its index is larger than 8 MiB")
        ops = (op for r in pickles for op in pickletools.genops(z.read(r)))
        for n, (op, arg, _) in enumerate(ops):
            if n == 500_000:
                raise ValueError("its index has more than 500,000 entries")
            if op.proto > 2 or op.name == "PROTO" and arg != 2:
                raise pickle.UnpicklingError
            if op.name == "GLOBAL" and arg not in NAMES:
                raise pickle.UnpicklingError

def read(path):
    """torch.load without its dangers -> what was saved, tensors mapped from the disk. Runs no code
    from the file. Raises ValueError for a file that torch.save did not write."""
    path = os.fspath(path)
    if os.path.isdir(path) and os.path.exists(os.path.join(path, "config.json")):
        raise ValueError(f"{path} is a folder of the Hugging Face kind: convert it with "
                         f"python scripts/convert.py {path} --out FILE, and give FILE")
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is a directory or a device")
        check_zip(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is truncated, or is not a checkpoint") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is not a checkpoint of dkv-min: it holds more than tensors and "
                         "plain values") from None
    except Exception as e:  # a damaged pickle can raise anything
        reason = first_line(e).split(". This ")[0]
        raise ValueError(f"cannot load {path}: {reason}") from None

def read_checkpoint(path):
    """-> the dict that model.save wrote, its parts not yet checked. Raises ValueError."""
    data = read(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        hint = ""
        if str(path).endswith(".train"):
            hint = f": it is what --resume needs, and the model is {str(path)[:-len('.train')]}"
        raise ValueError(f"{path} is not a checkpoint of dkv-min ({FORMAT}){hint}")
    return data

def config_fault(config):
    """What is wrong with a model's Config, in words, or None."""
    c = config
    for f in dataclasses.fields(c):
        v, is_id = getattr(c, f.name), f.name.endswith("_id")
        if v is None and f.name in ("eos_id", "eot_id"):
            continue
        kind = {float: (int, float), bool: bool}.get(f.type, int)
        if not isinstance(v, kind) or (isinstance(v, bool) and kind is not bool):
            return f"{f.name} has the wrong type: {reprlib.repr(v):.60}"  # a value may be endless
        low = 0 if is_id or kind is bool else 1e-12 if isinstance(v, float) else 1
        if not low <= v < 2**31:
            return f"{f.name} is out of range: {v!r}"
        if is_id and v >= c.vocab_size:
            return f"{f.name} {v} is not below vocab_size {c.vocab_size}"
    if c.n_embd % c.n_head or c.head_dim % 2:
        return f"n_embd {c.n_embd} does not split into {c.n_head} heads of even size"
    if c.n_head % c.n_kv_head:
        return f"n_head {c.n_head} is not a multiple of n_kv_head {c.n_kv_head}"
    if c.causal and not c.shift:
        return "causal needs shift: a position cannot attend to the token that it predicts"
    if c.n_vocab > c.vocab_size:
        return f"n_vocab {c.n_vocab} is above vocab_size {c.vocab_size}"
    for end in (c.eos_id, c.eot_id):
        if end is not None and (end >= c.n_vocab or end == c.mask_id):
            return (f"eos_id and eot_id have to be ids below n_vocab {c.n_vocab} other than the "
                    f"mask's: {end}")
    if c.n_vocab <= (c.mask_id < c.n_vocab) + (c.eos_id is not None):
        return f"n_vocab {c.n_vocab} leaves no id to write beside the mask's and the end's"
    return None

def check_weights(weights, expected):
    """weights {name: tensor} of a file, expected {name: tensor} of the network."""
    stored = weights["wte.weight"].dtype
    if odd := set(weights) ^ set(expected):
        side = "missing" if set(expected) - set(weights) else "unexpected"
        raise ValueError(f"{min(odd)} is {side}")
    if stored not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"the weights are {stored}, expected floats of 16, 32 or 64 bits")
    for name, p in expected.items():
        w = weights[name]
        if w.shape != p.shape or w.dtype != stored or not w.is_contiguous():
            raise ValueError(f"{name} is {tuple(w.shape)} {w.dtype}, "
                             f"expected {tuple(p.shape)} {stored}")

def check_extra(extra):
    """-> extra as a dict."""
    extra = dict(extra)
    for name, kind in EXTRA.items():
        if name in extra and not (isinstance(extra[name], kind) and extra[name]):
            value = reprlib.repr(extra[name])
            raise ValueError(f"extra {name} is {value:.60}, expected {kind.__name__}")
    texts = [*extra.get("prompts", [])]
    for question, answer in extra.get("problems", []):
        texts += [question, answer]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("extra prompts and problems have to be texts and pairs of texts")
    return extra
