"""The league: decoding rule x cache, all on the same held-out problems, beside autoregression.

python scripts/accuracy.py --batch-size 1             1,000 problems, all caches: hours on a CPU
python scripts/accuracy.py --n 100 --ckpt toy.pt --rules threshold-0.9 --caches decode local
python scripts/accuracy.py --log outcomes.jsonl       keeps every answer; an interrupted run resumes
python scripts/accuracy.py --ckpt my.pt --data my.txt --judge twin.pt          a text instead
python scripts/accuracy.py --data gsm8k.jsonl --few-shot 4 --prompts p.jsonl   for sample.py
python scripts/accuracy.py --data gsm8k.jsonl --few-shot 4 --answers a.jsonl   grades its --out

Prints a table in markdown. A run is compared, problem by problem, with the one without a cache
under the same rule, its positions with those of one token a step without a cache. Caches that a
rule refuses are left out. Intervals are 95%: Wilson's for a share, Bonett and Price's (2012) for
the difference of two shares on the same problems. They assume that all problems are different,
which holds for the bundled model's (969 of 1,000).

"AR, same size" is the line to cross: a causal model of the same shape with random weights that is
made to end where the right answer ends. The runs take turns, batch by batch. tokens/s counts to the
first EOS, times AR is the seconds over AR's; both are medians of a batch.

A text (--judge): the runs continue prompts from its last tenth, which train_tiny.py holds out. A
causal model, train_tiny.py --data my.txt --causal --like my.pt, judges what they write: nats per
byte, lower is better, beside the share of distinct 4-grams of tokens, so that repetition cannot
win. It is the rival too, with its own weights.

GSM8K's format (--data): an object with `question` and `answer` a line, the result after the last
####. The same flags write the prompts, and grade what sample.py --prompts p.jsonl --out a.jsonl
wrote of them. Results are equal as numbers or, where they are not numbers, as texts.
"""
import argparse
import contextlib
import json
import math
import os
import re
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from caches import CACHES, LOOPS
from scripts.bench import same_size
from support.checkpoint import atomic_write
from support.cli import (Parser, check_bounds, check_out, launch, load_checkpoint, load_guider,
                         pick_device)
from support.evaluate import answer_problems, cut, nll
from support.settings import check
from support.text import read_text
from support.watch import label
from support.watch import name as name_of

# --------------------------------------------------------------------------------------------------
# the runs

# steps as a share of the tokens
RULES = {"autoregressive": {}, "one-a-step": dict(remasking="low_confidence"),
         "two-a-step": dict(remasking="low_confidence", steps=1 / 2),
         "four-a-step": dict(remasking="low_confidence", steps=1 / 4),
         "threshold-0.9": dict(threshold=0.9), "threshold-0.99": dict(threshold=0.99),
         "guided": {}, "left-to-right": dict(remasking="left_to_right")}
# the two that go from left to right by themselves: which model runs, and which one guides
RIVALS = {"autoregressive": [dict(model="same size"), dict(model="guider")],
          "guided": [dict(guider="guider", **own) for own in (
              {}, dict(accept="topk_relative"), dict(window=8), dict(window=0))]
          + [dict(accept="self")]}
# the caches that a rule is for, if they are not all
USUAL = {"two-a-step": (), "left-to-right": ("greedy", "autoregressive")}

def settings(model, how):
    """-> settings of generate, in which steps is a number, and window, for guided, a pair."""
    found = {name: model.extra[name] for name in ("gen_length", "block_length")} | how
    found.pop("model", None)
    if how["cache"] in RIVALS:  # they know no other order, and no blocks
        del found["block_length"]
        found["stop_at_eos"] = True
        if found.get("remasking") == "left_to_right":
            del found["remasking"]
    if "steps" in how:
        found["steps"] = round(found["gen_length"] * how["steps"])
    if how["cache"] == "guided" and "window" in how:
        found["window"] = how["window"], found["gen_length"]
    return found

def runs(model, rules=tuple(RULES), names=None, guider=True, **shared):
    """-> [(rule, settings, number of the run to compare with)]. No cache always runs. names: the
    caches of every rule, None: those of USUAL."""
    found = []
    for rule in rules:
        base = None if rule in RIVALS else len(found)
        hows = [dict(cache=rule, **own) for own in RIVALS.get(rule, ())
                if not model.config.causal and (guider or "guider" not in own.values())
                and not (rule == "guided" and shared)]  # it takes no temperature
        known = USUAL.get(rule, CACHES) if names is None else names
        for cache in () if rule in RIVALS else ("none", *(c for c in CACHES[1:] if c in known)):
            more = dict(freecache=[dict(delay=True)])
            if rule == "one-a-step":  # what the delay does
                more |= dict(decode=[dict(delay=False)], local=[dict(delay=False)])
            hows += [dict(cache=cache, **RULES[rule], **own) for own in ({}, *more.get(cache, []))]
        for how in hows:
            how |= shared
            with contextlib.suppress(ValueError):  # the rule refuses this cache
                if rule not in RIVALS:
                    check(model.config, LOOPS, **settings(model, how))
                found.append((rule, how, base))
    return found

def start_worker(args, problems):
    global models, tokenizer, left, warm
    torch.set_num_threads(args.threads)
    model, tokenizer = load_checkpoint(args.ckpt, args.device, "auto")
    model.extra["problems"] = problems
    models, left, warm = {None: model}, [], set()
    if name := args.judge or args.guider:
        models["guider"] = load_guider(name, tokenizer, args.device, "auto")
    models["same size"] = models["guider"] if args.judge else same_size(model)
    for its in models.values():
        its.extra = model.extra

    def end(_, given, logits):  # left: the tokens that each row has yet to write
        if 1 in left:
            logits[torch.tensor(left) == 1, :, model.config.eos_id] = torch.inf
        left[:] = [n - 1 for n in left if n > 1]
    if not args.judge:
        models["same size"].register_forward_hook(end)

def answer(how, run, first, n):
    """Run number `run`, with the settings `how`, on n problems -> dict of lists and counts; `full`
    is what one token a step without a cache would run."""
    model, given = models[how.get("model")], settings(models[None], how)
    if "guider" in given:
        given["guider"] = models["guider"]
    for _ in range(1 if run in warm else 2):  # a worker's first call of each kind is slow
        left[:] = [len(tokenizer.encode(right)) + 1
                   for _, right in model.extra["problems"][first:first + n]]
        a = answer_problems(model, tokenizer, first, n, batch_size=n, **given)
    warm.add(run)
    tokens = sum(min(len(cut(ids, model.config)) + 1, len(ids)) for ids in a.ids)
    return dict(run=run, first=first, right=a.right, ids=a.ids, ran=a.positions_run,
                full=a.positions_full, steps=a.steps, tokens=[tokens], seconds=[a.seconds])

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

def collect(args, runs, problems):
    """Answers the problems with every run, in processes -> what answer() returns for each run,
    joined over its batches. With args.log every answer is logged there at once, after a first line
    with the conditions, and what an earlier call has logged is not answered again."""
    n, size, path = len(problems), args.batch_size, args.log
    head = dict(n=n, batch_size=size, device=args.device, weights=args.weights, runs=repr(runs),
                guider=args.judge or args.guider, data=args.data)
    parts, firsts = read_log(path, head), range(0, n, size)
    left = [(how, run, first, min(size, n - first)) for first in firsts
            for run, (_, how, _) in enumerate(runs) if (run, first) not in parts]
    if path:  # written again without the half line that a killed run may have left
        with atomic_write(path, "w") as f:
            print(*map(json.dumps, [head, *parts.values()]), sep="\n", file=f)
    pool = ProcessPoolExecutor(args.workers, get_context("spawn"), start_worker, (args, problems))
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
    zeros = dict(right=[], ids=[], ran=0, full=0, steps=0, tokens=[], seconds=[])
    return [{key: sum((parts[run, first][key] for first in firsts), zero)
             for key, zero in zeros.items()} for run in range(len(runs))]

# --------------------------------------------------------------------------------------------------
# the table

def wilson(k, n, z=1.96):
    """-> the share of k in n and its interval, in percent."""
    middle = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return 100 * k / n, max(0, 100 * (middle - half)), 100 * (middle + half)

def paired(a, b, z=1.96):
    """a, b: lists of bool on the same problems -> by how many points a is right more often than b,
    and the interval."""
    n, more, less = len(a), sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))
    p, q = (more + 1) / (n + 2), (less + 1) / (n + 2)
    half = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return 100 * (more - less) / n, max(-100, 100 * (p - q - half)), min(100, 100 * (p - q + half))

def mean(values, z=1.96):
    """-> their mean and its interval."""
    middle, half = statistics.mean(values), z * statistics.stdev(values) / math.sqrt(len(values))
    return middle, middle - half, middle + half

FORMS = {"rule": "{}", "cache": "{}", "run": "{}", "answered": "{:,} of {:,}",
         "exact": "{:.1f}% [{:.1f}, {:.1f}]", "against none": "{:+.1f} [{:+.1f}, {:+.1f}]",
         "nats per byte": "{:.3f} [{:.3f}, {:.3f}]",
         "nats against none": "{:+.3f} [{:+.3f}, {:+.3f}]", "distinct 4-grams": "{:.1%}",
         "fewer positions": "{:.2f}x", "forwards": "{:.1f}", "same tokens": "{:.1%}",
         "tokens/s": "{:,.0f}", "times AR": "{:.2f}"}

def print_table(rows):
    """rows: {column: value, or a tuple of them}. Columns without a value are left out."""
    names = [name for name in FORMS if any(row.get(name) is not None for row in rows)]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        values = [(name, row.get(name)) for name in names]
        print("| " + " | ".join("" if v is None else FORMS[name].format(
            *v if isinstance(v, tuple) else (v,)) for name, v in values) + " |")

def row(rule, name, how, mine, base, ar):
    """-> a row of the table, from what collect() has of this run, of the one to compare with and of
    the autoregressive one, which may be None."""
    n, found = len(mine["ids"]), dict(rule=rule.replace("-", " "), cache=name)
    if "nats" in mine:
        found |= {"nats per byte": mean(mine["nats"]), "distinct 4-grams": mine["distinct"]}
    elif how.get("model") != "same size":  # its weights are random
        found["exact"] = wilson(sum(mine["right"]), n)
    if base and base is not mine:
        found |= {"against none": paired(mine["right"], base["right"])} if "exact" in found else {
            "nats against none": mean([x - y for x, y in zip(mine["nats"], base["nats"])])}
        pairs = [pair for ids in zip(mine["ids"], base["ids"]) for pair in zip(*ids)]
        found["same tokens"] = sum(x == y for x, y in pairs) / len(pairs)
    if ar:
        times = [x / y for x, y in zip(mine["seconds"], ar["seconds"])]
        found["times AR"] = statistics.median(times)
    speeds = [x / y for x, y in zip(mine["tokens"], mine["seconds"])]
    return found | {"fewer positions": mine["full"] / mine["ran"], "forwards": mine["steps"] / n,
                    "tokens/s": statistics.median(speeds)}

# --------------------------------------------------------------------------------------------------
# a text

def continuations(path, model, tokenizer, n):
    """n places of the last tenth of the text, evenly spread -> [(prompt, what follows it)]"""
    text, G = read_text(path)[0], model.extra["gen_length"]
    P = model.config.max_len // 2 - G  # as train_tiny.py has them
    ids = tokenizer.encode(text[len(text) * 9 // 10:])
    if len(ids) < P + G:
        raise ValueError(f"--data {path} is too short: its last tenth has {len(ids)} tokens, and a "
                         f"prompt and its continuation need {P + G}")
    starts = [i * (len(ids) - P - G) // max(1, n - 1) for i in range(n)]
    return [(tokenizer.decode(ids[i:i + P]), tokenizer.decode(ids[i + P:i + P + G]))
            for i in starts]

def judge(twin, tokenizer, problems, texts):
    """-> nats: of each text after its prompt, per byte, by the causal model twin; distinct: the
    share of distinct ones among the 4-grams of tokens of all texts"""
    nats = []
    for (prompt, _), text in zip(problems, texts):
        whole, given = (nll(twin, tokenizer.encode(t), 1, None) for t in (prompt + text, prompt))
        nats.append((whole - given) / max(1, len(text.encode())))
    grams = [gram for ids in map(tokenizer.encode, texts)
             for gram in zip(ids, ids[1:], ids[2:], ids[3:])]
    return dict(nats=nats, distinct=len({*grams}) / max(1, len(grams)))

# --------------------------------------------------------------------------------------------------
# problems in GSM8K's format

def read_objects(path, flag, *fields):
    """-> the fields of the objects of a .jsonl file."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return [[json.loads(line)[name] for name in fields] for line in f if line.strip()]
    except OSError as e:
        raise ValueError(f"cannot read {flag} {path}: {e.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{flag} {path} needs an object with {' and '.join(fields)} on each line, "
                         "in UTF-8") from None

def prompts_of(args):
    """-> [(prompt, answer)]"""
    pairs, N = read_objects(args.data, "--data", "question", "answer"), args.few_shot
    shots = read_objects(args.shots, "--shots", "question", "answer") if args.shots else pairs
    pairs = pairs if args.shots else pairs[N:]
    if len(shots) < N or not pairs:
        raise ValueError(f"--few-shot {N} needs more problems than there are: lower it")
    given = "".join(f"Question: {question}\nAnswer: {answer}\n\n"
                    for question, answer in shots[:N])
    return [(f"{given}Question: {question}\nAnswer:" if N else str(question), str(answer))
            for question, answer in pairs[:args.n]]

def result_of(text, pattern):
    """What the last match of the pattern holds, in its last group if it has one, else the text ->
    a number where it is one, else a text."""
    *_, found = [text, *(m[m.lastindex or 0] for m in re.finditer(pattern, text) if m[0])]
    found = found.strip().replace(",", "").strip("$").removesuffix(".")
    try:
        return float(found)
    except ValueError:
        return found

def grade(args):
    """Prints a line for each run that the file of answers has."""
    rights, found = dict(prompts_of(args)), {}
    fields = "prompt", "text", "settings", "steps", "positions_run", "positions_full"
    for prompt, text, how, *counts in read_objects(args.answers, "--answers", *fields):
        if prompt not in rights:
            raise ValueError(f"--answers {args.answers} has a prompt that --data does not give: "
                             "repeat the flags of --prompts")
        right = result_of(rights[prompt], HASHES)
        try:
            said = result_of(text.split("\nQuestion:")[0], args.pattern)  # a base model asks on
            found.setdefault(name_of(how), []).append((said == right, *counts))
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"--answers {args.answers} is not an --out of sample.py") from None
    rows = []
    for name, answers in found.items():
        n, (right, steps, ran, full) = len(answers), map(sum, zip(*answers))
        rows.append({"run": name, "answered": (n, len(rights)), "exact": wilson(right, n),
                     "forwards": steps / n, "fewer positions": full / ran})
    print_table(rows)

# --------------------------------------------------------------------------------------------------
# the command

HASHES = r"####\s*([^#\n]*)"

def parser(doc, n=None):
    """With the flags that figures.py has too."""
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="tiny")
    p.add_argument("-n", "--n", type=int, default=n, help="problems or texts "
                   f"({n or '1,000; with --judge 200; of a .jsonl all'})")
    p.add_argument("--device", metavar="auto|cpu|cuda|cuda:N|mps", default="auto")
    return p

def load_problems(args):
    """-> model, tokenizer. Sets args.device and args.n to those that are used, and args.weights to
    a number that tells checkpoints apart. With --data the problems are texts to continue."""
    args.device = pick_device(args.device)
    model, tokenizer = load_checkpoint(args.ckpt, args.device, "auto")
    lengths = {"gen_length", "block_length"} <= model.extra.keys() and tokenizer is not None
    if lengths and vars(args).get("data"):
        model.extra["problems"] = continuations(args.data, model, tokenizer, args.n)
    if not lengths or "problems" not in model.extra:
        raise ValueError(f"{args.ckpt} has no problems with known answers: give another --ckpt, or "
                         "a text with --data and --judge")
    model.extra["problems"] = model.extra["problems"][:args.n]
    args.n = len(model.extra["problems"])
    args.weights = float(sum(w.double().abs().sum() for w in model.parameters()))
    return model, tokenizer

def league(args):
    model, tokenizer = load_problems(args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.workers = args.workers or (1 if args.device == "cuda" else max(1, cores // args.threads))
    if args.guider is None and args.ckpt == "tiny":
        args.guider = "guider"
    twin = args.judge or args.guider
    twin = load_guider(twin, tokenizer, args.device, "auto") if twin else None  # or refused here
    more = dict(temperature=args.temperature) if args.temperature else {}
    found = runs(model, [*dict.fromkeys(args.rules)], args.caches, args.guider, **more)
    problems = model.extra["problems"]
    joined = collect(args, found, problems)
    if args.judge:
        for run in joined:
            run |= judge(twin, tokenizer, problems, [*map(tokenizer.decode, run["ids"])])
    how = dict(n=args.n, gen_length=model.extra["gen_length"], batch_size=args.batch_size,
               block_length=model.extra["block_length"], device=args.device, workers=args.workers,
               threads=args.threads, dtype=str(model.wte.weight.dtype)[6:], model=args.ckpt, **more)
    print(", ".join(f"{name} {value}" for name, value in how.items()), end="\n\n")
    ar, rows = None, []
    for (rule, its, base), mine in zip(found, joined):
        ar = mine if its.get("model") == "same size" else ar
        name = label(settings(model, its)) + f", {its.get('model')}".removesuffix(", None")
        rows.append(row(rule, name, its, mine, None if base is None else joined[base], ar))
    if args.judge:
        texts = judge(twin, tokenizer, problems, [text for _, text in problems])
        rows.append({"rule": "held-out text", "nats per byte": mean(texts["nats"]),
                     "distinct 4-grams": texts["distinct"]})
    print_table(rows)
    if args.json is not None:
        with atomic_write(args.json, "w") as f:
            json.dump(dict(conditions=how, runs=rows), f, indent=0)

def main(argv=None):
    p = parser(__doc__)
    p.add_argument("--batch-size", type=int, default=50, help="problems answered at once (50)")
    p.add_argument("--workers", type=int, help="processes (CPU: one per core; CUDA: 1)")
    p.add_argument("--threads", type=int, default=1, help="of each (1)")
    p.add_argument("--guider", metavar="NAME", help="of the guided runs (guider, for tiny)")
    p.add_argument("--log", metavar="FILE", help="keep every answer there, and resume")
    p.add_argument("--json", metavar="FILE", help="write the table there too, for figures.py")
    for flag, all_, usual in ("--rules", RULES, tuple(RULES)), ("--caches", CACHES, None):
        p.add_argument(flag, nargs="+", choices=all_, default=usual, metavar="NAME",
                       help=f"of {', '.join(all_)} (all; of two-a-step and left-to-right few)")
    p.add_argument("--data", metavar="FILE", help="a text, with --judge, or problems")
    p.add_argument("--judge", metavar="FILE", help="a causal model")
    p.add_argument("--temperature", type=float, default=0.0, help="(0)")
    p.add_argument("--prompts", metavar="FILE", help="write the prompts of --data there")
    p.add_argument("--answers", metavar="FILE", help="grade this --out of sample.py")
    p.add_argument("--few-shot", type=int, default=0, metavar="N", help="solved ones before it (0)")
    p.add_argument("--shots", metavar="FILE", help="which has them (the first lines of --data)")
    p.add_argument("--pattern", default=HASHES, metavar="REGEX",
                   help="the result is the last match's last group ('#### RESULT')")
    args = p.parse_args(argv)
    check_bounds(args, n=2 if args.judge else 1, batch_size=1, workers=1, threads=1, few_shot=0,
                 temperature=(0, 1e6))
    for flag in "log", "json", "prompts":
        if getattr(args, flag) is not None:
            check_out(getattr(args, flag), f"--{flag}")
    ours = args.judge, args.prompts, args.answers, args.shots, args.few_shot
    if any(ours) and not args.data:
        raise ValueError("--judge, --prompts, --answers, --shots and --few-shot need --data FILE")
    if args.data and [args.judge, args.prompts, args.answers].count(None) != 2:
        raise ValueError("--data needs one of --judge, --prompts and --answers: give one")
    if not args.data or args.judge:
        args.n = args.n or (200 if args.judge else 1000)
        league(args)
    elif args.answers:
        try:
            re.compile(args.pattern)
        except re.error as e:
            raise ValueError(f"--pattern {args.pattern} is no regular expression: {e}") from None
        grade(args)
    else:
        found = prompts_of(args)
        with atomic_write(args.prompts, "w") as f:
            for prompt, _ in found:
                print(json.dumps({"prompt": prompt}), file=f)
        print(f"{args.prompts}: {len(found):,} prompts, for sample.py --prompts {args.prompts}")
    return 0

if __name__ == "__main__":
    launch(main)
