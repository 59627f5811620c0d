"""Write a folder like LLaDA-8B's on Hugging Face, with random weights: the real names, the real
division into files, config.json, and a stand-in tokenizer with LLaDA's real special tokens. It is
for trying the way to `sample.py --ckpt` before fetching 16 GB.

python scripts/fake_hub.py fake                     2 layers of width 64, 33 MB
python scripts/convert.py fake --out fake.pt
python sample.py --ckpt fake.pt --prompt "Hello"    answers nonsense
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
from model import LLADA_8B, DiffusionLM  # noqa: E402
from scripts.convert import LLADA, amount, room, special_tokens, their_names  # noqa: E402
from scripts.hf_tokenizer import LETTERS, merge  # noqa: E402
from support.checkpoint import first_line  # noqa: E402
from support.cli import ROOT, Parser, check_bounds, launch  # noqa: E402
from support.tokenizer import train_bpe  # noqa: E402

def shard_of(name, n_layer):
    """Which of the real six files has a tensor. LLADA has (kind, up to which of 32 blocks, file)"""
    kind, at = name.split(".")[2].replace("ff_out", "head"), 0
    if block := re.search(r"blocks\.(\d+)\.(\w+)", name):
        kind, at = block[2], int(block[1]) * 32 / n_layer
    number = next(file for k, end, file in LLADA["shards"] if k == kind and at < end)
    return f"model-{number:05}-of-00006.safetensors"

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
            if len(shape) == 1 and name.endswith("weight"):
                tensor = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensor = torch.randn(shape, generator=g, dtype=torch.bfloat16).mul_(0.02)
            for part in tensor.flatten().split(2**25):
                f.write(part.view(torch.uint8).numpy().data)
                bar.update(part.nbytes)

def stand_in_tokenizer(n, base):
    """-> the document of a tokenizer.json: byte-level BPE, trained on files of this project"""
    text = "\n".join(pathlib.Path(ROOT, file).read_text(encoding="utf-8") for file in (
        "README.md", "dkv_min.py", "model.py", "train_tiny.py", "sample.py"))
    letters = {b: letter for letter, b in LETTERS.items()}
    vocab, rank = {}, {}
    for token, i in train_bpe(text, n).items():
        token = "".join(letters[b] for b in token)
        if len(token) > 1:
            rank[tuple(merge(token, rank))] = len(rank)  # the two tokens that it was made of
        vocab[token] = i
    added, doc = special_tokens(base), LLADA["tokenizer"]
    model = {"vocab": vocab | added, "merges": [list(pair) for pair in rank]}
    return doc | {"model": doc["model"] | model, "added_tokens": [
        doc["added_tokens"][0] | {"id": i, "content": t} for t, i in added.items()]}

def their_config(c):
    """Config -> the document of a config.json"""
    return LLADA["config"] | {
        "d_model": c.n_embd, "n_layers": c.n_layer, "n_heads": c.n_head, "n_kv_heads": c.n_kv_head,
        "mlp_hidden_size": c.n_ff, "include_qkv_bias": c.qkv_bias}

def write_folder(args, config):
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in DiffusionLM(config).state_dict().items()}
    names = their_names(config)
    size = 2 * sum(shape.numel() for shape in shapes.values())
    room(os.path.join(args.dir, "config.json"), size)
    files = {name: shard_of(name, config.n_layer) for name in names}
    g = torch.Generator().manual_seed(args.seed)
    with tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1000, desc="writing") as bar:
        for file in sorted(set(files.values())):
            held = {name: shapes[names[name]] for name in names if files[name] == file}
            write_shard(os.path.join(args.dir, file), held, g, bar)
    docs = {"model.safetensors.index.json": {"metadata": {"total_size": size},
                                             "weight_map": dict(sorted(files.items()))}}
    docs["tokenizer.json"] = stand_in_tokenizer(args.vocab, args.base)
    docs["config.json"] = their_config(config)  # the last one: with it the folder is complete
    for file, doc in docs.items():
        with open(os.path.join(args.dir, file), "w", encoding="utf-8") as f:
            json.dump(doc, f, indent=1)
    print(f"{args.dir}: {len(names)} tensors, {size // 2:,} parameters, {amount(size)}; "
          f"python scripts/convert.py {args.dir} --out FILE.pt")

def main(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dir", metavar="DIR")
    for flag, default in ("--layers", 2), ("--width", 64), ("--heads", 4), ("--seed", 0):
        p.add_argument(flag, type=int, default=default, help=f"({default})")
    p.add_argument("--kv-heads", type=int, help="(as many as heads)")
    p.add_argument("--mlp", type=int, help="hidden width of the MLP (3 times the width)")
    p.add_argument("--qkv-bias", action="store_true")
    p.add_argument("--vocab", type=int, default=1000, help="tokens of the tokenizer (1000)")
    p.add_argument("--base", action="store_true", help="without header tokens, as the base model")
    p.add_argument("--full", action="store_true", help="LLaDA-8B's size: 16 GB")
    args = p.parse_args(argv)
    if os.path.exists(args.dir) and (not os.path.isdir(args.dir) or os.listdir(args.dir)):
        raise ValueError(f"{args.dir} exists already: give a new or an empty folder")
    check_bounds(args, layers=(1, 1000), seed=(0, 2**63 - 1), vocab=(256, 126080))
    config = LLADA_8B
    if not args.full:
        config = dataclasses.replace(
            config, n_layer=args.layers, n_head=args.heads, n_embd=args.width,
            n_kv_head=args.heads if args.kv_heads is None else args.kv_heads,
            n_ff=3 * args.width if args.mlp is None else args.mlp, qkv_bias=args.qkv_bias)
    if fault := config.fault():
        raise ValueError(f"these sizes do not work: {fault}")
    try:
        write_folder(args, config)
    except OSError as e:
        raise ValueError(f"cannot write to {args.dir}: {first_line(e)}") from None
    return 0

if __name__ == "__main__":
    launch(main)
