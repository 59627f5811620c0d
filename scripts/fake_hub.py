"""Write a folder like LLaDA-8B's on Hugging Face, or another family's, with random weights: the
real names and config.json, LLaDA's real division into files, and a stand-in tokenizer with the real
special tokens (iLLaDA's are invented): the way to `sample.py --ckpt` without fetching 16 GB.

python scripts/fake_hub.py fake                     2 layers of width 64, 33 MB
python scripts/convert.py fake --out fake.pt
python sample.py --ckpt fake.pt --prompt "Hello"    answers nonsense
python scripts/fake_hub.py fake --family dream      or illada, qwen2 (Qwen2.5-0.5B-Instruct)
python scripts/fake_hub.py fake --full              16 GB, as the real one
"""
import argparse
import dataclasses
import json
import os
import pathlib
import re
import struct
import sys

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import DiffusionLM, stored  # noqa: E402
from scripts.convert import (  # noqa: E402
    FAMILIES, amount, config_of, room, special_tokens, their_names)
from scripts.hf_tokenizer import LETTERS, QWEN2, merge  # noqa: E402
from support.checkpoint import first_line  # noqa: E402
from support.cli import ROOT, Parser, check_bounds, launch  # noqa: E402
from support.tokenizer import train_bpe  # noqa: E402

def shard_of(name, names, n_layer, shards):
    """Which file has a tensor. shards: LLaDA's real six files, (kind, up to which of 32 blocks,
    file), or a number of files with as many tensors each."""
    if isinstance(shards, int):
        of, number = shards, 1 + [*names].index(name) * shards // len(names)
    else:
        of, kind, at = 6, name.split(".")[2].replace("ff_out", "head"), 0
        if block := re.search(r"blocks\.(\d+)\.(\w+)", name):
            kind, at = block[2], int(block[1]) * 32 / n_layer
        number = next(file for k, end, file in shards if k == kind and at < end)
    return f"model-{number:05}-of-{of:05}.safetensors" if of > 1 else "model.safetensors"

def write_shard(path, shapes, g, bar):
    """Write a safetensors file: the length of a JSON header, the header, the bytes of the tensors.
    Only one tensor is in memory at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            norm = len(shape) == 1 and name.endswith("weight")
            tensor = torch.ones(shape, dtype=torch.bfloat16) if norm else (
                torch.randn(shape, generator=g, dtype=torch.bfloat16).mul_(0.02))
            for part in tensor.flatten().split(2**25):
                f.write(part.view(torch.uint8).numpy().data)
                bar.update(part.nbytes)

def stand_in_tokenizer(n, base, table):
    """-> {file: document} of a byte-level BPE that is trained on files of this project"""
    text = "\n".join(pathlib.Path(ROOT, file).read_text(encoding="utf-8") for file in (
        "README.md", "dkv_min.py", "model.py", "train_tiny.py", "sample.py"))
    letters = {b: letter for letter, b in LETTERS.items()}
    added = special_tokens(table, base)
    vocab, rank, first = {}, {}, 0 if min(added.values()) else len(added)
    for token, i in train_bpe(text, n).items():
        token = "".join(letters[b] for b in token)
        if len(token) > 1:
            rank[tuple(merge(token, rank))] = len(rank)  # the two tokens that it was made of
        vocab[token] = first + i
    doc = json.loads(json.dumps(FAMILIES["llada"]["tokenizer"]))
    tokens = [doc["added_tokens"][0] | {"id": i, "content": t} for t, i in added.items()]
    if table["slow"]:
        config = {"tokenizer_class": table["slow"], "add_prefix_space": False,
                  "added_tokens_decoder": {str(t.pop("id")): t for t in tokens}}
        merges = "\n".join(["#version: 0.2", *map(" ".join, rank)])
        return {"vocab.json": vocab, "merges.txt": merges, "added_tokens.json": added,
                "tokenizer_config.json": config}
    if table["template"] == "chatml":
        doc["normalizer"] = {"type": "NFC"}
        doc["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = QWEN2
    doc["model"] |= {"vocab": vocab | added, "merges": [list(pair) for pair in rank]}
    return {"tokenizer.json": doc | {"added_tokens": tokens}}

def their_config(c, table):
    """Config -> the document of a config.json"""
    named = {ours: theirs for theirs, ours in table["rename"].items()}
    sizes = {"d_model": c.n_embd, "n_layers": c.n_layer, "n_heads": c.n_head,
             "n_kv_heads": c.n_kv_head, "mlp_hidden_size": c.n_ff, "include_qkv_bias": c.qkv_bias}
    sizes = {named.get(name, name): value for name, value in sizes.items()}
    return {name: sizes.get(name, value) for name, value in table["config"].items()}

def write_folder(args, config, table):
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in stored(DiffusionLM(config)).items()}
    names = their_names(config, table)
    size = 2 * sum(shape.numel() for shape in shapes.values())
    room(os.path.join(args.dir, "config.json"), size)
    files = {name: shard_of(name, names, config.n_layer, table["shards"]) for name in names}
    g = torch.Generator().manual_seed(args.seed)
    with tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1000, desc="writing") as bar:
        for file in sorted(set(files.values())):
            held = {name: shapes[names[name]] for name in names if files[name] == file}
            write_shard(os.path.join(args.dir, file), held, g, bar)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    docs = {"model.safetensors.index.json": index} if len({*files.values()}) > 1 else {}
    docs |= stand_in_tokenizer(args.vocab, args.base, table)
    docs["generation_config.json"] = {"mask_token_id": None}  # Dream's has that
    docs["config.json"] = their_config(config, table)  # the last one: with it all are there
    for file, doc in docs.items():
        with open(os.path.join(args.dir, file), "w", encoding="utf-8") as f:
            f.write(doc if isinstance(doc, str) else json.dumps(doc, indent=1))
    print(f"{args.dir}: {len(names)} tensors, {size // 2:,} parameters, {amount(size)}; "
          f"python scripts/convert.py {args.dir} --out FILE.pt")

def main(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dir", metavar="DIR")
    p.add_argument("--family", choices=FAMILIES, default="llada", help="(llada)")
    for flag, default in ("--layers", 2), ("--width", 64), ("--heads", 4), ("--seed", 0):
        p.add_argument(flag, type=int, default=default, help=f"({default})")
    p.add_argument("--kv-heads", type=int, help="(as many as heads, or the real share)")
    p.add_argument("--qkv-bias", action="store_true")
    p.add_argument("--vocab", type=int, default=1000, help="tokens of the tokenizer (1000)")
    p.add_argument("--base", action="store_true", help="without header tokens, as the base model")
    p.add_argument("--full", action="store_true", help="the real size: 16 GB")
    args = p.parse_args(argv)
    if os.path.exists(args.dir) and (not os.path.isdir(args.dir) or os.listdir(args.dir)):
        raise ValueError(f"{args.dir} exists already: give a new or an empty folder")
    table = FAMILIES[args.family]
    config = config_of(table["config"], table)
    check_bounds(args, layers=(1, 1000), seed=(0, 2**63 - 1), vocab=(256, table["texts"]))
    if not args.full:
        share = max(1, args.heads * config.n_kv_head // config.n_head)
        config = dataclasses.replace(
            config, n_layer=args.layers, n_head=args.heads, n_embd=args.width,
            n_kv_head=share if args.kv_heads is None else args.kv_heads, n_ff=3 * args.width,
            qkv_bias=args.qkv_bias or config.qkv_bias)
    if fault := config.fault():
        raise ValueError(f"these sizes do not work: {fault}")
    try:
        write_folder(args, config, table)
    except OSError as e:
        raise ValueError(f"cannot write to {args.dir}: {first_line(e)}") from None
    return 0

if __name__ == "__main__":
    launch(main)
