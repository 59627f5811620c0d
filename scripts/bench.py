"""How fast the caches are, beside what arithmetic predicts and what the machine allows.

python scripts/bench.py                     random weights, 42 million parameters, batch 1
python scripts/bench.py --preset tiny       the shape of the bundled model; --ckpt my.pt: a file's
python scripts/bench.py --caches dual local some of the caches, beside none
python scripts/bench.py --scale             growth with the length: 128 to 2048 tokens in all

All runs take turns in one process, after a warm-up; times are medians. A preset's weights are
random. Greedy decodes in a fixed random order, all others by confidence, in blocks of 32 where that
divides --gen-length. Of entropy only the cheapest case is timed, in which no token is doubtful:
"entropy never". Caches that refuse --steps are left out. The autoregressive cache is that of a
causal model of the same size, random weights too. Use an idle machine.

seconds    of one run;  tokens_per_s: generated tokens of all prompts
positions  run, per prompt
predicted  speed-up over no cache if time were proportional to the multiplications of all forwards
gain       measured speed-up;  ratio: gain / predicted
times_ar   seconds over those of the autoregressive model: above 1 is slower than it
outside    share of the time outside model()
floor      time to read the weights once a forward, at this memory's speed, over the seconds
peak       multiply-adds per second, over those of a large matrix product in the same dtype
memory     bytes, the most that torch has allocated during the run on CUDA; elsewhere -

Sampling (--sample N; automatic where no cache takes over a minute): the network runs in N of the
steps that run everything and in N of the others, evenly spread by their arithmetic. The rest get
random logits for two ids, and their time is interpolated between timed steps of the same kind.
"""
import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import random
import re
import sys
import time
import timeit

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from caches import CACHES, LOOPS
from dkv_min import generate
from model import LLADA_8B, Config, DiffusionLM, load
from support.arithmetic import matmul_peak, work
from support.checkpoint import atomic_write
from support.cli import Parser, check_bounds, check_out, launch, pick_device
from support.fast_cpu import pack, pick_dtype
from support.settings import check

PRESETS = {"tiny": Config(n_layer=3, n_head=4, n_kv_head=4, n_embd=256, n_ff=704, vocab_size=512,
                          n_vocab=512, max_len=4096, mask_id=511),
           "42m": Config(n_layer=8, n_head=8, n_kv_head=8, n_embd=512, n_ff=1376, vocab_size=16384,
                         n_vocab=16384, max_len=4096, mask_id=16383),
           "llada-8b": LLADA_8B}
LENGTHS = [128, 256, 512, 1024, 2048]  # of --scale
NEVER = 10**6  # a refresh of a block's steps or more never happens

# how a cache is run: {what its name is followed by: settings}
FORMS = dict(decode={" 8": dict(refresh=8), " never": dict(refresh=NEVER)},
             greedy={" 2": dict(refresh=2), " 8": dict(refresh=8)},
             freecache={"": {}, ", delay": dict(delay=True)},
             entropy={" never": dict(tau=math.inf)},
             autoregressive={"": dict(steps=None, block_length=None)})

def stamp(device):
    """A moment; on CUDA an event in the queue, so that nothing waits for the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

def between(a, b):
    """Seconds. On CUDA it waits for both moments."""
    if isinstance(a, float):
        return b - a
    b.synchronize()
    return a.elapsed_time(b) / 1000

class Meter:
    """Stands in for a model: counts and times its calls. Given a set of steps, only those run; in
    the others its own config has two ids for the loop, so that two logits a position will do."""
    def __init__(self, model, steps=None):
        self.model, self.steps, self.config = model, steps, dataclasses.replace(model.config)
        self.calls, self.entered, self.left, self.ran = [], [], [], []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, tokens, pos=None, cache=None, rows=None, pad=None, seen=None):
        (B, n), c, i = tokens.shape, self.model.config, len(self.calls)
        T = n if cache is None else cache.T
        m, real = n if rows is None else rows.shape[1], self.steps is None or i in self.steps
        self.config.n_vocab = c.n_vocab if real else 2
        self.entered.append(stamp(tokens.device))
        if real:
            logits = self.model(tokens, pos, cache, rows, pad, seen)
            self.ran.append(i)
        else:
            logits = torch.rand(B, m, 2, device=tokens.device)
        self.left.append(stamp(tokens.device))
        # the step's kind (does it run everything?), and its arithmetic
        self.calls.append((n >= T, work(c, B, n, m, T)))
        return logits

    def add_up(self, a, b):
        """Seconds between the moments a and b of each step: measured in those that ran, and
        interpolated by their arithmetic in the others of the same kind."""
        total, ran = 0.0, {*self.ran}
        for kind in {kind for kind, _ in self.calls}:
            steps, times = [i for i, (k, _) in enumerate(self.calls) if k == kind], {}
            for i in ran & {*steps}:
                times.setdefault(self.calls[i][1], []).append(between(a[i], b[i]))
            known, rest = sorted(times), [self.calls[i][1] for i in steps if i not in ran]
            medians = [np.median(times[w]) for w in known]  # so that a stalled step counts once
            total += sum(map(sum, times.values())) + np.interp(rest, known, medians).sum()
        return float(total)

def spread(calls, n):
    """-> n steps of each kind, evenly spread by their arithmetic."""
    chosen = set()
    for kind in (True, False):
        steps = sorted((w, i) for i, (k, w) in enumerate(calls) if k == kind)
        chosen |= {steps[round(j)][1] for j in np.linspace(0, len(steps) - 1, min(n, len(steps)))}
    return chosen

class Bench:
    """Runs of one model at one setting."""
    def __init__(self, model, B, P, G, steps=None, block_length=None):
        self.model, self.device = model, model.wte.weight.device
        self.same = functools.cache(lambda: same_size(model))  # as large again: only where needed
        L = block_length or default_block(G)
        self.size = dict(batch=B, prompt_len=P, gen_length=G, total_length=P + G)
        self.shared = dict(gen_length=G, steps=steps or G, block_length=L)
        rng, ids = random.Random(0), set(range(min(256, model.config.n_vocab)))
        self.prompts = [rng.choices(sorted(ids - {model.config.mask_id}), k=P) for _ in range(B)]
        self.order = [[q for lo in range(P, P + G, L) for q in rng.sample(range(lo, lo + L), L)]
                      for _ in self.prompts]

    def run(self, how, steps=None):
        """Once -> (Meter, figures). steps: those in which the network runs, None: all."""
        meter = Meter(self.same() if how["cache"] == "autoregressive" else self.model, steps)
        order = self.order if how["cache"] == "greedy" else None
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        r = generate(meter, self.prompts, order=order, **self.shared | how)
        end, memory = stamp(self.device), torch.cuda.max_memory_allocated() if cuda else None
        if not meter.ran:
            return meter, {}
        inside = meter.add_up(meter.entered, meter.left)
        after = meter.add_up(meter.left, [*meter.entered[1:], end])
        before = r.seconds - between(meter.entered[0], end)  # what comes before the first step
        figures = dict(seconds=inside + after + before, inside=inside, memory=memory,
                       positions=r.positions_run[0], forwards=r.forwards)
        return meter, figures

    def compare(self, todo, args, columns=None):
        """Times the runs in turn, no cache first, and prints these columns -> rows. args.sample:
        steps of each kind, 0: all; None becomes 16 if no cache takes over a minute, or 0."""
        calls = {}
        for name, how in todo.items():
            with contextlib.suppress(ValueError):  # refused: too many tokens a step
                # an empty set of steps: the network never runs, only to know the steps
                calls[name] = self.run(how, set())[0].calls
        if args.sample is None:
            two = [self.run(todo["none"], spread(calls["none"], 2))[1]["seconds"] for _ in range(2)]
            args.sample = 16 if two[1] > 60 else 0  # the first one warms up
        steps = {name: spread(calls[name], args.sample or 2) for name in calls}
        for name in calls:  # warms up, with every shape that is timed when sampling
            self.run(todo[name], steps[name])
        found, rows = {name: [] for name in calls}, []
        turns = [*itertools.product(range(args.repeats), calls)]
        for _, name in (bar := tqdm(turns, unit="run", leave=False, disable=None)):
            bar.set_description("batch {batch}, length {total_length}, ".format(**self.size) + name)
            found[name].append(self.run(todo[name], steps[name] if args.sample else None)[1])
        for name, (first, *others) in found.items():
            mid = {k: float(np.median([v, *(f[k] for f in others)])) if isinstance(v, float) else v
                   for k, v in first.items()}
            rows.append(self.size | dict(run=name, arithmetic=sum(w for _, w in calls[name])) | mid)
            rows[-1] |= dict(predicted=rows[0]["arithmetic"] / rows[-1]["arithmetic"],
                             gain=rows[0]["seconds"] / rows[-1]["seconds"])
            if columns:
                print(line(columns, rows[-1]), flush=True)
        return rows

def default_block(G):
    return 32 if G % 32 == 0 else G

def runs(names, window, refresh=None, steps=None):
    """-> {name: settings}, no cache first, and with fewer of these steps. refresh: one of
    dKV-Cache's instead of those in FORMS"""
    found = dict(none=dict(cache="none"))
    found |= {f"none, {name} the steps": dict(cache="none", steps=steps // n)
              for name, n in (("half", 2), ("a quarter of", 4)) if steps}
    for cache in names:
        forms = FORMS.get(cache, {"": {}})
        if refresh and cache in ("decode", "greedy", "pd"):
            forms = {f" {refresh}": dict(refresh=refresh)}
        own = dict(cache=cache, **dict(window=window) if cache == "greedy" else {})
        found |= {cache + name: own | form for name, form in forms.items()}
    return found

# fields and formats of the tables
TABLE = dict(run="28", seconds="8.2f", tokens_per_s="12.1f", positions="9,", predicted="9.2f",
             gain="6.2f", ratio="6.2f", times_ar="8.2f", outside="7.1%", floor="5.0%", peak="5.0%",
             memory="14,")
SCALE = dict(total_length="12", run="20", seconds="9.3f", positions="12,", predicted="9.2f",
             gain="8.2f")

def line(columns, row=None):
    """A line of a table, or its head. columns: {field: format}"""
    cells = []
    for name, form in columns.items():
        value, width = name if row is None else row[name], re.match(r"\d+", form)[0]
        if row is None or value is None:
            form = ("<" if name == "run" else ">") + width
        cells.append(f"{'-' if value is None else value:{form}}")
    return " ".join(cells)

def random_weights(model, device, dtype):
    """Weights for a model that has none, made where they are used. EOS is never the likeliest."""
    model.to(dtype).to_empty(device=device)
    for p in model.eval().requires_grad_(False).parameters():
        p.fill_(1) if p.dim() == 1 else p.normal_(std=0.02)
    if model.config.eos_id is not None:
        model.head.weight[model.config.eos_id] = 0
    return pack(model) if device.type == "cpu" else model  # as load() does

def same_size(model):
    """-> a causal model of the same shape, random weights."""
    with torch.device("meta"):
        causal = DiffusionLM(dataclasses.replace(model.config, causal=True, shift=True))
    return random_weights(causal, model.wte.weight.device, model.wte.weight.dtype)

def prepare(args, device, preset, sizes, **more):
    """Checks the settings of all runs, [(prompt_len, gen_length)], and prints the conditions
    -> model, conditions."""
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    with torch.device("meta"):
        model = None if args.ckpt else DiffusionLM(PRESETS[preset])
    model = model or load(args.ckpt, device, dtype or "auto")[0]
    config, size = model.config, sum(p.numel() for p in model.parameters())
    for P, G in sizes:
        check(config, LOOPS, cache="none", gen_length=G, steps=args.steps,
              block_length=args.block_length)
        if P + G > config.max_len:
            raise ValueError(f"a prompt of {P} and {G} generated tokens are more than the model's "
                             f"{config.max_len} positions: shorten one of them")
    if not args.ckpt:
        random_weights(model, device, dtype or pick_dtype(size, torch.bfloat16, device.type))
    chip = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    how = dict(device=chip or platform.machine(), threads=torch.get_num_threads(),
               dtype=str(model.wte.weight.dtype)[6:], repeats=args.repeats,
               model=args.ckpt or preset, parameters=size, **more, window=args.window,
               torch=torch.__version__, python=platform.python_version())
    said = (f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in how.items())
    print(", ".join(said), flush=True)
    return model, how

def said(sample):
    few = f"seconds by sampling: {sample} steps of each kind are timed, the others interpolated"
    return few if sample else "whole runs: every step is timed"

def table(args, device):
    P, G, B = args.prompt_len or 64, args.gen_length or 256, args.batch or 1
    steps, L = args.steps or G, args.block_length or default_block(G)
    args.block_length = L
    model, how = prepare(args, device, args.preset or "42m", [(P, G)], batch=B, prompt_len=P,
                         gen_length=G, steps=steps, block_length=L)
    cuda = device.type == "cuda"
    x = torch.ones(2**30 if cuda else 2**26, device=device)
    speed = x.nbytes / min(timeit.repeat(lambda: x.sum().item(), repeat=6, number=1))
    peak = matmul_peak(device, model.wte.weight.dtype, 8192 if cuda else 2048)
    print(f"memory is read at {speed / 1e9:.1f} GB/s; matrix products do {peak / 1e9:,.0f} GFLOP/s",
          flush=True)
    fewer = steps if not (args.caches or args.refresh) else None
    todo = runs(args.caches or CACHES, args.window, args.refresh, fewer)
    rows = Bench(model, B, P, G, steps, L).compare(todo, args)
    # of the embedding only a few rows are read
    weights = sum(p.nbytes for name, p in model.named_parameters() if name != "wte.weight")
    print(f"{said(args.sample)}\n\n{line(TABLE)}")
    ar = {r["run"]: r["seconds"] for r in rows}.get("autoregressive")
    for r in rows:
        s = r["seconds"]
        r |= dict(tokens_per_s=B * G / s, ratio=r["gain"] / r["predicted"],
                  outside=1 - r["inside"] / s, floor=r["forwards"] * weights / speed / s,
                  peak=2 * r["arithmetic"] / s / peak, times_ar=ar and s / ar)
        print(line(TABLE, r))
    return dict(conditions=how, sampled=args.sample, bandwidth=speed, matmul_peak=peak, runs=rows)

def scale(args, device):
    lengths, B = sorted(set(args.scale)) or LENGTHS, args.batch or 1
    if len(lengths) < 2 or lengths[0] < 4:
        raise ValueError(f"--scale {' '.join(map(str, lengths))}: growth needs at least two "
                         "lengths, of at least 4 tokens each")
    sizes, found = [(T // 4, T - T // 4) for T in lengths], []
    model, how = prepare(args, device, args.preset or "42m", sizes, batch=B)
    print("the prompt is a quarter of the total length, a step generates a token, blocks of "
          f"32 where that divides the rest; {said(args.sample)}\n\n{line(SCALE)}")
    for P, G in sizes:
        todo = runs(args.caches or CACHES, args.window, args.refresh or 8)
        found += Bench(model, B, P, G).compare(todo, args, SCALE)
    return dict(conditions=how, sampled=args.sample, runs=found)

def main(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, help="(42m)")
    p.add_argument("--ckpt", metavar="FILE", help="the weights of a checkpoint instead")
    for flag, unit, text in (
            ("--prompt-len", "TOKENS", "(64)"), ("--gen-length", "TOKENS", "(256)"),
            ("--steps", "STEPS", "(as many as tokens)"), ("--batch", "ROWS", "(1)"),
            ("--block-length", "TOKENS", "(32)"), ("--window", "TOKENS", "of greedy (4)"),
            ("--refresh", "STEPS", "of decode, greedy and pd (8, never; 2, 8; 8. --scale: 8)"),
            ("--repeats", "RUNS", "(3)"),
            ("--sample", "N", "time N steps of each kind of a run, 0: all (16 where no cache takes "
             "over a minute, and with --scale)")):
        p.add_argument(flag, type=int, metavar=unit, help=text)
    p.add_argument("--caches", nargs="+", choices=CACHES, metavar="NAME",
                   help=f"of {', '.join(CACHES)} (all)")
    p.set_defaults(window=4, repeats=3)
    p.add_argument("--device", metavar="auto|cpu|cuda|cuda:N|mps", default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    p.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    p.add_argument("--scale", type=int, nargs="*", metavar="TOKENS",
                   help=f"growth over these total lengths ({' '.join(map(str, LENGTHS))})")
    args = p.parse_args(argv)
    check_bounds(args, prompt_len=1, gen_length=1, batch=1, repeats=1, refresh=1, window=0,
                 sample=0, steps=1, block_length=1)
    if args.sample == 1:
        raise ValueError("--sample is 1, and has to be 0 (every step) or at least 2")
    if args.json is not None:
        check_out(args.json, "--json")
    mode = table
    if args.scale is not None:
        mode, args.sample = scale, 16 if args.sample is None else args.sample
        for name in "prompt_len", "gen_length", "steps", "block_length":
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} has no effect here: leave it out")
    line = json.dumps(mode(args, torch.device(pick_device(args.device))))
    print("\n" + line)
    if args.json is not None:
        with atomic_write(args.json, "w") as f:
            print(line, file=f)
    return 0

if __name__ == "__main__":
    launch(main)
