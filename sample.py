r"""Sample from a masked diffusion model, with and without a KV cache.

python sample.py                                   held-out questions, some runs, and a table
python sample.py --cache all                       the same with every cache
python sample.py --cache local --threshold 0.99    a step reveals all that is as probable as this
python sample.py --guider guider --cache guided    a small causal model decides how many it reveals
python sample.py --prompt "Anna has 7 boxes of 8 pens. Monday she loses 9. Tuesday she finds 3 \
more. Wednesday she lends 6. How many pens are left?"
python sample.py --watch                           see which positions each step runs
python sample.py --prompts questions.txt --out answers.jsonl       resumes where it stopped
torchrun --standalone --nproc_per_node=2 sample.py --prompts questions.txt --out answers.jsonl
python sample.py --ckpt llada                      asks, fetches LLaDA-8B (16 GB) and converts it
python sample.py --ckpt llada --chat               a conversation
"""
import argparse
import contextlib
import functools
import json
import os
import statistics
import sys

import torch
from tqdm import tqdm

from caches import CACHES, LOOPS
from dkv_min import generate
from support.chat import chat
from support.cli import (Parser, check_bounds, check_out, launch, load_checkpoint, load_guider,
                         loop_flags, pick_device)
from support.evaluate import text_of
from support.plan import note_lengths, plan
from support.processes import answer_file, only_writer, ranks
from support.prompts import draws, find_questions, parse_ids, read_prompts
from support.report import print_json, report
from support.settings import REMASKING, check_prompts
from support.watch import Watch, name

REPEATS = 3  # of a run on the checkpoint's own problems, whose times are short

# --------------------------------------------------------------------------------------------------
# flags

KINDS = ("which positions a step runs, beside all now and then (decode; in the demo some). none: "
         "all; decode: masks, newest tokens; greedy: masks near the next token; prefill: all but "
         "the prompt; pd: decode without it; local: decode in the block; freecache, prefix: from "
         "the block on; dual: the block; window: the first masks, and no step attends far ones; "
         "entropy: masks of the block, and all after a doubtful token; guided: all but the prompt; "
         "autoregressive (a causal model's): the newest token")

def parse_args(argv):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="tiny", metavar="tiny|llada|dream|PATH",
                   help="checkpoint (tiny, which is bundled)")
    p.add_argument("--cache", choices=[*CACHES, "all"], help=KINDS)
    p.add_argument("--guider", metavar="guider|PATH",
                   help="the causal model of --cache guided, with the vocabulary of --ckpt")
    g = p.add_argument_group("prompts (without any: held-out problems or texts of the checkpoint)")
    g.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    g.add_argument("--prompts", metavar="FILE",
                   help="a prompt a line; in a .jsonl objects with a `prompt`; - is stdin")
    g.add_argument("--ids", metavar="1,2,3", help="a prompt as token ids")
    g.add_argument("--raw", action="store_true", help="leave out the checkpoint's template")
    g.add_argument("--chat", action="store_true",
                   help="a conversation: /reset forgets it, /quit ends it, Ctrl-C stops an answer")
    g = p.add_argument_group("decoding")
    g.add_argument("--gen-length", type=int, metavar="TOKENS",
                   help="length of an answer (the checkpoint's, else 128)")
    g.add_argument("--steps", type=int, metavar="N", help="denoising steps (one per token)")
    g.add_argument("--block-length", type=int, metavar="TOKENS",
                   help="decode in blocks, left to right (the checkpoint's, else one block)")
    g.add_argument("--threshold", type=float, metavar="P",
                   help="instead of --steps: reveal tokens that are as probable as this")
    own = dict(dest="set", action="append", default=[])  # texts NAME=VALUE
    g.add_argument("--refresh", **own, type="refresh={}".format, metavar="STEPS|never",
                   help="steps between runs of all (decode, pd 8; greedy 2; window 32; else never)")
    g.add_argument("--window", **own, type="window={}".format, metavar="TOKENS",
                   help="masks: that greedy runs per token (4), window attends (64), entropy runs")
    g.add_argument("--set", **own, metavar="NAME=VALUE", help="any setting that caches/ names")
    g.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token (0)")
    g.add_argument("--top-p", type=float, metavar="P", help="only the likeliest, of this sum (all)")
    g.add_argument("--top-k", type=int, metavar="N", help="only the N likeliest tokens (all)")
    g.add_argument("--schedule", choices=["llada", "dream"],
                   help="how many tokens a step reveals (the checkpoint's, else llada: as many)")
    g.add_argument("--remasking", choices=REMASKING,
                   help="what is revealed first (the checkpoint's, else low_confidence)")
    g.add_argument("--cfg-scale", type=float, default=0.0, help="classifier-free guidance (0: off)")
    g.add_argument("--stop-at-eos", action="store_true", help="no block after one that holds EOS")
    g.add_argument("--suppress-eos", choices=["logits", "confidence"],
                   help="never emit EOS, or reveal positions that propose it last (neither)")
    g.add_argument("--delay", action=argparse.BooleanOptionalAction, help="keep the K/V of the "
                   "step after the one that reveals a token (yes; freecache no)")
    g = p.add_argument_group("running")
    g.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers (0)")
    g.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:N|mps",
                   help="auto: CUDA if there is a GPU (auto)")
    g.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                   help="auto: float32 below 1e9 parameters (bfloat16 from 1e7 on a CPU with AMX),"
                        " else as stored (auto)")
    g.add_argument("--batch-size", type=int, default=8, metavar="PROMPTS", help="at once (8)")
    g.add_argument("--json", action="store_true", help="print a JSON object per prompt and cache")
    g.add_argument("--out", metavar="FILE", help="the same into a file; resumes what it holds")
    g.add_argument("--yes", action="store_true", help="fetch and convert without asking")
    g.add_argument("--watch", type=float, nargs="?", const=0.1, metavar="SECONDS",
                   help="show each step: in a terminal for SECONDS (0.1), in a pipe as a line")
    args = p.parse_args(argv)
    check_args(args)
    return args

def check_args(args):
    args.asked = bool(args.prompt or args.prompts is not None or args.ids is not None)
    # without prompts the demo compares some caches, and a file gets all
    args.unnamed = args.cache is None
    if args.unnamed:
        one = args.asked or args.chat or args.watch is not None
        args.cache = "decode" if one else "all" if args.json or args.out else "demo"
        args.cache = "guided" if args.guider else args.cache
    every = [c for c in CACHES if c != "autoregressive" and (c != "guided" or args.guider)]
    several = dict(all=every, demo=("none", "decode", "local", "greedy"))
    args.caches = several.get(args.cache, [args.cache])
    if args.guider and "guided" not in args.caches:
        raise ValueError(f"--guider has no effect with --cache {args.cache}: leave one of them out")
    check_bounds(args, watch=(0, 60), batch_size=1)
    # the answers go to one place
    if (args.watch is not None) + args.json + bool(args.out) > 1:
        raise ValueError("--watch, --json and --out each take the answers: give one of them")
    if args.chat and (args.json or args.out or args.asked or args.cache == "all"):
        raise ValueError("--chat reads its messages from the terminal and answers with one cache: "
                         "leave out --prompt, --prompts, --ids, --json, --out and --cache all")
    if args.chat and not (sys.stdin and sys.stdout):
        raise ValueError("--chat needs an open stdin and stdout")
    # torchrun's processes share a file, and stdin would reach only the first of them
    if ranks()[1] > 1 and (not args.out or args.prompts == "-"):
        raise ValueError("several processes need --prompts FILE and --out FILE: give both")
    # the work may take hours: a file that cannot be written is refused before it
    if args.out is not None:
        check_out(args.out)
        if args.prompts and os.path.realpath(args.prompts) == os.path.realpath(args.out):
            raise ValueError(f"--out {args.out} is the file of --prompts: give another name")
    args.own = loop_flags(args, LOOPS)

# --------------------------------------------------------------------------------------------------
# the runs

def answer(model, tokenizer, questions, runs, args, repeats, first=0, show=None, share=iter):
    """Answers the questions from number `first` on with every run, batch by batch. show(objects)
    gets those of --json after each batch. share(batches) picks the batches of this process.
    -> answers[run][question] = (ids, Result of its batch, row in it), median seconds[run]"""
    # by run and question, as the batches are interleaved
    answers = [[None] * len(questions) for _ in runs]
    seconds = [[0.0] * repeats for _ in runs]
    batches = range(first, len(questions), args.batch_size)
    # the first call of a model is slow: this one is not timed
    model(torch.full((1, 8), model.config.mask_id, device=model.wte.weight.device))
    # one bar for all, counted in forwards of the model
    rank, world = ranks()
    total = sum(how["steps"] or how["gen_length"] for how, _ in runs) * len(batches) * repeats
    watching = args.watch is not None
    bar = tqdm(total=total, unit="step", leave=False,
               disable=True if rank or watching else None)  # None: shown in a terminal only
    # the others are about as far. A hook that returns a value would replace the output
    model.register_forward_hook(lambda *_: bar.update(world) and None)
    for repeat in range(repeats):
        for start in share(batches):
            numbers = range(start, min(start + args.batch_size, len(questions)))
            prompts = [questions[j][1] for j in numbers]
            # the runs take turns, so that a slow moment of the machine meets all of them
            for i, (how, _) in enumerate(runs):
                bar.set_description(f"{name(how)}, prompt {start + 1} of {len(questions)}")
                watch = Watch(tokenizer, model.config, how, args.watch) if watching else None
                with watch or contextlib.nullcontext():
                    # random numbers belong to a prompt, so that the batch changes no answer
                    generators = [draws(args.seed, j) for j in numbers]
                    result = generate(model, prompts, generator=generators, on_step=watch, **how)
                bar.update(world * ((how["steps"] or how["gen_length"]) - result.forwards))
                seconds[i][repeat] += result.seconds  # of the steps, without loading or printing
                # the ids without the prompt, and where their counts are
                for row, j in enumerate(numbers):
                    answers[i][j] = result.tokens[row][len(prompts[row]):], result, row
            # a finished batch is kept, whatever happens to the next
            if show:
                show([head(j, questions[j], how, args) | body(*answers[i][j], model, tokenizer)
                      for j in numbers for i, (how, _) in enumerate(runs)])
    bar.close()
    return answers, [statistics.median(times) for times in seconds]

def head(index, question, how, args):
    """The fields of --json that are known before the answer is."""
    how = {s: str(v) if str(v) in ("inf", "-inf") else v for s, v in how.items()}  # JSON lacks it
    how |= {"guider": args.guider} if "guider" in how else {}
    settings = {"ckpt": args.ckpt, "dtype": args.dtype, "seed": args.seed, **how}
    return {"index": index, "prompt": question[0], "cache": how["cache"], "settings": settings,
            "prompt_ids": question[1]}

def body(ids, result, row, model, tokenizer):
    """The other fields. seconds are those of the whole batch."""
    read = {"guider_forwards": result.guider_forwards,
            "guider_positions": result.guider_positions[row]} if result.guider_forwards else {}
    return {"ids": ids, "text": text_of(ids, model, tokenizer), "forwards": result.forwards,
            "steps": result.steps[row], "positions_run": result.positions_run[row],
            "positions_full": result.positions_full[row], **read, "seconds": result.seconds}

# --------------------------------------------------------------------------------------------------
# the run

def run(args, texts, ids):
    # load decides what "auto" is, when it knows the size
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    device, guider = pick_device(args.device), None
    model, tokenizer = load_checkpoint(args.ckpt, device, dtype, args.yes)
    if args.guider:
        guider = load_guider(args.guider, tokenizer, device, dtype, args.yes)
    if args.chat and tokenizer is None:
        raise ValueError(f"{args.ckpt} has no tokenizer, so it cannot --chat: use --ids")
    # what is wrong is said before the work, not in the middle
    questions = [] if args.chat else find_questions(args, texts, ids, model.extra, tokenizer)
    runs = plan(args, model.config, model.extra, guider)
    note_lengths(runs[0][0], model.extra)
    if args.chat:
        return chat(model, tokenizer, runs[0][0], args)
    check_prompts(model.config, [ids for _, ids, _ in questions], runs[0][0]["gen_length"])
    if args.watch is not None:
        args.batch_size = 1  # the view has room for one
    # the heads show which answers a file already has
    if args.out:
        heads = [head(j, q, how, args) for j, q in enumerate(questions) for how, _ in runs]
        job = functools.partial(answer, model, tokenizer, questions, runs, args, 1)
        return answer_file(args.out, heads, len(questions), args.batch_size, job)
    # the demo's times are short: medians of some
    graded = all(right is not None for *_, right in questions)
    repeats = REPEATS if graded and not args.json and args.watch is None else 1
    show = print_json if args.json else None
    answers, seconds = answer(model, tokenizer, questions, runs, args, repeats, show=show)
    # --json has printed each batch already
    if not args.json:
        times = seconds if args.watch is None else None  # the view takes time
        batch = min(args.batch_size, len(questions))
        report(model, tokenizer, questions, runs, answers, times, repeats, batch)
    return 0

def main(argv=None):
    args = parse_args(argv)
    # what is wrong with prompts and files is said before 16 GB are fetched
    texts, ids = read_prompts(args.prompt, args.prompts), parse_ids(args.ids)
    with only_writer(args.out):
        return run(args, texts, ids)

if __name__ == "__main__":
    launch(main)
