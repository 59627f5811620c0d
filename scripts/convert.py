"""LLaDA's weights and tokenizer, as Hugging Face has them -> one checkpoint file as model.py loads it.

python scripts/convert.py llada                       fetches GSAI-ML/LLaDA-8B-Instruct, writes checkpoints/llada.pt
python scripts/convert.py llada-base                  GSAI-ML/LLaDA-8B-Base; llada-1.5: GSAI-ML/LLaDA-1.5
python scripts/convert.py DIR --out my.pt             a folder with config.json, *.safetensors and tokenizer.json

Needs safetensors, and to fetch huggingface_hub: python -m pip install -r requirements-llada.txt. Nothing but data is taken
from the repository, no code. The file is laid out first and then filled piece by piece, so 16 GB of weights do not have to
fit into memory; it stands at its place only when all of it was written, and read back.
"""
import argparse
import contextlib
import dataclasses
import errno
import mmap
import os
import re
import shutil
import sys
import time
import zlib

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from model import Config, DiffusionLM, first_line, load, load_file  # noqa: E402
from scripts.hf_tokenizer import from_folder, read_json  # noqa: E402

HUB = {"llada": "GSAI-ML/LLaDA-8B-Instruct", "llada-base": "GSAI-ML/LLaDA-8B-Base", "llada-1.5": "GSAI-ML/LLaDA-1.5"}
INSTALL = "python -m pip install -r requirements-llada.txt"
PIECE = 2**26  # bytes that are in memory at a time

# ---------------------------------------------------------------------------------------------------------------------
# config.json

# what our network does not have: these values or absence
PLAIN = {"model_type": ("llada",), "activation_type": ("silu",), "alibi": (False,), "attention_layer_norm": (False,), "bias_for_layer_norm": (False,), "block_group_size": (1,),
         "block_type": ("llama",), "clip_qkv": (), "include_bias": (False,), "input_emb_norm": (False,), "layer_norm_type": ("rms",), "layer_norm_with_affine": (True,),
         "rope": (True,), "rope_full_precision": (True,), "scale_logits": (False,), "weight_tying": (False,), "tie_word_embeddings": (False,), "rope_scaling": (),
         "sliding_window": (), "qk_norm": (False,), "attention_bias": (False,), "mlp_bias": (False,), "partial_rotary_factor": (1, 1.0)}
USED = dict.fromkeys(["d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size", "embedding_size", "max_sequence_length", "mask_token_id", "eos_token_id"], (int,))
USED |= {"rope_theta": (int, float), "rms_norm_eps": (int, float), "mlp_ratio": (int, float), "include_qkv_bias": (bool,), "multi_query_attention": (bool,)}
# what is about training, initialization, speed, or Hugging Face's own affairs
HARMLESS = {"alibi_bias_max", "architectures", "attention_dropout", "attention_layer_norm_with_affine", "auto_map", "embedding_dropout", "flash_attention", "init_cutoff_factor", "init_device",
            "init_fn", "init_std", "pad_token_id", "precision", "residual_dropout", "transformers_version", "use_cache", "torch_dtype", "dtype", "_name_or_path", "bos_token_id"}


def read_config(path):
    """config.json of a LLaDA -> (Config, sentences about what is not known here). What our network cannot be: ValueError."""
    c = read_json(path)
    if not isinstance(c, dict):
        raise ValueError(f"{path} is no JSON object")
    for name, good in PLAIN.items():
        needed = name in ("model_type", "rope", "activation_type", "layer_norm_type", "block_type")  # absent, they mean something else
        if (needed if c.get(name) is None else c[name] not in good):
            raise ValueError(f"{path}: {name} is {c.get(name)!r:.80}, and this network has only {' or '.join(map(repr, good)) or 'none'}")
    for name, kind in USED.items():
        if c.get(name) is not None and type(c[name]) not in kind:
            raise ValueError(f"{path}: {name} is {c[name]!r:.80}, expected {' or '.join(k.__name__ for k in kind)}")
    notes = [f"{path}: {name} = {c[name]!r:.80} is not known here, and was ignored" for name in sorted(c.keys() - PLAIN.keys() - USED.keys() - HARMLESS) if c[name]]
    missing = [name for name in ("d_model", "n_layers", "n_heads", "vocab_size", "mask_token_id", "max_sequence_length") if c.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]}")
    def value(name, default):
        return default if c.get(name) is None else c[name]

    config = Config(n_layer=c["n_layers"], n_head=c["n_heads"], n_kv_head=value("n_kv_heads", 1 if c.get("multi_query_attention") else c["n_heads"]), n_embd=c["d_model"],
                    n_ff=value("mlp_hidden_size", int(min(value("mlp_ratio", 4), 1e6) * c["d_model"])), vocab_size=value("embedding_size", c["vocab_size"]), n_vocab=c["vocab_size"],
                    max_len=c["max_sequence_length"], mask_id=c["mask_token_id"], eos_id=c.get("eos_token_id"), rope_theta=float(value("rope_theta", 10000.0)), norm_eps=float(value("rms_norm_eps", 1e-5)),
                    qkv_bias=value("include_qkv_bias", False))
    if fault := config.fault():
        raise ValueError(f"{path}: {fault}")
    return config, notes

# ---------------------------------------------------------------------------------------------------------------------
# the tensors: beware, ff_out is the head at the top and the MLP's last matrix in a block

TOP = {"wte": "wte", "ln_f": "norm", "ff_out": "head"}
BLOCK = {"attn_norm": "attn_norm", "q_proj": "attn.q", "k_proj": "attn.k", "v_proj": "attn.v", "attn_out": "attn.o", "ff_norm": "mlp_norm", "ff_proj": "mlp.gate", "up_proj": "mlp.up",
         "ff_out": "mlp.down"}


def their_names(config):
    """-> {their name: our name}, for every parameter of the network."""
    names = {f"model.transformer.{theirs}.weight": f"{ours}.weight" for theirs, ours in TOP.items()}
    for i in range(config.n_layer):
        for theirs, ours in BLOCK.items():
            for kind in ("weight", "bias") if config.qkv_bias and theirs in ("q_proj", "k_proj", "v_proj") else ("weight",):
                names[f"model.transformer.blocks.{i}.{theirs}.{kind}"] = f"blocks.{i}.{ours}.{kind}"
    return names


def find_shards(folder):
    """-> {tensor: path of the file that has it}"""
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        doc = read_json(index)
        files = doc.get("weight_map") if isinstance(doc, dict) else None
        if not isinstance(files, dict) or not all(isinstance(f, str) and os.path.basename(f) == f for f in files.values()):
            raise ValueError(f"{index} is damaged: its weight_map does not name files")
        files = {name: os.path.join(folder, f) for name, f in files.items()}
    else:
        single = os.path.join(folder, "model.safetensors")
        if not os.path.exists(single):
            raise ValueError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
        with opened(single) as f:
            files = dict.fromkeys(f.keys(), single)
    for path in sorted(set(files.values())):
        if not os.path.exists(path):
            raise ValueError(f"the shard {path} is missing: fetch it again")
    return files


@contextlib.contextmanager
def opened(path):
    """A safetensors file; what is wrong with it, in one sentence."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(f"reading the weights needs the package safetensors: {INSTALL}") from None
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except SafetensorError as e:
        raise ValueError(f"{path} is truncated or damaged: {first_line(e)}") from None
    except OSError as e:
        raise ValueError(f"cannot read {path}: {first_line(e)}") from None


DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def look(files, names, config):
    """Holds the headers of the shards against the network: every tensor once, every shape. -> stored dtypes, {their name: dtype}"""
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in DiffusionLM(config).state_dict().items()}
    if odd := sorted(files.keys() ^ names.keys(), key=lambda n: (n in files, n)):
        raise ValueError(f"{len(odd)} tensors do not fit the config: {odd[0]} is {'in the files, and the network has none such' if odd[0] in files else 'missing'}")
    if odd := shapes.keys() ^ set(names.values()):
        raise AssertionError(f"names: got {sorted(odd)} on one side only, expected the same on both")
    dtypes = {}
    for path in sorted(set(files.values())):
        with opened(path) as f:
            held = set(f.keys())
            for name in (n for n in files if files[n] == path):
                if name not in held:
                    raise ValueError(f"{path} does not hold {name}, which the index says is there")
                part = f.get_slice(name)
                if part.get_shape() != shapes[names[name]] or part.get_dtype() not in DTYPES:
                    raise ValueError(f"{path}: {name} is {part.get_shape()} {part.get_dtype()}, expected {shapes[names[name]]} of floats")
                dtypes[name] = DTYPES[part.get_dtype()]
    return dtypes

# ---------------------------------------------------------------------------------------------------------------------
# the file

@contextlib.contextmanager
def only_one(temp, out):
    """The unfinished file is its own lock: a second conversion waits here for the first, and what a killed one has left is
    used up. -> an open file, empty; None if another one has finished `out` meanwhile."""
    import fcntl  # not on Windows
    def seen():
        return (os.stat(out).st_ino, os.stat(out).st_mtime_ns) if os.path.exists(out) else None
    def ours(f):
        return os.path.exists(temp) and os.path.samestat(os.fstat(f.fileno()), os.stat(temp))
    before = waited = None
    while True:
        try:
            f = open(temp, "a+b")
        except OSError as e:
            raise ValueError(f"cannot write {temp}: {e.strerror}") from None
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waited:
                before = seen()
                print(f"another process converts to {out}: waiting for it", file=sys.stderr)
            waited = True
            f.close()
            time.sleep(1)
            continue
        if ours(f):  # else it was renamed or removed meanwhile
            break
        f.close()
    try:
        f.truncate(0)
        yield None if waited and seen() != before else f
    finally:
        if ours(f):  # else it is at its place by now, and what stands here is somebody else's
            os.remove(temp)
        f.close()


def pieces(tensor):
    """Pairs of row numbers, such that a piece is about PIECE bytes."""
    rows = max(1, PIECE // max(1, tensor[0].numel() * tensor.element_size()))
    return [(a, min(a + rows, len(tensor))) for a in range(0, len(tensor), rows)]


def crc(tensor, old):
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), old)


def write(f, temp, data, files, names, bar):
    """Lays the file out, and fills its tensors: data as save() of model.py has it, with empty weights. f is the same file
    as temp, and stays so: torch.save writes into what is there, so the lock holds."""
    with torch.serialization.skip_data():
        torch.save(data, temp)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(f.fileno(), 0, os.path.getsize(temp))  # a disk that is full says so here, and not in the middle
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)  # what is written to a tensor goes to the file
    try:
        weights = load_file(temp)["weights"]
    finally:
        torch.serialization.set_default_mmap_options(mmap.MAP_PRIVATE)
    sums = {}
    for path in sorted(set(files.values())):
        with opened(path) as shard:
            for theirs in (n for n in files if files[n] == path):
                target, source, total = weights[names[theirs]], shard.get_slice(theirs), 0
                for a, b in pieces(target):
                    piece = source[a:b].to(target.dtype)
                    target[a:b] = piece
                    total = crc(piece, total)
                    bar.update(piece.nbytes)
                sums[names[theirs]] = total
    del weights, target
    os.fsync(f.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is read back comes from the disk
    weights = load_file(temp)["weights"]
    bar.set_description("reading back")
    for name, w in weights.items():
        total = 0
        for a, b in pieces(w):
            total = crc(w[a:b], total)
            bar.update(w[a:b].nbytes)
        if total != sums[name]:
            raise ValueError(f"{temp} does not read back as it was written ({name}): the disk may be faulty")


def convert(source, out, dtype=None, name=None):
    """A folder -> the file out. name: one of HUB, if the folder is to be that. Raises ValueError, and leaves what stands at
    out as it is, if anything is wrong."""
    out = os.path.abspath(out)
    if os.path.exists(out):
        if os.path.commonpath([os.path.realpath(out), os.path.realpath(source)]) == os.path.realpath(source) or not os.path.isfile(out):
            raise ValueError(f"--out {out} is a folder, a device or a file of the source: give the name of another file")
        load_file(out)  # anything else than a checkpoint is not written over
    config, notes = read_config(os.path.join(source, "config.json"))
    files = find_shards(source)
    if config.n_layer > len(files):
        raise ValueError(f"{source}: n_layers is {config.n_layer}, and there are {len(files)} tensors in all")
    tokenizer, names = from_folder(source), their_names(config)
    length = min(128, max(1, config.max_len // 2))
    extra = {"gen_length": length, "block_length": 32 if length % 32 == 0 else length}
    if tokenizer:
        top = max(tokenizer.bytes)
        if top >= config.vocab_size:
            raise ValueError(f"{source}: the tokenizer has the id {top}, and the network {config.vocab_size} rows")
        if "<|endoftext|>" in tokenizer.special and tokenizer.special.get("<|mdm_mask|>", config.mask_id) != config.mask_id:
            raise ValueError(f"{source}: mask_token_id is {config.mask_id} in config.json, and <|mdm_mask|> is {tokenizer.special['<|mdm_mask|>']} in the tokenizer")
        config = dataclasses.replace(config, n_vocab=top + 1, eot_id=tokenizer.special.get("<|eot_id|>"))
        headers = HEADERS.keys() & tokenizer.special.keys()
        if config.vocab_size == 126464:
            notes += check_llada(tokenizer, config)
        if len(headers) == len(HEADERS) and "<|startoftext|>" in tokenizer.special:
            extra["chat"] = "llada"
        if fault := config.fault():
            raise ValueError(f"{source}: with the tokenizer's ids, {fault}")
    else:
        notes.append(f"{source} has no tokenizer: the checkpoint works on ids (sample.py --ids 1,2,3)")
    if name in HUB and (tokenizer is None or name != "llada-base" and "chat" not in extra):
        raise ValueError(f"{source} is not {HUB[name]}: it has no {'headers of a chat in its ' if tokenizer else ''}tokenizer")
    dtypes = look(files, names, config)
    dtype = dtype or dtypes["model.transformer.wte.weight"]
    if mixed := set(dtypes.values()) - {dtype}:
        notes.append(f"tensors stored as {', '.join(sorted(str(d)[6:] for d in mixed))} are written as {str(dtype)[6:]}")
    with torch.device("meta"):
        model = DiffusionLM(config)
    weights = {name: torch.empty(p.shape, dtype=dtype) for name, p in model.state_dict().items()}  # memory that is never touched
    size = sum(w.nbytes for w in weights.values())
    print(f"{len(weights)} tensors, {sum(w.numel() for w in weights.values()):,} parameters, {str(dtype)[6:]}, {size / 1e9:.1f} GB -> {out}")
    for note in notes:
        print(f"note: {note}")
    data = {"format": "dkv-min 1", "config": dataclasses.asdict(config), "weights": weights, "tokenizer": tokenizer.state() if tokenizer else None, "extra": extra}
    temp = f"{out}.converting"
    make_folder(out)
    with only_one(temp, out) as f:
        if f is None:
            print(f"{out} was written by the other process")
            return
        room(out, size)
        try:
            with tqdm(total=2 * size, unit="B", unit_scale=True, unit_divisor=1000, desc="writing") as bar:
                write(f, temp, data, files, names, bar)
        except (OSError, RuntimeError) as e:  # torch wraps some of the former in the latter
            full = getattr(e, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
            raise ValueError(f"cannot write {temp}: {first_line(e)}{', so free the space, or give another --out' if full else ''}") from None
        load(temp)  # everything that is checked on loading
        os.replace(temp, out)


def make_folder(path):
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except OSError as e:
        raise ValueError(f"cannot write {path}: {e.strerror}") from None


def room(path, size, credit=0):
    """Whether size more bytes fit where path is to be; credit: bytes there that will be used up or are counted already."""
    folder = os.path.dirname(path)
    free = shutil.disk_usage(folder).free + credit
    if free < size * 1.01:
        raise ValueError(f"{path} needs {size / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free")

# ---------------------------------------------------------------------------------------------------------------------
# what is known of the real LLaDA, from other people's copies of it: its files could not be fetched where this was written

HEADERS = {"<|start_header_id|>": 126346, "<|end_header_id|>": 126347, "<|eot_id|>": 126348}


def special_tokens(base=False):
    """LLaDA's added tokens, {text: id}; the base model is said to lack the three headers."""
    names = {126080: "<|startoftext|>", 126081: "<|endoftext|>", 126082: "[CLS]", 126083: "[gMASK]", 126336: "<|mdm_mask|>", 126340: "<role>", 126341: "</role>", 126342: "<|arithmetic_start|>",
             126343: "<|arithmetic_end|>", 126344: "<|number_start|>", 126345: "<|number_end|>"}
    names |= {126084 + i: f"<|reserved_token_{i}|>" for i in range(252)} | {126337 + i: f"<|reserved_token_{253 + i}|>" for i in range(3)}
    return {text: i for i, text in sorted(names.items())} | ({} if base else HEADERS)


SPELLED = {"Hello world": [14455, 1931], "\n\n\n": [198, 198, 198], "  leading spaces": [220, 6135, 11435], "x  \n  y": [87, 256, 198, 220, 340],
           "numbers 12345 and 3.14159 and 1,000,000": [84857, 220, 16, 17, 18, 19, 20, 301, 220, 18, 13, 16, 19, 16, 20, 24, 301, 220, 16, 11, 15, 15, 15, 11, 15, 15, 15],
           "I'm you're they've he'll she'd it's WE'LL DON'T": [40, 3180, 362, 3273, 792, 3868, 464, 4164, 1285, 5800, 403, 698, 23437, 6, 2477, 64831, 33375]}
CHAT = {"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nWhat is paged attention?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n":
        [126080, 126346, 3840, 126347, 198, 198, 2372, 341, 282, 4831, 6098, 30, 126348, 126346, 598, 10450, 126347, 198, 198]}


def check_llada(tokenizer, config):
    """-> sentences about what is otherwise than expected. Special ids of an Instruct model that are wrong: ValueError. Base is
    what has none of the three headers."""
    base = not HEADERS.keys() & tokenizer.special.keys()
    expected = special_tokens(base)
    wrong = [text for text, i in expected.items() if tokenizer.special.get(text) != i]
    notes = [f"{text} is {tokenizer.special.get(text)}, and {expected[text]} was expected" for text in wrong]
    if config.mask_id != 126336 or config.eos_id != 126081:
        notes.append(f"config.json has the mask {config.mask_id} and the end of text {config.eos_id}, and 126336 and 126081 were expected")
    if notes and not base:
        raise ValueError(f"this is not LLaDA-8B-Instruct, although it has headers of a chat: {notes[0]}" + (f" (and {len(notes) - 1} more)" if len(notes) > 1 else ""))
    spelled = SPELLED if base else SPELLED | CHAT
    other = [text for text, ids in spelled.items() if tokenizer.encode(text, special=True) != ids]
    n = len(tokenizer.ranks)
    if n + len(tokenizer.unmerged) != 126080 or len(tokenizer.special) != len(expected):
        notes.append(f"the tokenizer has {n:,} tokens of text, {len(tokenizer.unmerged):,} that no merge makes and {len(tokenizer.special)} special ones; 126,080 in all and {len(expected)} were expected")
    notes += [f"{text[:30]!r} begins with the ids {tokenizer.encode(text, special=True)[:4]}, and {spelled[text][:4]} was expected" for text in other]
    print(f"tokenizer: {n:,} tokens spell themselves, {len(expected) - len(wrong)} of {len(expected)} special ids and {len(spelled) - len(other)} of {len(spelled)} texts are as expected; "
          f"{'Base (it lacks the headers of a chat)' if base else 'Instruct (it has the headers of a chat)'}")
    return notes

# ---------------------------------------------------------------------------------------------------------------------
# fetching

WANTED = ["*.safetensors", "*.json", "merges.txt"]


def cached(repo):
    """-> the folder of a snapshot that was fetched before and is whole, or None."""
    from huggingface_hub import snapshot_download
    try:
        folder = snapshot_download(repo, allow_patterns=WANTED, local_files_only=True)
        find_shards(folder)
    except Exception:  # whatever is missing, fetching will say it
        return None
    return folder if all(os.path.exists(os.path.join(folder, f)) for f in ("config.json", "tokenizer.json")) else None


def fetch(repo, out, ask=None):
    """Fetches a repository into huggingface_hub's own folder, unless it is there. ask(question) -> whether to go on."""
    try:
        import safetensors  # noqa: F401  before 16 GB are fetched, not behind
        from huggingface_hub import constants, snapshot_download
    except ImportError as e:
        raise ValueError(f"fetching {repo} needs the package {e.name}: {INSTALL}") from None
    folder, out, store = cached(repo), os.path.abspath(out), constants.HF_HUB_CACHE
    if not folder and constants.HF_HUB_OFFLINE:
        raise ValueError(f"HF_HUB_OFFLINE is set, and {repo} was not fetched before: unset it, or give a folder that has the files")
    make_folder(out)
    make_folder(os.path.join(store, "x"))
    size = sum(os.path.getsize(path) for path in set(find_shards(folder).values())) if folder else 16.1e9 if repo in HUB.values() else 0
    amount, free = f"{size / 1e9:.2g} GB" if size else "all of it", {path: shutil.disk_usage(path).free / 1e9 for path in (store, os.path.dirname(out))}
    plan = f"was fetched before ({folder})" if folder else f"will be fetched: {amount} from huggingface.co to {store} ({free[store]:.0f} GB free)"
    print(f"{repo} {plan}, and converted: {amount} to {out} ({free[os.path.dirname(out)]:.0f} GB free)", file=sys.stderr)
    left = os.path.getsize(f"{out}.converting") if os.path.exists(f"{out}.converting") else 0
    blobs = os.path.join(store, f"models--{repo.replace('/', '--')}", "blobs")
    here = sum(os.path.getsize(os.path.join(blobs, f)) for f in os.listdir(blobs)) if os.path.isdir(blobs) else 0
    same = os.stat(os.path.dirname(out)).st_dev == os.stat(store).st_dev
    room(out, size if folder or not same else 2 * size, left if folder or not same else left + here)
    if not folder and not same:
        room(os.path.join(store, "x"), size, here)
    if ask and not ask("go on?"):
        raise ValueError("nothing was fetched or written")
    if folder:
        return folder
    try:
        return snapshot_download(repo, allow_patterns=WANTED)
    except Exception as e:
        raise ValueError(f"cannot fetch {repo}: {first_line(e)[:200]}; what was fetched is kept, so try again, or fetch it elsewhere and give the folder") from None


def ask_user(yes):
    """-> ask for fetch(): nothing is asked with --yes; without a terminal somebody has to have said so."""
    def ask(question):
        if not sys.stdin or not sys.stdin.isatty():
            raise ValueError("this fetches or writes much, and there is nobody to ask: add --yes")
        print(question, "[y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    return None if yes else ask


def main(argv=None):
    from sample import Parser
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", metavar="llada|llada-base|llada-1.5|HUB_ID|DIR")
    p.add_argument("--out", metavar="FILE", help="default: checkpoints/NAME.pt")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: as stored")
    args = p.parse_args(argv)
    source, name = args.source, os.path.basename(os.path.normpath(args.source))
    looks_like_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not os.path.isdir(source.split("/")[0])
    hub = None if os.path.isdir(source) else HUB.get(source, source if looks_like_hub else None)
    if hub is None and not os.path.isdir(source):
        raise ValueError(f"there is no folder {source}: give one, or {', '.join(HUB)}, or the id of a repository on huggingface.co")
    out = os.path.join(ROOT, "checkpoints", f"{name}.pt") if args.out is None else args.out
    if not os.path.basename(out):
        raise ValueError(f"--out {out!r} is not the name of a file")
    folder = fetch(hub, out) if hub else source
    convert(folder, out, getattr(torch, args.dtype) if args.dtype else None, source if hub else None)
    print(f"{out}: python sample.py --ckpt {source if source in HUB and args.out is None else out}")
    return 0


if __name__ == "__main__":
    from sample import launch
    launch(main)
