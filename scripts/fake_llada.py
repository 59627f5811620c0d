"""Writes a folder like those of LLaDA-8B on Hugging Face, with random weights: the real names, the real division into files,
config.json, and a stand-in tokenizer with LLaDA's real special tokens. To try the way to `sample.py --ckpt` before fetching 16 GB.

python scripts/fake_llada.py fake                   2 layers of width 64, 33 MB
python scripts/convert.py fake --out fake.pt
python sample.py --ckpt fake.pt --prompt "Hello"     nonsense, but all the way
python scripts/fake_llada.py fake --full            the 16 GB of the real one
"""
import argparse
import json
import os
import re
import shutil
import struct
import sys

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from model import LLADA_8B, DiffusionLM, first_line  # noqa: E402
from scripts.convert import special_tokens, their_names  # noqa: E402
from scripts.hf_tokenizer import LETTERS, merge  # noqa: E402

# which of the real six files holds what: (kind, up to which of 32 blocks, file)
SHARDS = [("wte", 32, 1), ("ln_f", 32, 1), ("attn_out", 32, 1), ("head", 32, 2), ("ff_out", 19, 2), ("ff_out", 32, 3), ("attn_norm", 32, 3), ("ff_norm", 32, 3), ("q_proj", 32, 3),
          ("k_proj", 18, 3), ("k_proj", 32, 4), ("v_proj", 32, 4), ("ff_proj", 14, 4), ("ff_proj", 32, 5), ("up_proj", 11, 5), ("up_proj", 32, 6)]


def shard_of(name, n_layer):
    block = re.search(r"blocks\.(\d+)\.(\w+)", name)
    kind, at = (block[2], int(block[1]) * 32 / n_layer) if block else (name.split(".")[2].replace("ff_out", "head"), 0)
    return next(f"model-{n:05}-of-00006.safetensors" for k, end, n in SHARDS if k == kind and at < end)


def write_shard(path, shapes, g, bar):
    """The format of safetensors: the length of a JSON header, the header, the bytes of the tensors. One tensor at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + 2 * shape.numel()]}
        end += 2 * shape.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path + ".tmp", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            flat = torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 and name.endswith("weight") else torch.randn(shape, generator=g, dtype=torch.bfloat16).mul_(0.02)
            for part in flat.flatten().split(2**25):
                f.write(part.view(torch.uint8).numpy().data)
                bar.update(part.nbytes)
    os.replace(path + ".tmp", path)


def stand_in_tokenizer(n, base):
    """-> the document of a tokenizer.json: byte-level BPE, trained here and now on the words of this repository."""
    from train_tiny import PATTERN, train_bpe
    texts = []
    for file in ("README.md", "dkv_min.py", "model.py", "train_tiny.py", "sample.py"):
        with open(os.path.join(ROOT, file), encoding="utf-8") as f:
            texts.append(f.read())
    letters = {b: c for c, b in LETTERS.items()}
    vocab, rank = {}, {}
    for token, i in train_bpe("\n".join(texts), n).items():
        token = "".join(letters[b] for b in token)
        if len(token) > 1:
            rank[tuple(merge(token, rank))] = len(rank)  # the two tokens that it was made of
        vocab[token] = i
    added = special_tokens(base)
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for t, i in added.items()],
            "normalizer": None, "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                                                                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": False, "vocab": vocab | added, "merges": [list(pair) for pair in rank]}}


def main(argv=None):
    from sample import Parser
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dir", metavar="DIR")
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--kv-heads", type=int, help="default: as many as heads")
    p.add_argument("--mlp", type=int, help="hidden width of the MLP (3 times the width)")
    p.add_argument("--qkv-bias", action="store_true")
    p.add_argument("--vocab", type=int, default=1000, help="tokens of the stand-in tokenizer, 256 to 126080 (1000)")
    p.add_argument("--base", action="store_true", help="without the three header tokens, as the base model")
    p.add_argument("--no-tokenizer", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--full", action="store_true", help="LLaDA-8B's size: 16 GB")
    args = p.parse_args(argv)
    if os.path.exists(args.dir) and (not os.path.isdir(args.dir) or os.listdir(args.dir)):
        raise ValueError(f"{args.dir} is there already: give a new or an empty folder")
    if not (1 <= args.layers <= 1000 and 0 <= args.seed < 2**63):
        raise ValueError(f"--layers is {args.layers} and --seed {args.seed}: the one has to be 1 to 1000, the other 0 to 2**63 - 1")
    c = LLADA_8B
    if not args.full:
        c = type(c)(**vars(c) | dict(n_layer=args.layers, n_head=args.heads, n_kv_head=args.heads if args.kv_heads is None else args.kv_heads, n_embd=args.width,
                                     n_ff=3 * args.width if args.mlp is None else args.mlp, qkv_bias=args.qkv_bias))
    if fault := c.fault():
        raise ValueError(f"these sizes do not work: {fault}")
    if not 256 <= args.vocab <= 126080:
        raise ValueError(f"--vocab is {args.vocab}, and has to be 256 to 126080")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in DiffusionLM(c).state_dict().items()}
    names = their_names(c)
    size = 2 * sum(s.numel() for s in shapes.values())
    try:
        os.makedirs(args.dir, exist_ok=True)
        if shutil.disk_usage(args.dir).free < 1.01 * size:
            raise ValueError(f"{args.dir} needs {size / 1e9:.1f} GB, and {shutil.disk_usage(args.dir).free / 1e9:.1f} GB are free")
        files = {name: shard_of(name, c.n_layer) for name in names}
        g = torch.Generator().manual_seed(args.seed)
        with tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1000, desc="writing") as bar:
            for file in sorted(set(files.values())):
                write_shard(os.path.join(args.dir, file), {n: shapes[names[n]] for n in names if files[n] == file}, g, bar)
        docs = {"model.safetensors.index.json": {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}}
        if not args.no_tokenizer:
            docs["tokenizer.json"] = stand_in_tokenizer(args.vocab, args.base)
        docs["config.json"] = {"model_type": "llada", "activation_type": "silu", "alibi": False, "attention_layer_norm": False, "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama",
                               "d_model": c.n_embd, "embedding_size": c.vocab_size, "eos_token_id": c.eos_id, "include_bias": False, "include_qkv_bias": c.qkv_bias, "input_emb_norm": False,
                               "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": c.mask_id, "max_sequence_length": c.max_len, "mlp_hidden_size": c.n_ff, "n_heads": c.n_head,
                               "n_kv_heads": c.n_kv_head, "n_layers": c.n_layer, "pad_token_id": c.eos_id, "rms_norm_eps": c.norm_eps, "rope": True, "rope_full_precision": True,
                               "rope_theta": c.rope_theta, "scale_logits": False, "vocab_size": c.vocab_size, "weight_tying": False}
        for file, doc in docs.items():  # config.json last: with it the folder counts as whole
            with open(os.path.join(args.dir, file), "w", encoding="utf-8") as f:
                json.dump(doc, f, indent=1)
    except OSError as e:
        raise ValueError(f"cannot write to {args.dir}: {first_line(e)}") from None
    print(f"{args.dir}: {len(names)} tensors, {size // 2:,} parameters, {size / 1e9:.2f} GB; python scripts/convert.py {args.dir} --out FILE.pt")
    return 0


if __name__ == "__main__":
    from sample import launch
    launch(main)
