"""How fast the caches are, beside what the positions that they run promise, and beside what the machine allows.

python scripts/bench.py                              random weights, 42 million parameters, batch 1
python scripts/bench.py --preset tiny                the shape of the bundled model
python scripts/bench.py --ckpt my.pt --batch 4 --json out.json
python scripts/bench.py --check                      do the sampled times (below) agree with those of whole runs?
python scripts/bench.py --scale                      growth with the length: 128 to 2048 tokens in all, a quarter of them the prompt
python scripts/bench.py --grid                       is a cache ever slower than none? Both presets, 54 settings: hours
python scripts/bench.py --train                      a training step, beside that of a causal GPT of the same size

All runs in one process, in turn, after a warm-up; medians. Speed does not depend on the weights, so a preset's are random.
No cache and Decode decode by confidence, Greedy in a fixed random order: every run does the same work every time.

seconds     of one run;  tokens/s: generated ones of all prompts
positions   run, per prompt
predicted   gain over no cache by arithmetic: multiplications of the rows that each forward runs through the layers (in the last
            layer all give keys and values, but only those that need logits go on), the head, and the attention
gain        measured;  of it: measured / predicted
outside     share of the time that is not spent in model()
alone       what the same forwards take alone, called one right after the other, over the seconds
floor       what reading the weights once a forward would take, at the speed at which this memory is read, over the seconds
peak        multiplications and additions a second, over those of a large matrix product in the same dtype
memory      the highest during the run: on CUDA what torch has allocated, on a Linux CPU that of the process, weights, Python and
            torch included; elsewhere -
check       --check: seconds by sampling over seconds of whole runs, and, within, over those of the very run that the sampled
            steps are taken from: the first has the machine's moods in it, the second only the error of sampling

Sampling (--sample N; of its own accord where no cache takes over a minute): the loop takes all its steps, but the network runs in
N of those that run everything and in N of those that do not, spread evenly over their arithmetic. The others get random logits
for two ids, at hardly any cost. What a step takes that was left out, in model() and after it, is interpolated between the timed
ones of its kind by the arithmetic, and all steps are added up. Positions and arithmetic are exact.

--train: a step is forward, backward, clipping and train_tiny.py's optimizers, on random tokens. Diffusion masks as in
pretraining; padded: left-padded rows besides, as the word problems have them. The causal GPT has matrices of the same shapes,
is_causal attention and next-token cross entropy on every position. Of the peak: 6 flops a token for each weight but the
embedding's, plus attention (causal: half of it); the optimizers' own products are not counted.
"""
import argparse
import dataclasses
import itertools
import json
import os
import platform
import random
import re
import statistics
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_tiny  # noqa: E402
from dkv_min import check, generate  # noqa: E402
from model import LLADA_8B, Config, DiffusionLM, diffusion_loss, diffusion_noise, load, packed  # noqa: E402
from sample import Parser, launch, pick_device  # noqa: E402

PRESETS = {
    "tiny": Config(n_layer=3, n_head=4, n_kv_head=4, n_embd=256, n_ff=704, vocab_size=512, n_vocab=512, max_len=4096, mask_id=511),
    "42m": Config(n_layer=8, n_head=8, n_kv_head=8, n_embd=512, n_ff=1376, vocab_size=16384, n_vocab=16384, max_len=4096, mask_id=16383),
    "llada-8b": LLADA_8B,
}
GRID = dict(preset=("tiny", "42m"), batch=(1, 4, 16), prompt_len=(16, 64, 512), gen_length=(32, 128, 512))
SLOWER = 0.97  # a gain below this counts as slower than no cache


def build(config, device, dtype):
    """Random weights, made where and as they are used."""
    with torch.device("meta"):
        model = DiffusionLM(config)
    model = model.to(dtype).to_empty(device=device)
    for p in model.parameters():
        p.data.fill_(1) if p.dim() == 1 else p.data.normal_(std=0.02)
    return model.eval().requires_grad_(False)

# ---------------------------------------------------------------------------------------------------------------------
# time, memory, and what the machine can do

def stamp(device):
    """A moment: on CUDA one in its queue of work, so that nothing has to wait for the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(a, b):
    """Seconds. On CUDA both moments have to have passed."""
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1000


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device):
    """-> bytes at most in use since the last call, or None where nobody counts them."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most
    try:
        with open("/proc/self/status") as status, open("/proc/self/clear_refs", "w") as reset:
            most = int(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1]) * 1024
            reset.write("5")
        return most
    except OSError:
        return None


def fastest(device, f):
    f()
    times = []
    for _ in range(5):
        wait(device)
        began = time.perf_counter()
        f()
        wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def bandwidth(device):
    """Bytes a second at which memory is read."""
    x = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)
    return x.nbytes / fastest(device, x.sum)


def work(c, B, n, m, T):
    """Multiplications of a forward that runs n positions, needs logits of m and attends to T."""
    qkv = c.n_embd**2 + 2 * c.n_embd * c.n_kv_head * c.head_dim
    rest = c.n_embd**2 + 3 * c.n_embd * c.n_ff
    return B * (c.n_layer * n * qkv + ((c.n_layer - 1) * n + m) * rest + ((c.n_layer - 1) * n + m) * 2 * c.n_embd * T + m * c.n_embd * c.vocab_size)

# ---------------------------------------------------------------------------------------------------------------------
# timing runs, whole or sampled

class Meter:
    """Stands in for a model: counts and times its calls. Given a set of steps, only those run; it has a config of its own,
    which in the others tells the loop of two ids, so that two logits a position will do."""
    def __init__(self, model, steps=None):
        self.model, self.steps, self.config = model, steps, dataclasses.replace(model.config)
        self.cache, self.calls, self.stamps, self.kept = None, [], [], {}

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, tokens, pos=None, cache=None, rows=None, pad=None):
        B, n = tokens.shape
        m, i, real = n if rows is None else rows.shape[1], len(self.calls), self.steps is None or len(self.calls) in self.steps
        self.config.n_vocab = self.model.config.n_vocab if real else 2
        began = stamp(tokens.device)
        logits = self.model(tokens, pos, cache, rows, pad) if real else torch.rand(B, m, 2, device=tokens.device)
        self.stamps.append((began, stamp(tokens.device)))
        self.calls.append((pos is None, work(self.model.config, B, n, m, n if cache is None else cache.T)))  # kind of the step, arithmetic
        if real:
            self.cache = cache if self.cache is None else self.cache  # those of later blocks have the same shape
            self.kept[i] = tokens, pos, rows, pad
        return logits

    @torch.inference_mode()
    def alone(self):
        """-> what the calls that ran take once more, one right after the other: {step: seconds}"""
        stamps = {}
        with packed(self.model):
            for i, (tokens, pos, rows, pad) in self.kept.items():
                began = stamp(tokens.device)
                self.model(tokens, pos, self.cache, rows, pad)
                stamps[i] = began, stamp(tokens.device)
        wait(tokens.device)
        return {i: between(*pair) for i, pair in stamps.items()}


def spread(calls, n):
    """-> n steps of each kind, evenly spread over its steps in the order of their arithmetic."""
    chosen = set()
    for kind in (True, False):
        steps = sorted((i for i, call in enumerate(calls) if call[0] == kind), key=lambda i: calls[i][1])
        chosen |= {steps[round(j)] for j in np.linspace(0, len(steps) - 1, min(n, len(steps)))}
    return chosen


def add_up(calls, seconds):
    """All steps, from some: {step: seconds}. Exact if it has them all."""
    total = 0.0
    for kind in (True, False):
        timed = {}
        for i, s in seconds.items():
            if calls[i][0] == kind:
                timed.setdefault(calls[i][1], []).append(s)
        if timed:
            total += np.interp([w for k, w in calls if k == kind], sorted(timed), [statistics.mean(timed[w]) for w in sorted(timed)]).sum()
    return float(total)


class Bench:
    """Runs of one model at one setting."""
    def __init__(self, model, batch, prompt_len, gen_length, steps=None, block_length=None):
        steps, L, config = steps or gen_length, block_length or gen_length, model.config
        self.model, self.device, self.batch, self.gen_length = model, model.wte.weight.device, batch, gen_length
        self.shared = dict(gen_length=gen_length, steps=steps, block_length=L)
        rng = random.Random(0)
        ids = [i for i in range(min(256, config.n_vocab)) if i != config.mask_id]
        self.prompts = [[rng.choice(ids) for _ in range(prompt_len)] for _ in range(batch)]
        self.order = [[q for lo in range(prompt_len, prompt_len + gen_length, L) for q in rng.sample(range(lo, lo + L), L)] for _ in self.prompts]

    def run(self, how, steps=None, replay=False, check=()):
        """Once -> (Meter, figures). check: steps of which a sampled run would have to make do."""
        meter = Meter(self.model, steps)
        peak_memory(self.device)
        r = generate(meter, self.prompts, order=self.order if how["cache"] == "greedy" else None, **self.shared | how)
        end = stamp(self.device)
        wait(self.device)
        memory = peak_memory(self.device)
        if not meter.kept:
            return meter, {}
        leave = [began for began, _ in meter.stamps[1:]] + [end]
        inside = {i: between(*meter.stamps[i]) for i in meter.kept}
        after = {i: between(meter.stamps[i][1], leave[i]) for i in meter.kept}
        few = sum(add_up(meter.calls, {i: part[i] for i in check}) for part in (inside, after))
        inside, after = add_up(meter.calls, inside), add_up(meter.calls, after)
        seconds = inside + after + r.seconds - between(meter.stamps[0][0], end)  # the last: what comes before the first step
        figures = dict(seconds=seconds, inside=inside, memory=memory, positions=r.positions_run[0], forwards=r.forwards) | (dict(within=few / (inside + after)) if check else {})
        return meter, figures | (dict(alone=add_up(meter.calls, meter.alone())) if replay else {})

    def compare(self, todo, repeats, sample=None, checked=False, replay=False, label=""):
        """Times the runs in turn. sample None: if no cache takes over a minute; 0: whole runs -> rows of the table, sample."""
        calls = {name: self.run(how, set())[0].calls for name, how in todo.items()}  # nothing runs: only to know the steps
        if sample is None:
            sample = 16 if self.run(todo["none"], spread(calls["none"], 2))[1]["seconds"] > 60 else 0
        kinds = ["whole", "sampled"] if checked else ["sampled" if sample else "whole"]
        found = {(name, kind): [] for name in todo for kind in kinds}
        with tqdm(total=(repeats + 1) * len(found), unit="run", leave=False, disable=None) as bar:
            for repeat, (name, kind) in itertools.product(range(repeats + 1), found):
                bar.set_description(f"{label}{name}, {kind}")
                steps = spread(calls[name], sample or 16)
                figures = self.run(todo[name], steps if kind == "sampled" else None, replay, steps if checked and kind == "whole" else ())[1]
                if repeat:  # the first is the warm-up
                    found[name, kind].append(figures)
                bar.update()
        mid = {key: {k: statistics.median(f[k] for f in all) if isinstance(v, float) else v for k, v in all[0].items()} for key, all in found.items()}
        rows, arithmetic = [], {name: sum(w for _, w in calls[name]) for name in todo}
        for name in todo:
            f, base = mid[name, kinds[0]], mid["none", kinds[0]]
            rows.append(dict(run=name, **f, arithmetic=arithmetic[name], predicted=arithmetic["none"] / arithmetic[name], gain=base["seconds"] / f["seconds"]))
            if checked:
                rows[-1]["check"] = mid[name, "sampled"]["seconds"] / f["seconds"]
        return rows, sample


def runs(block_steps, window, decode, greedy, half=None):
    """-> {name: settings}. A refresh of a block's steps or more is never."""
    found = {"none": dict(cache="none")} | ({"none, half the steps": dict(cache="none", steps=half)} if half else {})
    for cache, refreshes in (("decode", decode), ("greedy", greedy)):
        for r in refreshes:
            never = r is None or r >= block_steps
            found[f"{cache} {'never' if never else r}"] = dict(cache=cache, refresh=block_steps if never else r, window=window)
    return found

# ---------------------------------------------------------------------------------------------------------------------
# the four tables. Each prints its own, and gives what goes into the JSON line

def conditions(args, device, dtype, **more):
    """Printed before anything is timed."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    found = dict(device=name, threads=torch.get_num_threads(), dtype=str(dtype)[6:], repeats=args.repeats, **more, torch=torch.__version__, python=platform.python_version())
    print(", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in found.items()), flush=True)
    return found


def machine(device, dtype):
    """Measures and prints -> bytes read a second, multiplications and additions a second in the run's dtype."""
    speed, peaks = bandwidth(device), {d: train_tiny.matmul_peak(device, d, 8192 if device.type == "cuda" else 2048) for d in dict.fromkeys((torch.float32, dtype))}
    print(f"memory is read at {speed / 1e9:.1f} GB/s; matrix products do " + ", ".join(f"{p / 1e9:,.0f} GFLOP/s in {str(d)[6:]}" for d, p in peaks.items()), flush=True)
    return speed, peaks[dtype]


def prepare(args, device, preset, sizes, **more):
    """Checks the settings of the runs, (prompt_len, gen_length, steps, block_length) of each -> model, conditions."""
    config = load(args.ckpt)[0].config if args.ckpt else PRESETS[preset]
    for P, G, steps, L in sizes:
        check(config, cache="none", remasking="low_confidence", gen_length=G, steps=steps, block_length=L, refresh=1, window=args.window, delay=True, temperature=0, cfg_scale=0, stop_at_eos=False, suppress_eos=None)
        if P + G > config.max_len:
            raise ValueError(f"a prompt of {P} and {G} generated tokens are more than the model's {config.max_len} positions")
    with torch.device("meta"):
        size = sum(q.numel() for q in DiffusionLM(config).parameters())
    dtype = {"auto": torch.float32 if size < 1e9 else torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    how = conditions(args, device, dtype, model=args.ckpt or preset, parameters=size, **more, window=args.window)
    return load(args.ckpt, device, dtype)[0] if args.ckpt else build(config, device, dtype), how


def said(sample):
    return f"seconds by sampling: {sample} steps of each kind are timed, the others interpolated" if sample else "whole runs: every step is timed"


def table(args, device):
    P, G, B = args.prompt_len or 64, args.gen_length or 256, args.batch or 1
    steps, L = G if args.steps is None else args.steps, G if args.block_length is None else args.block_length
    model, how = prepare(args, device, args.preset or "42m", [(P, G, steps, L)], batch=B, prompt_len=P, gen_length=G, steps=steps, block_length=L)
    speed, peak = machine(device, model.wte.weight.dtype)
    block_steps = steps * L // G
    if args.refresh:
        todo = runs(block_steps, args.window, [args.refresh], [args.refresh])
    else:
        todo = runs(block_steps, args.window, [4, 8, 16, None], [2, 4, 8], steps // 2 if block_steps % 2 == 0 else None)
    rows, sample = Bench(model, B, P, G, steps, L).compare(todo, args.repeats, args.sample, args.check, replay=True)
    weights = sum(q.nbytes for n, q in model.named_parameters() if n != "wte.weight")  # of the embedding only some rows are read
    print(said(0 if args.check else sample))
    print(f"\n{'run':20} {'seconds':>8} {'tokens/s':>9} {'positions':>10} {'predicted':>10} {'gain':>7} {'of it':>6} {'outside':>8} {'alone':>6} {'floor':>6} {'peak':>5} {'memory':>8}{'  check  within' * args.check}")
    for r in rows:
        s = r["seconds"]
        r |= dict(tokens_per_s=B * G / s, ratio=r["gain"] / r["predicted"], outside=1 - r["inside"] / s, alone=r["alone"] / s, floor=r["forwards"] * weights / speed / s, peak=2 * r["arithmetic"] / s / peak)
        print(f"{r['run']:20} {s:8.2f} {r['tokens_per_s']:9.1f} {r['positions']:10,} {r['predicted']:9.2f}x {r['gain']:6.2f}x {r['ratio']:6.2f} {r['outside']:8.1%} {r['alone']:6.0%} {r['floor']:6.0%} {r['peak']:5.0%} "
              + (f"{r['memory'] / 1e9:5.2f} GB" if r["memory"] else f"{'-':>8}") + (f" {r['check']:6.3f}  {r['within']:6.3f}" if args.check else ""))
    if args.check:
        print(f"\nseconds by sampling ({sample or 16} steps of each kind) over those of whole runs: {min(r['check'] for r in rows):.3f} to {max(r['check'] for r in rows):.3f}; within the same run: {min(r['within'] for r in rows):.3f} to {max(r['within'] for r in rows):.3f}")
    return dict(conditions=how, sampled=0 if args.check else sample, bandwidth=speed, matmul_peak=peak, runs=rows)


def scale(args, device):
    lengths, refresh, B, found = sorted(set(args.scale)) or [128, 256, 512, 1024, 2048], args.refresh or 8, args.batch or 1, []
    if len(lengths) < 2 or lengths[0] < 4:
        raise ValueError(f"--scale {' '.join(map(str, lengths))}: growth needs two lengths or more, of at least 4 tokens each")
    sizes = {T: (T // 4, T - T // 4) for T in lengths}
    model, how = prepare(args, device, args.preset or "42m", [(P, G, G, G) for P, G in sizes.values()], batch=B)
    sample = 16 if args.sample is None else args.sample
    print(f"the prompt is a quarter of the total length, a step generates a token, one block; {said(sample)}\n")
    print(f"{'total length':>12}  {'run':14} {'seconds':>9} {'positions':>12} {'predicted':>10} {'gain':>8}")
    for T, (P, G) in sizes.items():
        for r in Bench(model, B, P, G).compare(runs(G, args.window, [refresh], [refresh, None]), args.repeats, sample, label=f"length {T}, ")[0]:
            found.append(dict(total_length=T, **r))
            print(f"{T:12}  {r['run']:14} {r['seconds']:9.3f} {r['positions']:12,} {r['predicted']:9.2f}x {r['gain']:7.2f}x", flush=True)
    exponents = {}
    print(f"\ngrows as the total length to the power of\n{'run':14} {'seconds':>8} {'positions':>10} {'arithmetic':>11}")
    for name in dict.fromkeys(r["run"] for r in found):
        mine = [r for r in found if r["run"] == name]
        if len(mine) > 1:  # at the shortest lengths a refresh may be none
            e = exponents[name] = {key: float(np.polyfit(np.log([r["total_length"] for r in mine]), np.log([r[key] for r in mine]), 1)[0]) for key in ("seconds", "positions", "arithmetic")}
            print(f"{name:14} {e['seconds']:8.2f} {e['positions']:10.2f} {e['arithmetic']:11.2f}")
    return dict(conditions=how, sampled=sample, runs=found, exponents=exponents)


def grid(args, device):
    """What is given on the command line stands for all values of it in GRID: for a part, or one cell."""
    axes = {name: values if getattr(args, name) is None else [getattr(args, name)] for name, values in GRID.items()}
    refreshes, found, sample = [args.refresh] if args.refresh else [2, 8], [], 6 if args.sample is None else args.sample
    sizes = [(P, G, G, G) for P in axes["prompt_len"] for G in axes["gen_length"]]
    for preset in [args.ckpt] if args.ckpt else axes["preset"]:
        model, how = prepare(args, device, preset, sizes)
        print(f"gain over no cache; {said(sample)}\n{'batch':>5} {'prompt':>6} {'generated':>9} {'none':>10} " + " ".join(f"{f'{c} {r}':>9}" for c in ("decode", "greedy") for r in refreshes), flush=True)
        for B, (P, G, *_) in itertools.product(axes["batch"], sizes):
            rows, _ = Bench(model, B, P, G).compare(runs(G, args.window, refreshes, refreshes), args.repeats, sample, label=f"batch {B}, {P} + {G}, ")
            found += [dict(model=preset, batch=B, prompt_len=P, gen_length=G, **r) for r in rows]
            print(f"{B:5} {P:6} {G:9} {rows[0]['seconds']:8.2f} s " + " ".join(f"{r['gain']:8.2f}x" for r in rows[1:]), flush=True)
            report = dict(conditions=how, sampled=sample, runs=found)
            write(args.json, json.dumps(report))  # after every cell: the whole takes hours
        print()
    cached = sorted((r for r in found if r["run"] != "none"), key=lambda r: r["gain"])
    slower = [r for r in cached if r["gain"] < SLOWER]
    for r in slower or cached[:1]:
        print(f"{r['gain']:.3f}x: {r['model']}, batch {r['batch']}, prompt {r['prompt_len']}, generated {r['gen_length']}, {r['run']}")
    print(f"{len(slower)} of {len(cached)} below {SLOWER}; the smallest {cached[0]['gain']:.3f}")
    return report


class CausalBlock(nn.Module):
    """As plain as it gets; the matrices have the shapes of model.py's, which is what the optimizer's time depends on."""
    def __init__(self, c):
        super().__init__()
        self.heads = c.n_head
        self.norm, self.mlp_norm = nn.RMSNorm(c.n_embd), nn.RMSNorm(c.n_embd)
        self.q, self.k, self.v, self.o = (nn.Linear(c.n_embd, c.n_embd, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(c.n_embd, c.n_ff, bias=False), nn.Linear(c.n_embd, c.n_ff, bias=False), nn.Linear(c.n_ff, c.n_embd, bias=False)

    def forward(self, x, cos, sin):
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = ((torch.cat([a * cos - b * sin, b * cos + a * sin], -1)).to(v.dtype) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class GPT(nn.Module):
    def __init__(self, c, T):
        super().__init__()
        self.wte, self.norm, self.head = nn.Embedding(c.vocab_size, c.n_embd), nn.RMSNorm(c.n_embd), nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.blocks = nn.ModuleList(CausalBlock(c) for _ in range(c.n_layer))
        angles = torch.arange(T)[:, None] * c.rope_theta ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens):
        x = self.wte(tokens[:, :-1])
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), tokens[:, 1:].flatten())


def train(args, device):
    name, P, G, B = args.preset or "tiny", args.prompt_len or 64, args.gen_length or 64, args.batch or 64
    if name == "llada-8b":
        raise ValueError("--preset llada-8b: --train times tiny and 42m")
    c, T, cpu = PRESETS[name], P + G, torch.cpu.get_capabilities()
    amp = args.dtype == "bfloat16" or args.dtype == "auto" and bool(device.type == "cuda" or cpu.get("amx_bf16") or cpu.get("avx512_bf16"))  # as in train_tiny.py
    flags = argparse.Namespace(**train_tiny.DEFAULTS | dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, prompt_len=P, gen_length=G))
    tokenizer = SimpleNamespace(special={"<|eos|>": c.vocab_size - 2, "<|mask|>": c.vocab_size - 1})
    model, optimizers = train_tiny.build(flags, SimpleNamespace(tokenizer=tokenizer), device.type)
    causal = GPT(c, T).to(device)
    inner = [p for p in causal.blocks.parameters() if p.dim() == 2]
    outer = [p for n, p in causal.named_parameters() if p.dim() == 1 or not n.startswith("blocks")]
    causal_optimizers = [torch.optim.Muon(inner, lr=flags.lr, weight_decay=0.0), torch.optim.AdamW(outer, lr=flags.lr_adam, betas=(0.9, 0.98), weight_decay=0.0)]
    tokens = torch.randint(0, c.vocab_size - 2, (B, T + 1), device=device)
    masked, weight = diffusion_noise(torch.zeros_like(tokens[:, 1:], dtype=torch.bool))
    pad = torch.randint(0, P // 4 + 1, (B,), device=device)
    todo = {"causal GPT": (causal, causal_optimizers, lambda: causal(tokens)),
            "diffusion": (model, optimizers, lambda: diffusion_loss(model, tokens[:, 1:], masked, weight)),
            "diffusion, padded": (model, optimizers, lambda: diffusion_loss(model, tokens[:, 1:], masked, weight, pad))}
    dtype = torch.bfloat16 if amp else torch.float32
    size = sum(p.numel() for p in model.parameters())
    assert size == sum(p.numel() for p in causal.parameters()), "the two models have to have the same size"
    how = conditions(args, device, dtype, model=name, parameters=size, batch=B, length=T, autocast="bfloat16" if amp else "none")
    _, peak = machine(device, dtype)
    found = {run: [] for run in todo}
    for repeat in tqdm(range(args.repeats + 1), unit="round", leave=False, disable=None):  # the first is the warm-up
        for run, (net, opts, loss) in todo.items():
            wait(device)
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            for optimizer in opts:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            wait(device)
            if repeat:
                found[run].append(time.perf_counter() - began)
    rows, base = [], statistics.median(found["causal GPT"])
    print(f"\n{'run':18} {'seconds a step':>14} {'tokens/s':>10} {'over causal':>12} {'of the peak':>12}")
    for run, times in found.items():
        s = statistics.median(times)
        flops = B * T * (6 * (size - c.vocab_size * c.n_embd) + 12 * c.n_layer * c.n_embd * T / (2 if run == "causal GPT" else 1))
        rows.append(dict(run=run, seconds=s, tokens_per_s=B * T / s, over_causal=base / s, of_peak=flops / s / peak))
        print(f"{run:18} {s:14.3f} {B * T / s:10,.0f} {base / s:11.2f}x {flops / s / peak:12.1%}")
    return dict(conditions=how, matmul_peak=peak, runs=rows)


def write(path, line):
    if path:
        try:
            with open(f"{path}.tmp", "w", encoding="utf-8") as f:
                f.write(line + "\n")
            os.replace(f"{path}.tmp", path)
        except OSError as e:
            raise ValueError(f"cannot write --json {path}: {e.strerror}") from None


IDLE = {scale: ("prompt_len", "gen_length", "steps", "block_length"), grid: ("steps", "block_length"), train: ("ckpt", "steps", "block_length", "refresh", "sample")}


def main(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, help="(42m; --train: tiny; --grid: tiny and 42m)")
    p.add_argument("--ckpt", metavar="FILE", help="the weights of a checkpoint instead")
    p.add_argument("--prompt-len", type=int, metavar="TOKENS", help="(64)")
    p.add_argument("--gen-length", type=int, metavar="TOKENS", help="(256; --train: 64)")
    p.add_argument("--steps", type=int, help="(as many as tokens)")
    p.add_argument("--block-length", type=int, metavar="TOKENS", help="(one block)")
    p.add_argument("--batch", type=int, metavar="ROWS", help="(1; --train: 64)")
    p.add_argument("--refresh", type=int, metavar="STEPS", help="this one instead of 4, 8, 16, never and 2, 4, 8 (--scale: 8; --grid: 2 and 8)")
    p.add_argument("--window", type=int, default=4, metavar="TOKENS", help="(4)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: float32 below a billion parameters, else bfloat16; --train: autocast as train_tiny.py")
    p.add_argument("--repeats", type=int, default=3, help="(3)")
    p.add_argument("--sample", type=int, metavar="N", help="time N steps of each kind of a run, 0: all (16 where no cache takes over a minute; --scale: 16; --grid: 6)")
    p.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--check", action="store_true", help="whole runs and sampled ones, in turn")
    g.add_argument("--scale", type=int, nargs="*", metavar="TOKENS", help="growth over these total lengths (128 256 512 1024 2048)")
    g.add_argument("--grid", action="store_true", help="a cache against none; flags that are given choose a part")
    g.add_argument("--train", action="store_true", help="a training step against that of a causal GPT")
    args = p.parse_args(argv)
    for name, low in dict(prompt_len=1, gen_length=1, batch=1, repeats=1, refresh=1, window=0, sample=0).items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, and has to be at least {low}")
    if args.sample == 1:
        raise ValueError("--sample is 1, and has to be 0, every step, or at least 2, to interpolate between")
    if args.json and not os.access(os.path.dirname(os.path.abspath(args.json)), os.W_OK):
        raise ValueError(f"--json {args.json}: there is no such folder, or it cannot be written to")
    mode = scale if args.scale is not None else grid if args.grid else train if args.train else table
    for name in IDLE.get(mode, ()):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect with --{mode.__name__}: leave it out")
    line = json.dumps(mode(args, torch.device(pick_device(args.device))))
    print("\n" + line)
    write(args.json, line)
    return 0


if __name__ == "__main__":
    launch(main)
