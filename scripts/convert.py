"""Convert the weights and the tokenizer of LLaDA, iLLaDA, Dream or Qwen2, as Hugging Face stores
them, to one checkpoint file. What the families differ in is data: scripts/families.json.

python scripts/convert.py llada            GSAI-ML/LLaDA-8B-Instruct -> checkpoints/llada.pt
python scripts/convert.py dream            Dream-org/Dream-v0-Instruct-7B; --help has all names
python scripts/convert.py DIR --out my.pt  a folder: config.json, *.safetensors, and tokenizer.json
                                           or vocab.json and merges.txt

Needs safetensors, and huggingface_hub to fetch: python -m pip install -r requirements-llada.txt.
Only data is read: no code of the repository runs. The file is filled piece by piece, so 16 GB of
weights need not fit into memory, and gets its name after it is written and read back.
"""
import argparse
import contextlib
import dataclasses
import glob
import os
import re
import shutil
import sys
import zlib

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import Config, DiffusionLM, load, stored  # noqa: E402
from scripts.hf_tokenizer import from_folder, need, read_file  # noqa: E402
from support.checkpoint import FORMAT, atomic_write, first_line, read  # noqa: E402
from support.cli import HUB, ROOT, Parser, check_out, launch  # noqa: E402
from support.resume import remove_temps  # noqa: E402

SIZES = dict(zip(HUB.values(), 4 * [16.1e9] + 2 * [15.3e9] + [1e9, 3.1e9, 15.3e9]))  # in bytes
INSTALL = "python -m pip install -r requirements-llada.txt"
PIECE = 2**26  # bytes that are in memory at a time
# {family: its table}. What a table lacks is as in that of the family that it is like
FAMILIES = read_file(os.path.join(ROOT, "scripts", "families.json"))
for table in FAMILIES.values():
    for key, value in FAMILIES.get(table.get("like"), {}).items():
        own = table.get(key, value)
        table[key] = value | own if isinstance(value, dict) else own

# config.json

def config_of(c, table):
    """The settings of a config.json -> Config. LLaDA's names are read, others are renamed first."""
    c = {table["rename"].get(name, name): c[name] for name in table["types"] if name in c}
    rows = c.get("embedding_size", c["vocab_size"])
    return Config(**dict(
        n_layer=c["n_layers"], n_head=c["n_heads"], n_embd=c["d_model"],
        n_kv_head=c.get("n_kv_heads", 1 if c.get("multi_query_attention") else c["n_heads"]),
        n_ff=c.get("mlp_hidden_size", int(min(c.get("mlp_ratio", 4), 1e6) * c["d_model"])),
        vocab_size=rows, n_vocab=c["vocab_size"], max_len=c["max_sequence_length"],
        mask_id=c.get("mask_token_id", rows - 1), eos_id=c.get("eos_token_id"),
        rope_theta=float(c.get("rope_theta", 10000.0)), tied=c.get("weight_tying", False),
        norm_eps=float(c.get("rms_norm_eps", 1e-5)), qkv_bias=c.get("include_qkv_bias", False),
    ) | table["set"])

def read_config(path):
    """config.json -> (one of FAMILIES, Config, notes about unknown settings). ValueError if our
    network cannot have such a setting."""
    c = need(read_file(path), path, dict)
    c = {name: value for name, value in c.items() if value is not None}
    kind, classes = c.get("model_type"), f"{c.get('architectures')} {c.get('auto_map')}"
    # a config without a model_type is known by the class of its network
    family = next((name for name, table in FAMILIES.items() if (
        kind in table["only"]["model_type"] if kind else table["architecture"] in classes)), None)
    if not family:
        raise ValueError(f"{path}: model_type is {kind!r:.80}, and only these families can be "
                         f"converted: {', '.join(FAMILIES)}")
    # only: settings that the network does not have, and the values that mean just that. harmless:
    # about training, initialization, speed, or for Hugging Face's own code
    only, needed, types, harmless = (FAMILIES[family][key] for key in (
        "only", "needed", "types", "harmless"))
    for name in [name for name in only if name in c]:
        good, each = only[name], isinstance(c[name], list) and c[name]  # a value for each layer
        if not all(value in good for value in each or [c[name]]):
            raise ValueError(f"{path}: {name} is {c[name]!r:.80}, and this network has only "
                             f"{' or '.join(map(repr, good)) or 'none'}")
    if lacking := [name for name in needed if name not in c]:
        raise ValueError(f"{path} lacks {lacking[0]}, which a {family} has (its model_type is "
                         f"{kind!r:.80})")
    for name, kinds in types.items():
        if name in c and type(c[name]).__name__ not in kinds:
            raise ValueError(f"{path}: {name} is {c[name]!r:.80}, expected {' or '.join(kinds)}")
    unknown = sorted(name for name in c.keys() - {*only, *types, *harmless} if c[name])
    usual = {"type": "default", "rope_type": "default", "rope_theta": c.get("rope_theta")}
    for name in unknown:  # newer configs have all of it in rope_parameters
        said = c[name].items() if isinstance(c[name], dict) else [(name, c[name])]
        if re.search("rope|rotary", name) and any(usual.get(k, ...) != v for k, v in said):
            raise ValueError(f"{path}: {name} is {c[name]!r:.80}, and of the rotary settings only "
                             "rope_theta, a number beside it, is read")
    if len({c[name] for name in {"weight_tying", "tie_word_embeddings"} & c.keys() & {*types}}) > 1:
        raise ValueError(f"{path}: weight_tying and tie_word_embeddings contradict each other")
    config = config_of(c, FAMILIES[family])
    if fault := config.fault():
        raise ValueError(f"{path}: {fault}")
    if c.get("head_dim", config.head_dim) != config.head_dim:
        raise ValueError(f"{path}: head_dim is {c['head_dim']}, and is only width / heads here")
    return family, config, [f"{path}: the unknown setting {name} = {c[name]!r:.80} is ignored"
                            for name in unknown]

# the tensors: beware, LLaDA's ff_out is the head at the top and the MLP's last matrix in a block

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

def their_names(config, table, both=False):
    """-> {their name: our name} of every parameter of the network. both: with that of a tied head
    too, which some files have beside the embedding."""
    how, found = table["names"], {}
    for theirs, ours in how["top"].items():
        tied = config.tied and ours == "head"
        if both or not tied:
            found[f"{how['prefix']}{theirs}.weight"] = "wte.weight" if tied else f"{ours}.weight"
    for i in range(config.n_layer):
        for theirs, ours in how["block"].items():
            biased = config.qkv_bias and ours in ("attn.q", "attn.k", "attn.v")
            for kind in ("weight", "bias") if biased else ("weight",):
                found[f"{how['blocks']}.{i}.{theirs}.{kind}"] = f"blocks.{i}.{ours}.{kind}"
    return found

def opened(path):
    """-> a safetensors file, to be used in a with statement. A damaged one is a ValueError."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(f"reading the weights needs the package safetensors: {INSTALL}") from None
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is cut, damaged or not readable: {first_line(e)}") from None

def find_shards(folder):
    """-> {path of a file: the tensors that it has}"""
    index, single = (os.path.join(folder, f"model.safetensors{end}") for end in (".index.json", ""))
    if os.path.exists(index):
        where, shards = f"{index}: weight_map", {}
        files = need(need(read_file(index), index, dict).get("weight_map"), where, dict)
        for name, file in files.items():
            if os.path.basename(need(file, where, str)) != file:
                raise ValueError(f"{where} has {file!r:.80}, which is not the name of a file")
            shards.setdefault(os.path.join(folder, file), []).append(name)
    elif os.path.exists(single):
        with opened(single) as f:
            shards = {single: list(f.keys())}
    else:
        raise ValueError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    if missing := [path for path in shards if not os.path.exists(path)]:
        raise ValueError(f"the shard {missing[0]} is missing: fetch it again")
    return shards

def check_headers(shards, names, shapes):
    """Check that the files have the tensors of the network and no others, with its shapes
    -> {their name: stored dtype}"""
    held, dtypes = {name for tensors in shards.values() for name in tensors}, {}
    given, extra = {names[name] for name in held & names.keys()}, sorted(held - names.keys())
    missing = sorted(name for name, ours in names.items() if ours not in given)
    if extra and missing:
        # a wrapper that trained the model puts its own prefix before every name
        found = next((name for name in extra if name.endswith(missing[0])), extra[0])
        prefix = found.removesuffix(missing[0])
        hint = f"; remove the prefix {prefix} from the names first" if prefix != found else ""
        raise ValueError(
            f"{len(extra)} tensors of the files and {len(missing)} of the network do not match: "
            f"the files have {found}, and {missing[0]} is expected{hint}")
    if extra or missing:
        raise ValueError(f"the files have {len(extra)} tensors too many: {extra[0]}" if extra else
                         f"the files lack {len(missing)} tensors: {missing[0]}")
    for path, tensors in shards.items():
        with opened(path) as f:
            for name in tensors:
                if name not in f.keys():
                    raise ValueError(f"{path} does not have {name}, although the index says so")
                part, expected = f.get_slice(name), list(shapes[names[name]])
                if part.get_shape() != expected or part.get_dtype() not in DTYPES:
                    raise ValueError(f"{path}: {name} is {part.get_shape()} {part.get_dtype()}, "
                                     f"expected {expected} of floats")
                dtypes[name] = DTYPES[part.get_dtype()]
    return dtypes

# the file

def amount(size):
    """A number of bytes in words: 16.1 GB, 33.0 MB, 0.4 KB."""
    scale, unit = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e6 else (1e3, "KB")
    return f"{size / scale:.1f} {unit}"

def room(path, size):
    """Make the folder of path, and check that size bytes fit there."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as e:
        raise ValueError(f"cannot write {path}: {first_line(e)}") from None
    if free < size * 1.01:
        raise ValueError(f"{path} needs {amount(size)}, and {folder} has {amount(free)} free: free "
                         "some, or choose another place")

@contextlib.contextmanager
def only_one(out):
    """One process converts to `out` at a time, the others wait here. The system frees the lock of a
    process that is killed. -> whether another process has written `out` meanwhile"""
    def written():
        return os.path.exists(out) and os.stat(out).st_mtime_ns
    lock, before = FileLock(f"{out}.lock"), written()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process converts to {out}: waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield written() != before
    finally:
        with contextlib.suppress(OSError):  # Windows removes it in release
            os.remove(lock.lock_file)
        lock.release()

def copy(source, like, bar, f=None):
    """Read a tensor, or a slice of safetensors, in the dtype of `like`, some PIECE bytes at a time,
    and write it to the file f. -> its checksum"""
    rows, total = max(1, PIECE // like[0].nbytes), 0
    for a in range(0, len(like), rows):
        piece = source[a:a + rows].to(like.dtype).contiguous().view(torch.uint8).numpy()
        if f:
            f.write(piece)
        total = zlib.crc32(piece, total)
        bar.update(piece.nbytes)
    return total

def write(f, data, shards, names, bar):
    """Lay the file f out, fill its tensors, read them back. data: as save() of model.py writes it,
    with weights that are allocated and never touched."""
    with torch.serialization.skip_data():
        torch.save(data, f)
    f.flush()
    weights, sums, reader = data["weights"], {}, torch._C.PyTorchFileReader(f.name)
    begin = {name: reader.get_record_offset(f"data/{i}") for i, name in enumerate(weights)}
    del reader  # Windows removes no open file
    for shard, tensors in shards.items():
        with opened(shard) as source:
            for theirs in tensors:
                name = names[theirs]
                f.seek(begin[name])
                found = copy(source.get_slice(theirs), weights[name], bar, f)
                if sums.setdefault(name, found) != found:
                    raise ValueError(
                        "config.json says by weight_tying or tie_word_embeddings that head and "
                        f"embedding are one, and the files have different ones: {theirs}")
    f.flush()
    os.fsync(f.fileno())
    if hasattr(os, "posix_fadvise"):  # so that it is read back from the disk, not from memory
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    bar.set_description("reading back")
    for name, w in read(f.name)["weights"].items():
        if copy(w, w, bar) != sums[name]:
            raise ValueError(f"{f.name} does not read back as it was written ({name}): the disk "
                             "may be faulty")

def fit_tokenizer(source, config, tokenizer, name, table):
    """-> the config with the tokenizer's ids, extra of the checkpoint, notes. name: one of HUB, if
    the source has to be that."""
    length, block = min(128, max(1, config.max_len // 2)), table["block"]
    extra = {"gen_length": length, "block_length": block if length % block == 0 else length}
    extra |= table["extra"]
    if not tokenizer:
        if name in HUB:
            raise ValueError(f"{source} is not {HUB[name]}: it has no tokenizer")
        return config, extra, [f"{source} has no tokenizer: the checkpoint works on ids "
                               "(sample.py --ids 1,2,3)"]
    special, top, text = tokenizer.special, max(tokenizer.bytes), table["mask"]
    if top >= config.vocab_size:
        raise ValueError(f"{source}: the tokenizer has the id {top}, and the network "
                         f"{config.vocab_size} rows")
    ends = [special[end] for end in table["ends"] if end in special]
    mask = special.get(text, config.mask_id)
    if not text:
        # a causal model has no mask. Columns that are not written yet have to hold an id that is
        # never written: a row without a token, or else a token that no text is encoded to
        free = [i for i in special.values() if i not in (config.eos_id, *ends)]
        free += tokenizer.unmerged.values()
        if top + 1 == config.vocab_size and not free:
            raise ValueError(f"{source}: every id is a token of text, and one is needed as a mask")
        mask = top + 1 if top + 1 < config.vocab_size else free[-1]
    elif mask != config.mask_id:
        raise ValueError(f"{source}: mask_token_id is {config.mask_id} in config.json, and "
                         f"{text} is {mask} in the tokenizer")
    config = dataclasses.replace(config, n_vocab=top + 1, mask_id=mask, eot_id=next(
        (end for end in ends if end != config.eos_id), None))
    known = config.vocab_size in table["known_rows"]
    notes = check_known(tokenizer, config, table) if known else []
    if fault := config.fault():
        raise ValueError(f"{source}: with the tokenizer's ids, {fault}")
    # Qwen2's base models have the headers as well, but do not end with one. Dream's base differs
    # from Instruct in nothing but the name
    chats = {*table["headers"], *table["needs"]} <= special.keys()
    ends_chat = config.eos_id == special.get(table["chat_end"], config.eos_id)
    if chats and ends_chat and "base" not in (name or "").lower():
        extra["chat"] = table["template"]
    elif name in HUB and not name.endswith("-base"):
        raise ValueError(f"{source} is not {HUB[name]}: it has no headers of a chat in its "
                         "tokenizer, or does not end with one")
    return config, extra, notes

def convert(source, out, dtype=None, name=None):
    """Convert a folder to the file out. name: one of HUB, if the folder has to be that. ValueError
    if anything is wrong; a file out that exists then stays as it is."""
    out = os.path.abspath(out)
    family, config, notes = read_config(os.path.join(source, "config.json"))
    table = FAMILIES[family]
    shards = find_shards(source)
    if config.n_layer > (n := sum(map(len, shards.values()))):
        raise ValueError(f"{source}: n_layers is {config.n_layer}, and the files have {n} tensors")
    tokenizer = from_folder(source)
    config, extra, more = fit_tokenizer(source, config, tokenizer, name, table)
    names = their_names(config, table, both=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in stored(DiffusionLM(config)).items()}
    dtypes = check_headers(shards, names, shapes)
    dtype = dtype or next(d for name, d in dtypes.items() if names[name] == "wte.weight")
    weights = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    size, own = sum(w.nbytes for w in weights.values()), str(dtype)[6:]
    print(f"{len(weights)} tensors, {size // dtype.itemsize:,} parameters, {own}, {amount(size)} "
          f"-> {out}")
    if mixed := sorted(str(d)[6:] for d in set(dtypes.values()) - {dtype}):
        more.append(f"tensors stored as {', '.join(mixed)} are written as {own}")
    for note in notes + more:
        print(f"note: {note}")
    data = {"format": FORMAT, "config": dataclasses.asdict(config), "weights": weights,
            "tokenizer": tokenizer.state() if tokenizer else None, "extra": extra}
    with only_one(out) as written:
        if written:
            return print(f"{out} was written by the other process")
        remove_temps(out)
        room(out, size)
        with atomic_write(out) as f:
            with tqdm(total=2 * size, unit="B", unit_scale=True, unit_divisor=1000,
                      desc="writing") as bar:
                write(f, data, shards, names, bar)
            load(f.name, "meta")  # everything that is checked on loading

# the real ones, to compare a tokenizer with. LLaDA's special tokens in families.json are those of
# its tokenizer_config.json, and the texts were spelled by other people's copies. iLLaDA's are
# inventions for the stand-in, and nothing is compared with them

def special_tokens(table, base=False):
    """A family's added tokens, ordered by id, {text: id}. LLaDA's base model lacks headers of a
    chat."""
    names = table["special"] | ({} if base else table["headers"])
    if first := table["reserved"]:
        names |= {f"<|reserved_token_{i}|>": first + i for i in range(256) if i != 252}
    return dict(sorted(names.items(), key=lambda pair: pair[1]))

def check_known(tokenizer, config, table):
    """-> notes about what differs from the family's real models. ValueError for a LLaDA Instruct
    with wrong special ids. A tokenizer without any headers of a chat is the base model's."""
    special, texts = tokenizer.special, table["texts"]
    base = not table["headers"].keys() & special.keys()
    expected = special_tokens(table, base)
    spelled = table["spelled"] | ({} if base else table["chat"])
    notes = [f"{text} is {special.get(text)}, expected {i}" for text, i in expected.items()
             if special.get(text) != i]
    right, ids = len(expected) - len(notes), table["ids"]
    if ids and ids != [config.mask_id, config.eos_id]:
        notes.append(f"config.json has the mask {config.mask_id} and the end of text "
                     f"{config.eos_id}, expected {ids[0]} and {ids[1]}")
    if notes and table["strict"] and not base:
        more = f" (and {len(notes) - 1} more)" if len(notes) > 1 else ""
        raise ValueError(f"this is not {table['strict']}, although it has headers of a chat: "
                         f"{notes[0]}{more}")
    found = {text: tokenizer.encode(text, special=True) for text in spelled}
    other = [f"{text[:30]!r} begins with the ids {found[text][:4]}, expected {ids[:4]}"
             for text, ids in spelled.items() if found[text] != ids]
    n, unmerged = len(tokenizer.ranks), len(tokenizer.unmerged)
    if n + unmerged != texts or len(special) != len(expected):
        notes.append(f"the tokenizer has {n + unmerged:,} tokens of text and {len(special)} "
                     f"special ones, expected {texts:,} and {len(expected)}")
    print(f"tokenizer: {n:,} tokens spell text; {right} of {len(expected)} special ids and "
          f"{len(spelled) - len(other)} of {len(spelled)} texts are as expected; "
          f"with{'out' * base} headers of a chat")
    return notes + other

# fetching

def ask_user():
    """Ask before much is fetched or written. The flag --yes is sample.py's, which starts this."""
    if not sys.stdin or not sys.stdin.isatty():
        raise ValueError("this fetches or writes much, and nobody can be asked: add --yes")
    print("continue? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ValueError("nothing was fetched or written")

def fetch(repo, out, ask=False):
    """Fetch a repository into huggingface_hub's own folder, unless it is there. -> the folder"""
    try:
        import safetensors  # noqa: F401  needed only later, but say so before 16 GB are fetched
        from huggingface_hub import constants, snapshot_download
    except ImportError as e:
        raise ValueError(f"fetching {repo} needs the package {e.name}: {INSTALL}") from None
    wanted = ["*.safetensors", "*.json", "merges.txt"]
    folder, out, store = None, os.path.abspath(out), constants.HF_HUB_CACHE
    with contextlib.suppress(Exception):  # fetching will name what is wrong
        there = snapshot_download(repo, allow_patterns=wanted, local_files_only=True)
        held = {*os.listdir(there)}
        if find_shards(there) and "config.json" in held and (
                "tokenizer.json" in held or {"vocab.json", "merges.txt"} <= held):
            folder = there
    if not folder and constants.HF_HUB_OFFLINE:
        raise ValueError(f"HF_HUB_OFFLINE is set, and {repo} was not fetched before: unset it, or "
                         "give a folder that has the files")
    size = sum(map(os.path.getsize, find_shards(folder))) if folder else SIZES.get(repo, 0)
    if not folder:
        blobs = os.path.join(store, f"models--{repo.replace('/', '--')}", "blobs", "*")
        rest = size - sum(map(os.path.getsize, glob.glob(blobs)))  # of an interrupted fetch
        room(os.path.join(store, ""), rest)
        room(out, size + rest * (os.stat(store).st_dev == os.stat(os.path.dirname(out)).st_dev))
    words = amount(size) if size else "all of it"
    free = [amount(shutil.disk_usage(path).free) for path in (store, os.path.dirname(out))]
    plan = f"was fetched before ({folder})" if folder else (
        f"will be fetched: {words} from huggingface.co to {store} ({free[0]} free)")
    print(f"{repo} {plan}, and converted: {words} to {out} ({free[1]} free)", file=sys.stderr)
    if ask:
        ask_user()
    try:
        return folder or snapshot_download(repo, allow_patterns=wanted)
    except Exception as e:
        raise ValueError(f"cannot fetch {repo}: {first_line(e)[:200]}; the files fetched so far "
                         "are kept: try again, or fetch it elsewhere and give the folder") from None

def main(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", metavar="NAME|HUB_ID|DIR", help=f"NAME: {', '.join(HUB)}")
    p.add_argument("--out", metavar="FILE", help="default: checkpoints/NAME.pt")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: as stored")
    p.add_argument("--ask", action="store_true", help="ask before fetching (sample.py gives this)")
    args = p.parse_args(argv)
    source = args.source
    hub = HUB.get(source) or (None if os.path.isdir(source) else source)
    if hub == source and (not re.fullmatch(r"[\w.-]+/[\w.-]+", hub)
                          or os.path.isdir(hub.split("/")[0])):
        raise ValueError(f"there is no folder {source}: give one, or {', '.join(HUB)}, or the id "
                         "of a repository on huggingface.co")
    name = os.path.basename(os.path.normpath(source))
    out = os.path.join(ROOT, "checkpoints", f"{name}.pt") if args.out is None else args.out
    room(os.path.abspath(out), 0)  # makes its folder
    check_out(out, only="checkpoint")
    folder = fetch(hub, out, args.ask) if hub else source
    convert(folder, out, args.dtype and getattr(torch, args.dtype), source if hub else None)
    print(f"{out}: python sample.py --ckpt {source if source in HUB and not args.out else out}")
    return 0

if __name__ == "__main__":
    launch(main)
