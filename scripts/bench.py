"""How fast the caches are, beside what the positions that they run promise.

python scripts/bench.py                              random weights, 42 million parameters, batch 1
python scripts/bench.py --preset tiny                the shape of the bundled model
python scripts/bench.py --ckpt my.pt --batch 4 --json out.json

All runs in one process, in turn, after a warm-up; medians. Speed does not depend on the weights, so a preset's are random.
No cache and Decode decode by confidence, Greedy in a fixed random order: every run does the same work every time.

seconds     of one run;  tokens/s: generated ones of all prompts
positions   run, per prompt
predicted   gain over no cache by arithmetic: multiplications of the rows that each forward runs through the layers (in the last
            layer, only those that need logits), the head, and the attention
gain        measured;  of it: measured / predicted
outside     share of the time that is not spent in model()
floor       what reading the weights once a forward would take, at the speed at which this memory is read, over the seconds
"""
import argparse
import json
import os
import platform
import random
import statistics
import sys
import time

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from dkv_min import check, generate  # noqa: E402
from model import LLADA_8B, Config, DiffusionLM, load  # noqa: E402
from sample import Parser, launch, pick_device  # noqa: E402

PRESETS = {
    "tiny": Config(n_layer=3, n_head=4, n_kv_head=4, n_embd=256, n_ff=704, vocab_size=512, n_vocab=512, max_len=4096, mask_id=511),
    "42m": Config(n_layer=8, n_head=8, n_kv_head=8, n_embd=512, n_ff=1376, vocab_size=16384, n_vocab=16384, max_len=4096, mask_id=16383),
    "llada-8b": LLADA_8B,
}


def build(config, device, dtype):
    """Random weights, made where and as they are used."""
    with torch.device("meta"):
        model = DiffusionLM(config)
    model = model.to(dtype).to_empty(device=device)
    for p in model.parameters():
        p.data.fill_(1) if p.dim() == 1 else p.data.normal_(std=0.02)
    return model.eval().requires_grad_(False)


class Meter:
    """Stands in for a model: counts and times its calls."""
    def __init__(self, model):
        self.model, self.config, self.wte, self.calls, self.seconds = model, model.config, model.wte, [], 0.0

    def __call__(self, tokens, pos=None, cache=None, rows=None, pad=None):
        wait(self.wte.weight.device)
        began = time.perf_counter()
        logits = self.model(tokens, pos, cache, rows, pad)
        wait(self.wte.weight.device)
        self.seconds += time.perf_counter() - began
        self.calls.append((*tokens.shape, logits.shape[1], cache.T if cache else tokens.shape[1]))
        return logits


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def work(c, B, n, m, T):
    """Multiplications of a forward that runs n positions, needs logits of m and attends to T."""
    kv, mlp = 2 * c.n_embd * c.n_kv_head * c.head_dim, 3 * c.n_embd * c.n_ff
    rest = 2 * c.n_embd**2 + mlp
    return B * ((c.n_layer - 1) * n * (kv + rest) + n * kv + m * rest + ((c.n_layer - 1) * n + m) * 2 * c.n_embd * T + m * c.n_embd * c.vocab_size)


def runs(steps, window, block_steps):
    """-> [(name, settings)]; of two that would be the same, one."""
    found = [("none", dict(cache="none"))]
    if steps % 2 == 0:
        found += [("none, half the steps", dict(cache="none", steps=steps // 2))]
    for cache, refreshes in (("decode", (4, 8, 16, None)), ("greedy", (2, 4, 8))):
        found += [(f"{cache} {r or 'never'}", dict(cache=cache, refresh=r or steps, **({"window": window} if cache == "greedy" else {}))) for r in refreshes if r is None or r < block_steps]
    return found


def bandwidth(device):
    """Bytes a second at which memory is read."""
    x = torch.ones(2**26, device=device)
    times = []
    for _ in range(5):
        wait(x.device)
        began = time.perf_counter()
        x.sum().item()
        times.append(time.perf_counter() - began)
    return x.nbytes / min(times)


def main(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="42m")
    p.add_argument("--ckpt", metavar="FILE", help="the weights of a checkpoint instead")
    p.add_argument("--prompt-len", type=int, default=64)
    p.add_argument("--gen-length", type=int, default=256)
    p.add_argument("--steps", type=int, help="default: as many as tokens")
    p.add_argument("--block-length", type=int, help="default: one block")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--refresh", type=int, help="this one instead of 4, 8, 16, never and 2, 4, 8")
    p.add_argument("--window", type=int, default=4)
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: float32 below a billion parameters, else bfloat16")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    args = p.parse_args(argv)
    for name in ("prompt_len", "batch", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, and has to be at least 1")
    steps = args.gen_length if args.steps is None else args.steps
    block_length = args.gen_length if args.block_length is None else args.block_length
    device = torch.device(pick_device(args.device))
    config = load(args.ckpt)[0].config if args.ckpt else PRESETS[args.preset]
    shared = dict(gen_length=args.gen_length, steps=steps, block_length=block_length)
    check(config, cache="none", remasking="low_confidence", refresh=args.refresh or 1, window=args.window, delay=True, temperature=0, cfg_scale=0, stop_at_eos=False, suppress_eos=None, **shared)
    if args.prompt_len + args.gen_length > config.max_len:
        raise ValueError(f"--prompt-len {args.prompt_len} and --gen-length {args.gen_length} are more than the model's {config.max_len} positions")
    with torch.device("meta"):
        size = sum(q.numel() for q in DiffusionLM(config).parameters())
    dtype = {"auto": torch.float32 if size < 1e9 else torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    model = load(args.ckpt, device, dtype)[0] if args.ckpt else build(config, device, dtype)
    block_steps = steps * block_length // args.gen_length
    todo = runs(steps, args.window, block_steps)
    if args.refresh:
        todo = todo[:1] + [(f"{c} {args.refresh}", dict(cache=c, refresh=args.refresh, window=args.window)) for c in ("decode", "greedy")]
    rng = random.Random(0)
    prompts = [[rng.choice([i for i in range(256) if i != config.mask_id]) for _ in range(args.prompt_len)] for _ in range(args.batch)]
    blocks = [list(range(lo, lo + block_length)) for lo in range(args.prompt_len, args.prompt_len + args.gen_length, block_length)]
    order = [[q for block in blocks for q in rng.sample(block, block_length)] for _ in prompts]

    conditions = dict(model=args.ckpt or args.preset, parameters=size, device=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(), threads=torch.get_num_threads(),
                      dtype=str(dtype)[6:], batch=args.batch, prompt_len=args.prompt_len, **shared, window=args.window, repeats=args.repeats, torch=torch.__version__, python=platform.python_version())
    print(", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in conditions.items()))
    speed = bandwidth(device)
    weights = sum(q.nbytes for n, q in model.named_parameters() if n != "wte.weight")  # of the embedding only some rows are read
    times, inside, calls = {n: [] for n, _ in todo}, {n: [] for n, _ in todo}, {}
    results = {}
    with tqdm(total=(args.repeats + 1) * len(todo), unit="run", leave=False, disable=None) as bar:
        for repeat in range(args.repeats + 1):  # the first is the warm-up
            for name, how in todo:
                bar.set_description(name)
                meter = Meter(model)
                r = generate(meter, prompts, order=order if how["cache"] == "greedy" else None, **shared | how)
                if repeat:
                    times[name].append(r.seconds)
                    inside[name].append(meter.seconds)
                calls[name], results[name] = meter.calls, r
                bar.update()
    total = {name: sum(work(config, *call) for call in calls[name]) for name in calls}
    base, rows = statistics.median(times["none"]), []
    for name, _ in todo:
        s = statistics.median(times[name])
        rows.append(dict(run=name, seconds=s, tokens_per_s=args.batch * args.gen_length / s, positions=results[name].positions_run[0], predicted=total["none"] / total[name], gain=base / s,
                         ratio=base / s / (total["none"] / total[name]), outside=1 - statistics.median(inside[name]) / s, floor=len(calls[name]) * weights / speed / s, forwards=len(calls[name]),
                         memory=torch.cuda.max_memory_allocated() if device.type == "cuda" else None))
    print(f"memory is read at {speed / 1e9:.1f} GB/s; no cache does {2 * total['none'] / base / 1e9:.0f} GFLOP/s\n")
    print(f"{'run':22} {'seconds':>8} {'tokens/s':>9} {'positions':>10} {'predicted':>10} {'gain':>7} {'of it':>6} {'outside':>8} {'floor':>6}")
    for r in rows:
        print(f"{r['run']:22} {r['seconds']:8.2f} {r['tokens_per_s']:9.1f} {r['positions']:10,} {r['predicted']:9.2f}x {r['gain']:6.2f}x {r['ratio']:6.2f} {r['outside']:8.1%} {r['floor']:6.0%}")
    line = json.dumps(dict(conditions=conditions, bandwidth=speed, runs=rows))
    print("\n" + line)
    if args.json:
        try:
            with open(f"{args.json}.tmp", "w", encoding="utf-8") as f:
                f.write(line + "\n")
            os.replace(f"{args.json}.tmp", args.json)
        except OSError as e:
            raise ValueError(f"cannot write --json {args.json}: {e.strerror}") from None
    return 0


if __name__ == "__main__":
    launch(main)
