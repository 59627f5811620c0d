"""What each cache loses and saves on the word problems: every run answers the same held-out problems, and is compared with the
run without a cache in the same order, problem by problem.

python scripts/tradeoff.py                       1,000 problems, 24 runs: about an hour on two cores
python scripts/tradeoff.py --n 100 --ckpt toy.pt

Prints a table in markdown. Intervals are of 95%: Wilson's for a share, Bonett and Price's (2012) for the difference of two
shares on the same problems. Seconds are left out: sample.py measures those.
"""
import argparse
import json
import math
import os
import sys
from multiprocessing import get_context

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from dkv_min import generate
from sample import Parser, cut, is_right, launch, load_checkpoint, pick_device

NEVER = 10**6


def runs():
    """-> [(settings, number of the run it is compared with)]"""
    found = [(dict(cache="none"), None), (dict(cache="none", steps=1 / 2), 0), (dict(cache="none", steps=1 / 4), 0)]
    for refresh in (4, 8, 16, NEVER):
        found += [(dict(cache="decode", refresh=refresh), 0), (dict(cache="decode", refresh=refresh, delay=False), 0)]
    found += [(dict(cache="decode", refresh=8, steps=1 / 2), 1)]
    for order in ("left_to_right", "random"):
        base = len(found)
        found += [(dict(cache="none", remasking=order), None)]
        for refresh in (2, 4, 8, NEVER) if order == "left_to_right" else (2,):
            found += [(dict(cache="greedy", remasking=order, refresh=refresh, window=window), base) for window in (4, 0)]
        found += [(dict(cache="greedy", remasking=order, refresh=2, delay=False), base)]
    return found


def start_worker(ckpt, device):
    global model, tokenizer
    torch.set_num_threads(1)
    model, tokenizer = load_checkpoint(ckpt, device, "auto")


def answer(task):
    """One run on some problems -> (number of the run, of the first problem, [(right, ids)], positions run, positions of all steps)."""
    run, first, n = task
    how, _ = runs()[run]
    extra, pairs = model.extra, model.extra["problems"][first:first + n]
    G = extra["gen_length"]
    prompts = [tokenizer.encode(extra["template"].replace("{}", question)) for question, _ in pairs]
    rngs = [torch.Generator().manual_seed(first + j) for j in range(len(pairs))]  # the same random orders for every run
    r = generate(model, prompts, gen_length=G, block_length=extra["block_length"], generator=rngs, **how | dict(steps=int(G * how.get("steps", 1))))
    ids = [tokens[-G:] for tokens in r.tokens]
    right = [is_right(tokenizer.decode(cut(row, model.config)), worked) for row, (_, worked) in zip(ids, pairs)]
    return run, first, list(zip(right, ids)), sum(r.positions_run), sum(r.positions_full) / how.get("steps", 1)


def wilson(k, n, z=1.96):
    """-> the share of k in n and its interval, in percent."""
    middle, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return 100 * k / n, 100 * (middle - half), 100 * (middle + half)


def paired(a, b, z=1.96):
    """How many points more a has than b, both lists of bool on the same problems -> the difference and its interval."""
    n, more, less = len(a), sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))
    p, q = (more + 1) / (n + 2), (less + 1) / (n + 2)
    half = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return 100 * (more - less) / n, 100 * (p - q - half), 100 * (p - q + half)


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="tiny")
    p.add_argument("--n", type=int, default=1000, help="problems (1000)")
    p.add_argument("--batch-size", type=int, default=50)
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--workers", type=int, default=None, help="processes of one thread each (CPU: one per core; CUDA: 1)")
    p.add_argument("--json", metavar="FILE", help="also write the outcome of every problem")
    args = p.parse_args()
    device = pick_device(args.device)
    m, _ = load_checkpoint(args.ckpt, device, "auto")
    for name in ("n", "batch_size", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, and has to be at least 1")
    if "problems" not in m.extra:
        raise ValueError(f"{args.ckpt} brings no problems with known answers")
    n, dtype, found = min(args.n, len(m.extra["problems"])), str(m.wte.weight.dtype)[6:], runs()
    workers = args.workers or (1 if device == "cuda" else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    tasks = [(run, first, min(args.batch_size, n - first)) for first in range(0, n, args.batch_size) for run in range(len(found))]
    answers, ran, full = [[None] * n for _ in found], [0] * len(found), [0] * len(found)
    with get_context("spawn").Pool(workers, start_worker, (args.ckpt, device)) as pool:
        for run, first, part, some, all_ in tqdm(pool.imap_unordered(answer, tasks), total=len(tasks), unit="batch", mininterval=0.5 if sys.stderr.isatty() else 60):
            answers[run][first:first + len(part)] = part
            ran[run], full[run] = ran[run] + some, full[run] + all_
    G = m.extra["gen_length"]
    print(f"{n} problems, {G} tokens each, blocks of {m.extra['block_length']}, {device}, {dtype}, batches of {args.batch_size}\n")
    print("| cache | order | steps | refresh | window | exact | against none, same order | fewer positions | same tokens |")
    print("|---|---|---|---|---|---|---|---|---|")
    for run, (how, base) in enumerate(found):
        right = [r for r, _ in answers[run]]
        share, low, high = wilson(sum(right), n)
        against, same = "", ""
        if base is not None:
            against = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*paired(right, [r for r, _ in answers[base]]))
            same = f"{100 * sum(x == y for (_, a), (_, b) in zip(answers[run], answers[base]) for x, y in zip(a, b)) / (n * G):.1f}%"
        refresh = {None: "", NEVER: "never"}.get(how.get("refresh"), how.get("refresh"))
        print(f"| {how['cache']}{'' if how.get('delay', True) else ', no delay'} | {how.get('remasking', 'low_confidence').replace('_', ' ')} | {int(G * how.get('steps', 1))} | {refresh} | "
              f"{how.get('window', 4) if how['cache'] == 'greedy' else ''} | {share:.1f}% [{low:.1f}, {high:.1f}] | {against} | {full[run] / ran[run]:.2f}x | {same} |")
    if args.json:
        with open(f"{args.json}.tmp", "w") as f:
            json.dump([{"settings": how, "base": base, "right": [int(r) for r, _ in answers[run]], "positions_run": ran[run]} for run, (how, base) in enumerate(found)], f)
        os.replace(f"{args.json}.tmp", args.json)
    return 0


if __name__ == "__main__":
    launch(main)
