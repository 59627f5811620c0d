"""What each cache loses and saves under each decoding rule, all on the same held-out problems.

python scripts/accuracy.py                            1,000 problems, 71 runs: hours on a CPU
python scripts/accuracy.py --n 100 --ckpt toy.pt --rules threshold-0.9 --caches decode local
python scripts/accuracy.py --log outcomes.jsonl       keeps every answer; an interrupted run resumes

Prints a table in markdown. A run is compared, problem by problem, with the one without a cache
under the same rule, its positions with those of one token a step without a cache. Caches that a
rule refuses are left out, and guided (bench.py --rivals); a causal model goes from left to right.
Of entropy the share of the steps in which everything runs is printed.
Intervals are 95%: Wilson's for a share, Bonett and Price's (2012) for the difference of two shares
on the same problems. They assume that all problems are different, which holds for the bundled
model's (969 of 1,000). sample.py measures seconds; this script does not.
"""
import argparse
import contextlib
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
from caches import CACHES, LOOPS
from support.checkpoint import atomic_write
from support.cli import Parser, check_bounds, check_out, launch, load_checkpoint, pick_device
from support.evaluate import answer_problems
from support.settings import check

NEVER = 10**6  # a refresh of a block's steps or more never happens

# steps as a share of the tokens
RULES = {"one-a-step": dict(remasking="low_confidence"),
         "two-a-step": dict(remasking="low_confidence", steps=1 / 2),
         "four-a-step": dict(remasking="low_confidence", steps=1 / 4),
         "threshold-0.9": dict(threshold=0.9), "threshold-0.99": dict(threshold=0.99),
         "left-to-right": dict(remasking="left_to_right")}

def settings(model, how):
    """-> settings of generate, in which steps is a number."""
    found = {name: model.extra[name] for name in ("gen_length", "block_length")} | how
    if how.get("remasking") == "left_to_right" and how["cache"] == "autoregressive":
        del found["block_length"], found["remasking"]  # it knows no other way
    return found | {"steps": round(found["gen_length"] * how[key]) for key in how if key == "steps"}

def runs(model, rules=tuple(RULES), names=CACHES):
    """-> [(rule, settings, number of the run to compare with)]. No cache always runs."""
    found = []
    for rule in rules:
        base, more = len(found), dict(freecache=[dict(delay=True)])
        if rule == "one-a-step":  # what the delay and the refresh do
            more |= dict(decode=[dict(refresh=NEVER), dict(delay=False),
                                 dict(refresh=NEVER, delay=False)], local=[dict(delay=False)])
        for cache in ("none", *(name for name in CACHES[1:] if name in names)):
            for own in ({}, *more.get(cache, [])):
                how = dict(cache=cache, **RULES[rule], **own)
                with contextlib.suppress(ValueError):  # the rule refuses this cache
                    check(model.config, LOOPS, **settings(model, how))
                    found.append((rule, how, base))
    return found

def start_worker(ckpt, device):
    global model, tokenizer
    torch.set_num_threads(1)
    model, tokenizer = load_checkpoint(ckpt, device, "auto")

def answer(how, run, first, n):
    """Run number `run`, with the settings `how`, on n problems -> dict of lists and counts; `full`
    is what one token a step without a cache would run, `wide` counts steps that run everything."""
    wide, given = [], settings(model, how)
    if how["cache"] == "entropy":  # only there it is not known ahead. Beyond a row's end x is -1
        given["on_step"] = lambda _, x, ran, new: wide.append((ran | (x < 0)).all(1).sum())
    a = answer_problems(model, tokenizer, first, n, batch_size=n, **given)
    return dict(run=run, first=first, right=a.right, ids=a.ids, ran=a.positions_run,
                full=a.positions_full, steps=a.steps, wide=int(sum(wide)))

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

def collect(args, runs):
    """Answers args.n problems with every run, in processes -> what answer() returns for each run,
    joined over its batches. With args.log every answer is logged there at once, after a first line
    with the conditions, and what an earlier call has logged is not answered again."""
    n, size, path = args.n, args.batch_size, args.log
    head = dict(n=n, batch_size=size, device=args.device, weights=args.weights, runs=repr(runs))
    parts, firsts = read_log(path, head), range(0, n, size)
    left = [(how, run, first, min(size, n - first)) for first in firsts
            for run, (_, how, _) in enumerate(runs) if (run, first) not in parts]
    if path:  # written again without the half line that a killed run may have left
        with atomic_write(path, "w") as f:
            print(*map(json.dumps, [head, *parts.values()]), sep="\n", file=f)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ProcessPoolExecutor(args.workers or (1 if args.device == "cuda" else cores),
                               get_context("spawn"), start_worker, (args.ckpt, args.device))
    seconds = 0.5 if sys.stderr and sys.stderr.isatty() else 60
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
    zeros = dict(right=[], ids=[], ran=0, full=0, steps=0, wide=0)
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

def row(rule, how, mine, base):
    """A line of the table, from the answers of this run and of the one to compare with."""
    n, against, same = len(mine["right"]), "", ""
    share, low, high = wilson(sum(mine["right"]), n)
    if mine is not base:
        against = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*paired(mine["right"], base["right"]))
        equal = [x == y for a, b in zip(mine["ids"], base["ids"]) for x, y in zip(a, b)]
        same = f"{100 * sum(equal) / len(equal):.1f}%"
    words = {("refresh", NEVER): ", never refreshed", ("delay", False): ", no delay",
             ("delay", True): ", delay", ("cache", "entropy"):
             f" ({100 * mine['wide'] / mine['steps']:.0f}% of steps full)"}
    cells = [rule.replace("-", " "), how["cache"] + "".join(words.get(x, "") for x in how.items()),
             f"{share:.1f}% [{low:.1f}, {high:.1f}]", against,
             f"{mine['full'] / mine['ran']:.2f}x", f"{mine['steps'] / n:.1f}", same]
    return "| " + " | ".join(cells) + " |"

def parser(doc, n):
    """With the flags that figures.py has too."""
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="tiny")
    p.add_argument("-n", "--n", type=int, default=n, help=f"problems ({n})")
    p.add_argument("--device", metavar="auto|cpu|cuda|cuda:N|mps", default="auto")
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
    p.add_argument("--batch-size", type=int, default=50, help="problems answered at once (50)")
    p.add_argument("--workers", type=int, help="of one thread each (CPU: one per core; CUDA: 1)")
    p.add_argument("--log", metavar="FILE", help="keep every answer there, and resume")
    for flag, all_ in ("--rules", RULES), ("--caches", CACHES):
        p.add_argument(flag, nargs="+", choices=all_, default=tuple(all_), metavar="NAME",
                       help=f"of {', '.join(all_)} (all)")
    args = p.parse_args(argv)
    check_bounds(args, n=1, batch_size=1, workers=1)
    if args.log is not None:
        check_out(args.log, "--log")
    model, _ = load_problems(args)
    dtype, found = model.wte.weight.dtype, runs(model, dict.fromkeys(args.rules), args.caches)
    joined = collect(args, found)
    print(f"{args.n} problems, {model.extra['gen_length']} tokens each, blocks of "
          f"{model.extra['block_length']}, {args.device}, {str(dtype)[6:]}, batches of "
          f"{args.batch_size}\n\n| rule | cache | exact | against none | fewer positions "
          "| forwards | same tokens |\n" + "|---" * 7 + "|")
    for (rule, how, base), mine in zip(found, joined):
        print(row(rule, how, mine, joined[base]))
    return 0

if __name__ == "__main__":
    launch(main)
