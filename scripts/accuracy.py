"""What each cache loses and saves on the word problems, all runs on the same held-out ones.

python scripts/accuracy.py                            1,000 problems, 24 runs: up to an hour
python scripts/accuracy.py --n 100 --ckpt toy.pt
python scripts/accuracy.py --log outcomes.jsonl       keeps every answer; an interrupted run resumes

A run is compared, problem by problem, with the run without a cache in the same order and as many
steps; a run with fewer steps and no cache is compared with all steps. Prints a table in markdown.
Intervals are 95%: Wilson's for a share, Bonett and Price's (2012) for the difference of two shares
on the same problems. They assume that all problems are different, which holds for the bundled
model's (969 of 1,000). sample.py measures seconds; this script does not.
"""
import argparse
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from support.checkpoint import atomic_write
from support.cli import Parser, check_bounds, check_out, launch, load_checkpoint, pick_device
from support.evaluate import answer_problems

NEVER = 10**6  # a refresh of a block's steps or more never happens

def runs():
    """-> [(settings, steps as a share of the tokens; number of the run to compare with)]"""
    found = [(dict(cache="none", steps=1 / k), 0 if k > 1 else None) for k in (1, 2, 4, 8)]
    found += [(dict(cache="decode", refresh=refresh, delay=delay), 0)
              for refresh in (8, NEVER) for delay in (True, False)]
    found += [(dict(cache="decode", refresh=8, steps=1 / k), i) for i, k in ((1, 2), (2, 4))]

    base, order = len(found), dict(remasking="left_to_right")
    greedy = [dict(refresh=r, window=w) for r in (2, 4, 8, NEVER) for w in (4, 0)]
    cached = [dict(cache="greedy") | own for own in [*greedy, dict(refresh=2, delay=False)]]
    cached += [dict(cache="decode", refresh=8, delay=delay) for delay in (True, False)]
    found += [(dict(cache="none") | order, None), *((how | order, base) for how in cached)]

    base, order = len(found), dict(remasking="random")
    return found + [(dict(cache="none") | order, None),
                    (dict(cache="greedy", refresh=2) | order, base)]

def start_worker(ckpt, device):
    global model, tokenizer
    torch.set_num_threads(1)
    model, tokenizer = load_checkpoint(ckpt, device, "auto")

def answer(how, run, first, n):
    """Run number `run`, with the settings `how`, on n problems -> dict of lists and counts; `full`
    is what all steps without a cache would run."""
    share = how.get("steps", 1)
    steps = round(model.extra["gen_length"] * share)
    a = answer_problems(model, tokenizer, first, n, batch_size=n, **how | dict(steps=steps))
    return dict(run=run, first=first, right=a.right, ids=a.ids,
                ran=a.positions_run, full=round(a.positions_full / share))

def read_log(path, head):
    """-> what an earlier call has logged, {} if there is nothing. Only a whole line counts."""
    if not path or not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            found, *parts = [json.loads(line) for line in f if line.endswith("\n")]
        if found == head:
            return {(part["run"], part["first"]): part for part in parts}
    except (OSError, ValueError, TypeError, KeyError):  # not a log of ours
        pass
    raise ValueError(f"{path} is not a log of this checkpoint and these settings: "
                     "give another name, or delete it")

def collect(args, runs, path, text):
    """Answers args.n problems with every run, in processes -> what answer() returns for each run,
    joined over its batches. With a path every answer is logged there at once, after a first line
    with `text` and the conditions, and what an earlier call has logged is not answered again."""
    n, size, firsts = args.n, args.batch_size, range(0, args.n, args.batch_size)
    head = dict(n=n, batch_size=size, device=args.device, weights=args.weights, runs=text)
    parts = read_log(path, head)
    left = [(how, run, first, min(size, n - first)) for first in firsts
            for run, how in enumerate(runs) if (run, first) not in parts]
    if path:  # written again without the half line that a killed run may have left
        with atomic_write(path, "w") as f:
            print(*map(json.dumps, [head, *parts.values()]), sep="\n", file=f)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = args.workers or (1 if args.device == "cuda" else cores)
    spawn, seconds = get_context("spawn"), 0.5 if sys.stderr and sys.stderr.isatty() else 60
    pool = ProcessPoolExecutor(workers, spawn, start_worker, (args.ckpt, args.device))
    try:
        with open(path or os.devnull, "a", encoding="utf-8") as log, pool:
            done = as_completed([pool.submit(answer, *task) for task in left])
            for future in tqdm(done, total=len(left), unit="batch", mininterval=seconds):
                part = future.result()
                parts[part["run"], part["first"]] = part
                print(json.dumps(part), file=log, flush=True)
    except BrokenProcessPool:
        raise ValueError("a worker process was killed, perhaps because memory ran out: "
                         "try --workers 1 (with a log, the same command resumes)") from None
    zeros = dict(right=[], ids=[], ran=0, full=0)
    return [{key: sum((parts[run, first][key] for first in firsts), zero)
             for key, zero in zeros.items()} for run in range(len(runs))]

def wilson(k, n, z=1.96):
    """-> the share of k in n and its interval, in percent."""
    middle = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return 100 * k / n, 100 * (middle - half), 100 * (middle + half)

def paired(a, b, z=1.96):
    """a, b: lists of bool on the same problems -> by how many points a is right more often than b,
    and the interval."""
    n, more, less = len(a), sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))
    p, q = (more + 1) / (n + 2), (less + 1) / (n + 2)
    half = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return 100 * (more - less) / n, max(-100, 100 * (p - q - half)), min(100, 100 * (p - q + half))

def row(how, mine, base, G):
    """A line of the table, from the answers of this run and of the one to compare with, or None."""
    share, low, high = wilson(sum(mine["right"]), len(mine["right"]))
    against = same = ""
    if base:
        against = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*paired(mine["right"], base["right"]))
        equal = [x == y for a, b in zip(mine["ids"], base["ids"]) for x, y in zip(a, b)]
        same = f"{100 * sum(equal) / len(equal):.1f}%"
    refresh, order = how.get("refresh", ""), how.get("remasking", "low_confidence")
    cells = [how["cache"] + ("" if how.get("delay", True) else ", no delay"),
             order.replace("_", " "), round(G * how.get("steps", 1)),
             "never" if refresh == NEVER else refresh,
             how.get("window", 4) if how["cache"] == "greedy" else "",
             f"{share:.1f}% [{low:.1f}, {high:.1f}]", against,
             f"{mine['full'] / mine['ran']:.2f}x", same]
    return "| " + " | ".join(map(str, cells)) + " |"

def parser(doc, n):
    """With the flags that figures.py has too."""
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="tiny")
    p.add_argument("--n", type=int, default=n, help=f"problems ({n})")
    p.add_argument("--batch-size", type=int, default=50, help="problems answered at once (50)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--workers", type=int, help="of one thread each (CPU: one per core; CUDA: 1)")
    return p

def load_problems(args):
    """-> model, tokenizer. Sets args.device and args.n to those that are used, and args.weights to
    a number that tells checkpoints apart."""
    args.device = pick_device(args.device)
    model, tokenizer = load_checkpoint(args.ckpt, args.device, "auto")
    if not {"problems", "gen_length", "block_length"} <= model.extra.keys() or tokenizer is None:
        raise ValueError(f"{args.ckpt} has no problems with known answers: give another --ckpt")
    args.n = min(args.n, len(model.extra["problems"]))
    args.weights = float(sum(w.double().abs().sum() for w in model.parameters()))
    return model, tokenizer

def main(argv=None):
    p = parser(__doc__, 1000)
    p.add_argument("--log", metavar="FILE", help="keep every answer there, and resume")
    args = p.parse_args(argv)
    check_bounds(args, n=1, batch_size=1, workers=1)
    if args.log is not None:
        check_out(args.log, "--log")
    model, _ = load_problems(args)
    G, dtype, found = model.extra["gen_length"], model.wte.weight.dtype, runs()
    joined = collect(args, [how for how, _ in found], args.log, repr(found))
    print(f"{args.n} problems, {G} tokens each, blocks of {model.extra['block_length']}, "
          f"{args.device}, {str(dtype)[6:]}, batches of {args.batch_size}\n\n"
          "| cache | order | steps | refresh | window | exact | against none | fewer positions "
          "| same tokens |\n" + "|---" * 9 + "|")
    for (how, base), mine in zip(found, joined):
        print(row(how, mine, None if base is None else joined[base], G))
    return 0

if __name__ == "__main__":
    launch(main)
