"""What each cache loses and saves on the word problems: every run answers the same held-out problems, and is compared with the
run without a cache in the same order and as many steps, problem by problem; runs with fewer steps and no cache with all steps.

python scripts/tradeoff.py                            1,000 problems, 24 runs
python scripts/tradeoff.py --n 100 --ckpt toy.pt
python scripts/tradeoff.py --log outcomes.jsonl       keep every answer; a run that was cut off goes on from there

Prints a table in markdown. Intervals are of 95%: Wilson's for a share, Bonett and Price's (2012) for the difference of two
shares on the same problems. They take all problems for different ones, which holds for the bundled model's (969 of 1,000).
Seconds are left out: sample.py measures those.
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
from dkv_min import generate
from sample import Parser, cut, is_right, launch, load_checkpoint, pick_device

NEVER = 10**6


def runs():
    """-> [(settings, number of the run it is compared with)]"""
    found = [(dict(cache="none"), None), *[(dict(cache="none", steps=1 / k), 0) for k in (2, 4, 8)]]
    for refresh in (8, NEVER):
        found += [(dict(cache="decode", refresh=refresh), 0), (dict(cache="decode", refresh=refresh, delay=False), 0)]
    found += [(dict(cache="decode", refresh=8, steps=1 / 2), 1), (dict(cache="decode", refresh=8, steps=1 / 4), 2)]
    for order in ("left_to_right", "random"):
        base = len(found)
        found += [(dict(cache="none", remasking=order), None)]
        for refresh, window in [(r, w) for r in (2, 4, 8, NEVER) for w in (4, 0)] if order == "left_to_right" else [(2, 4)]:
            found += [(dict(cache="greedy", remasking=order, refresh=refresh, window=window), base)]
        if order == "left_to_right":
            found += [(dict(cache="greedy", remasking=order, refresh=2, delay=False), base)]
            found += [(dict(cache="decode", remasking=order, refresh=8, delay=delay), base) for delay in (True, False)]
    return found


def start_worker(ckpt, device):
    global model, tokenizer
    torch.set_num_threads(1)
    model, tokenizer = load_checkpoint(ckpt, device, "auto")


def answer(how, run, first, n):
    """Run number `run`, which has the settings `how`, on some problems -> dict of lists and counts, `full` being what all
    steps without a cache would run."""
    extra, pairs = model.extra, model.extra["problems"][first:first + n]
    G = extra["gen_length"]
    prompts = [tokenizer.encode(extra["template"].replace("{}", question)) for question, _ in pairs]
    rngs = [torch.Generator().manual_seed(first + j) for j in range(len(pairs))]  # the same random orders for every run
    r = generate(model, prompts, gen_length=G, block_length=extra["block_length"], generator=rngs, **how | dict(steps=round(G * how.get("steps", 1))))
    ids = [tokens[-G:] for tokens in r.tokens]
    right = [is_right(tokenizer.decode(cut(row, model.config)), worked) for row, (_, worked) in zip(ids, pairs)]
    return dict(run=run, first=first, right=right, ids=ids, ran=sum(r.positions_run), full=round(sum(r.positions_full) / how.get("steps", 1)))


def read_log(path, head):
    """-> what an earlier call has logged, {} if there is none. Only a whole line counts."""
    if not path or not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            found, *parts = [json.loads(line) for line in f if line.endswith("\n")]
        if found == head:
            return {(part["run"], part["first"]): part for part in parts}
    except (OSError, ValueError, TypeError, KeyError):  # no log of ours
        pass
    raise ValueError(f"{path} is no log of this checkpoint and these settings: give another name, or delete it")


def weigh(model):
    """A number that tells checkpoints apart."""
    return float(sum(w.double().abs().sum() for w in model.parameters()))


def collect(runs, n, batch_size, ckpt, device, workers, path, head):
    """Answers n problems with every run, in processes -> {(number of the run, first problem): what answer() returns}. With
    a path every answer is logged there at once, below the head, and an earlier call's log is gone on with."""
    workers = workers or (1 if device == "cuda" else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    tasks = [(how, run, first, min(batch_size, n - first)) for first in range(0, n, batch_size) for run, how in enumerate(runs)]
    head = dict(n=n, batch_size=batch_size, device=device) | head
    parts = read_log(path, head)
    left = [task for task in tasks if task[1:3] not in parts]
    if path:
        try:
            with open(f"{path}.tmp", "w", encoding="utf-8") as f:  # without the line that a killed run may have left half written
                print(*map(json.dumps, [head, *parts.values()]), sep="\n", file=f)
            os.replace(f"{path}.tmp", path)
        except OSError as e:
            raise ValueError(f"cannot write {path}: {e.strerror}") from None
    try:
        with open(path or os.devnull, "a", encoding="utf-8") as log, ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (ckpt, device)) as pool:
            done = as_completed([pool.submit(answer, *task) for task in left])
            for future in tqdm(done, total=len(left), unit="batch", mininterval=0.5 if sys.stderr.isatty() else 60):
                part = future.result()
                parts[part["run"], part["first"]] = part
                print(json.dumps(part), file=log, flush=True)
    except BrokenProcessPool:
        raise ValueError("a worker process was killed, perhaps for its memory: try --workers 1; with a log a second call goes on where this one stopped") from None
    return parts


def wilson(k, n, z=1.96):
    """-> the share of k in n and its interval, in percent."""
    middle, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return 100 * k / n, 100 * (middle - half), 100 * (middle + half)


def paired(a, b, z=1.96):
    """How many points more a has than b, both lists of bool on the same problems -> the difference and its interval."""
    n, more, less = len(a), sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))
    p, q = (more + 1) / (n + 2), (less + 1) / (n + 2)
    half = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return 100 * (more - less) / n, max(-100, 100 * (p - q - half)), min(100, 100 * (p - q + half))


def main(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="tiny")
    p.add_argument("--n", type=int, default=1000, help="problems (1000)")
    p.add_argument("--batch-size", type=int, default=50)
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--workers", type=int, default=None, help="processes of one thread each (CPU: one per core; CUDA: 1)")
    p.add_argument("--log", metavar="FILE", help="keep every answer there, as JSON lines, and go on from what it holds")
    args = p.parse_args(argv)
    device = pick_device(args.device)
    m, _ = load_checkpoint(args.ckpt, device, "auto")
    for name in ("n", "batch_size", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, and has to be at least 1")
    if "problems" not in m.extra:
        raise ValueError(f"{args.ckpt} brings no problems with known answers")
    n, dtype, found = min(args.n, len(m.extra["problems"])), str(m.wte.weight.dtype)[6:], runs()
    parts = collect([how for how, _ in found], n, args.batch_size, args.ckpt, device, args.workers, args.log, dict(weights=weigh(m), runs=repr(found)))
    answers = [[pair for first in range(0, n, args.batch_size) for pair in zip(parts[run, first]["right"], parts[run, first]["ids"])] for run in range(len(found))]
    ran, full = ([sum(parts[run, first][key] for first in range(0, n, args.batch_size)) for run in range(len(found))] for key in ("ran", "full"))
    G = m.extra["gen_length"]
    print(f"{n} problems, {G} tokens each, blocks of {m.extra['block_length']}, {device}, {dtype}, batches of {args.batch_size}\n")
    print("| cache | order | steps | refresh | window | exact | against none | fewer positions | same tokens |")
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
    return 0


if __name__ == "__main__":
    launch(main)
