"""Sample from a masked diffusion model, with and without a delayed KV cache.

python sample.py                                          held-out questions, every cache, and a table
python sample.py --prompt "Anna has 7 boxes of 8 pens. Monday she loses 9. Tuesday she finds 3 more. Wednesday she lends 6. How many pens are left?"
python sample.py --watch                                  see which positions each step runs
python sample.py --prompts questions.txt --out answers.jsonl    goes on where it was interrupted
torchrun --standalone --nproc_per_node=2 sample.py --prompts questions.txt --out answers.jsonl    the same file, from two processes
python sample.py --ckpt llada --cache decode              LLaDA-8B; fetches and converts it first (16 GB), if you say so
python sample.py --ckpt llada --chat
"""
import argparse
import contextlib
import functools
import json
import os
import random
import re
import signal
import statistics
import sys

import torch
from tqdm import tqdm

from dkv_min import CACHES, REFRESH, REMASKING, check, check_prompts, generate
from model import load
from scripts.several import answer_file, first_to_speak, ranks
from scripts.watch import Watch, name, printable

HERE = os.path.dirname(os.path.abspath(__file__))
N_DEMO = 4  # questions of the run without flags, answered in one batch
PROMPTS = ["What is a key-value cache?"]  # for checkpoints that bring neither problems nor prompts
LLADA = ("llada", "llada-base", "llada-1.5")
REPEATS = 3  # of the toy's runs, whose times are short
LONGEST = 400_000  # characters of a prompt: tiktoken breaks down on a million blanks


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parse_args(argv):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="tiny", metavar="tiny|long|llada|llada-base|llada-1.5|PATH", help="checkpoint (tiny; it and long are bundled)")
    p.add_argument("--cache", choices=[*CACHES, "all"], help="default: decode for prompts of yours, all without any")
    g = p.add_argument_group("prompts (none: the checkpoint's own held-out problems or texts)")
    g.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    g.add_argument("--prompts", metavar="FILE", help="one prompt a line, or objects with a `prompt` in a .jsonl; - is stdin")
    g.add_argument("--ids", metavar="1,2,3", help="a prompt as token ids")
    g.add_argument("--raw", action="store_true", help="the prompt as it is, without the checkpoint's template around it")
    g.add_argument("--chat", action="store_true", help="a conversation; /reset forgets it, /quit ends it, Ctrl-C stops an answer")
    g = p.add_argument_group("decoding")
    g.add_argument("--gen-length", type=int, metavar="TOKENS", help="tokens to generate (the checkpoint's, else 128)")
    g.add_argument("--steps", type=int, help="denoising steps (as many as tokens)")
    g.add_argument("--block-length", type=int, metavar="TOKENS", help="the answer is decoded in blocks of so many, left to right (the checkpoint's, else gen_length)")
    g.add_argument("--refresh", metavar="STEPS|never", help="run everything every so many steps of a block (decode 8, greedy 2)")
    g.add_argument("--window", type=int, default=4, metavar="TOKENS", help="masks that greedy runs around a revealed token (4)")
    g.add_argument("--temperature", type=float, default=0.0, help="0: the most probable token (0)")
    g.add_argument("--remasking", choices=REMASKING, help="what is revealed first (low_confidence; greedy: the checkpoint's, else random)")
    g.add_argument("--cfg-scale", type=float, default=0.0, help="classifier-free guidance (0: none)")
    g.add_argument("--stop-at-eos", action="store_true", help="begin no further block behind one that holds the end of the text")
    g.add_argument("--suppress-eos", choices=["logits", "confidence"], help="never emit EOS, or reveal positions that propose it last")
    g.add_argument("--no-delay", action="store_true", help="cache K/V from the step that reveals the token (to see why not to)")
    g = p.add_argument_group("running")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    g.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: float32 below a billion parameters (on a CPU with AMX below ten million, and bfloat16 in between), else as stored")
    g.add_argument("--batch-size", type=int, default=8, metavar="PROMPTS", help="prompts answered at once (8)")
    g.add_argument("--json", action="store_true", help="one JSON object per prompt and cache on stdout, nothing else")
    g.add_argument("--out", metavar="FILE", help="the same objects into a file; if it has some already, goes on behind them")
    g.add_argument("--yes", action="store_true", help="fetch and convert LLaDA without asking")
    g.add_argument("--watch", type=float, nargs="?", const=0.1, metavar="SECONDS", help="show every step, in a terminal for so many seconds (0.1); in a pipe a line a step")
    args = p.parse_args(argv)
    if args.watch is not None:
        if not 0 <= args.watch <= 60:
            raise ValueError(f"--watch is {args.watch}, and has to be 0 to 60 seconds")
        if args.json or args.out:
            raise ValueError("--watch shows what --json and --out write down: leave one of them out")
    if args.out is not None and (not args.out or args.prompts and os.path.exists(args.out) and os.path.exists(args.prompts) and os.path.samefile(args.out, args.prompts)):
        raise ValueError(f"--out {args.out!r} is not the name of a file for answers")
    if args.out and args.json:
        raise ValueError("--json writes to stdout and --out to a file: leave one of them out")
    if args.chat and (args.json or args.out or args.prompt or args.prompts or args.ids or args.cache == "all"):
        raise ValueError("--chat reads its messages from the terminal and answers them with one cache: leave out --prompt, --prompts, --ids, --json, --out and --cache all")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}, and has to be at least 1")
    if args.refresh not in (None, "never"):
        if not args.refresh.isdecimal() or int(args.refresh) < 1:
            raise ValueError(f"--refresh is {args.refresh!r}, and has to be a whole number of at least 1, or never")
    return args


def pick_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here, so use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return "cpu"
    local, n = int(os.environ.get("LOCAL_RANK", 0)) if ranks()[1] > 1 else 0, torch.cuda.device_count()
    if local >= n:
        raise ValueError(f"there are more processes than the {n} GPUs here: give torchrun --nproc_per_node={n}, or --device cpu")
    torch.cuda.set_device(local)
    return "cuda"


def load_checkpoint(name, device, dtype, yes=False):
    """-> model, tokenizer. LLaDA is fetched and converted on first use, if the user agrees."""
    path = os.path.join(HERE, "checkpoints", f"{name}.pt") if name in ("tiny", "long", *LLADA) else name
    if not os.path.exists(path):
        if name not in LLADA:
            raise ValueError(f"there is no checkpoint {path}: give --ckpt tiny, long, {', '.join(LLADA)} or the path of a file")
        from scripts.convert import HUB, ask_user, convert, fetch
        with contextlib.redirect_stdout(sys.stderr):
            convert(fetch(HUB[name], path, ask_user(yes)), path, name=name)
    model, tokenizer = load(path)
    if dtype == "auto":
        size = sum(p.numel() for p in model.parameters())
        amx = device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16")
        dtype = "float32" if size < (1e7 if amx else 1e9) else "bfloat16" if size < 1e9 else None
        if size >= 1e9 and device == "cpu":
            print("note: a model of this size on a CPU takes seconds a step; --device cuda says so where torch finds no GPU", file=sys.stderr)
    return model.to(device=device, dtype=getattr(torch, dtype) if dtype else None), tokenizer


def read_prompts(args):
    """-> list of texts, from the flags. Input that cannot be read, or is no UTF-8: ValueError."""
    texts = list(args.prompt)
    if args.prompts:
        try:
            with (open(0, "rb") if args.prompts == "-" else open(args.prompts, "rb")) as f:
                lines = [line.rstrip("\r") for line in f.read().decode("utf-8-sig").split("\n")]
            lines = [line for line in lines if line.strip()]
            if args.prompts.endswith(".jsonl"):
                lines = [json.loads(line)["prompt"] for line in lines]
        except OSError as e:
            raise ValueError(f"cannot read --prompts {args.prompts}: {e.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"--prompts {args.prompts} is not UTF-8 text") from None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"--prompts {args.prompts}: every line has to be a JSON object with a `prompt`") from None
        texts += lines
        if not texts:
            raise ValueError(f"--prompts {args.prompts} holds no prompt")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"a prompt has to be text, and this is none: {text!r:.80}")
        if not text:
            raise ValueError("a prompt is empty: it needs at least one character")
        if len(text) > LONGEST:
            raise ValueError(f"a prompt has {len(text):,} characters: more than {LONGEST:,} are not read")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"the prompt {text!r:.80} is not UTF-8 text") from None
    return texts


def parse_ids(text):
    try:
        return None if text is None else [int(i) for i in text.split(",")]
    except ValueError:
        raise ValueError(f"--ids is {text!r:.80}, and has to be token ids with commas between them, such as 1,2,3") from None


def cut(ids, config):
    """The ids up to the first end of text or of turn."""
    ends = [i for i, t in enumerate(ids) if t in (config.eos_id, config.eot_id)]
    return ids[:ends[0]] if ends else ids


def is_right(text, answer):
    """Exact match of the whole worked answer, not of its result alone: a right result may stand behind wrong sums."""
    return text.strip() == answer


def encode(turns, tokenizer, extra, raw=False):
    """What the model is given, as ids. turns: texts of the user and of the model, in turn, the user's first and last. In
    a template special tokens are tokens; in what somebody has typed they are text."""
    if extra.get("chat") == "llada" and not raw:
        ids = tokenizer.encode("<|startoftext|>", special=True)
        for i, text in enumerate([*turns, None]):
            ids += tokenizer.encode(f"<|start_header_id|>{'assistant' if i % 2 else 'user'}<|end_header_id|>", special=True)
            ids += tokenizer.encode("\n\n" + (text or "").strip())
            ids += tokenizer.encode("<|eot_id|>", special=True) if text is not None else []
        return ids
    template = "{}" if raw else extra.get("template", "{}")  # the toy's ends a question with a newline
    return tokenizer.encode("".join(text + "\n" if i % 2 else template.replace("{}", text) for i, text in enumerate(turns)))


def find_questions(args, texts, ids, extra, tokenizer):
    """-> [(text, ids, right answer)]: the user's prompts, or else the checkpoint's own, whose answers may be known. What is
    not known is None."""
    pairs = [(text, None) for text in texts]
    if not texts and not ids:
        pairs = extra["problems"][:N_DEMO] if "problems" in extra else [(text, None) for text in extra.get("prompts", PROMPTS)]
        if args.watch is not None:  # one question, to look at
            pairs, args.cache = pairs[:1], args.cache or "decode"
        args.cache = args.cache or "all"
    if pairs and tokenizer is None:
        raise ValueError(f"{args.ckpt} has no tokenizer, so it cannot read text: give the prompt as token ids, with --ids")
    return [(text, encode([text], tokenizer, extra, args.raw), right) for text, right in pairs] + ([(None, ids, None)] if ids else [])


def plan(args, extra, gen_length, steps, block_length):
    """-> [(settings for generate, number of the run it is compared with)]. With --cache all two more runs keep the
    comparison fair: no cache in greedy's order, and half the steps, which saves as much without any cache."""
    known = extra.get("known_order", "random")
    shared = dict(gen_length=gen_length, steps=steps, block_length=block_length, window=args.window, temperature=args.temperature,
                  cfg_scale=args.cfg_scale, stop_at_eos=args.stop_at_eos, suppress_eos=args.suppress_eos, delay=not args.no_delay)

    def settings(cache, order="low_confidence", **more):
        refresh = gen_length if args.refresh == "never" else int(args.refresh or REFRESH[cache])
        return shared | dict(cache=cache, remasking=args.remasking or order, refresh=refresh) | more

    if args.cache != "all":
        return [(settings(args.cache, known if args.cache == "greedy" else "low_confidence"), None)]
    if args.json or args.out:
        return [(settings("none"), None), (settings("decode"), None), (settings("greedy", known), None)]
    runs = [(settings("none"), None), (settings("decode"), 0)]
    if args.remasking:  # one order for all
        runs += [(settings("greedy"), 0)]
    else:
        runs += [(settings("none", known), None), (settings("greedy", known), 2)]
    if steps % 2 == 0 and steps // 2 % max(1, gen_length // max(1, block_length)) == 0:
        runs += [(settings("none", steps=steps // 2), 0)]
    return runs


def table(runs, answers, seconds, questions, right):
    """-> the table under the answers, a line a run. right: how many answers of each run are; None where that is unknown, and
    so are seconds where they do not count."""
    lines = [["cache", "order", "refresh", "steps", "exact", "positions run", "fewer by", "seconds", "tokens/s", "speed-up", "same tokens"]]
    for i, (how, base) in enumerate(runs):
        ran, full = (sum(getattr(result, name)[row] for _, result, row in answers[i]) for name in ("positions_run", "positions_full"))
        full *= runs[0][0]["steps"] / how["steps"]  # half the steps are compared with all of them
        tokens = len(questions) * how["gen_length"]
        never = how["refresh"] >= how["block_length"] * how["steps"] / how["gen_length"]
        line = [how["cache"], how["remasking"], "-" if how["cache"] == "none" else "never" if never else how["refresh"], how["steps"],
                f"{right[i]}/{len(questions)}" if right else "-", f"{ran:,}", f"{full / ran:.2f}x", "-", "-", "-", "-"]
        if seconds:
            line[7:9] = f"{seconds[i]:.2f}", f"{tokens / seconds[i]:,.0f}"
        if base is not None:
            same = sum(x == y for (a, *_), (b, *_) in zip(answers[i], answers[base]) for x, y in zip(a, b))
            line[9:] = f"{seconds[base] / seconds[i]:.2f}x" if seconds else "-", f"{100 * same / tokens:.0f}%"
        lines.append([str(cell) for cell in line])
    drop = ([] if right else [4]) + ([] if seconds else [7, 8, 9])
    lines = [[cell for c, cell in enumerate(line) if c not in drop] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) if c < 2 else cell.rjust(w) for c, (cell, w) in enumerate(zip(line, widths))) for line in lines)

# ---------------------------------------------------------------------------------------------------------------------
# the run

def draws(args, index):
    """What is random belongs to the prompt, by seed and index: answers do not depend on the batch."""
    return torch.Generator().manual_seed(random.Random(f"{args.seed} {index}").getrandbits(32))


def answer(model, tokenizer, questions, runs, args, repeats, first=0, show=None, share=iter):
    """Answers the questions from number `first` on with every run, in turn, batch by batch; show(objects) gets those of
    --json after each batch. share(batches) picks those that this process answers, of several.
    -> answers[run][question] = (ids, Result of its batch, row in it), seconds[run]: medians of the repeats"""
    answers = [[None] * len(questions) for _ in runs]
    seconds = [[0.0] * repeats for _ in runs]
    batches = range(first, len(questions), args.batch_size)
    model(torch.full((1, 8), model.config.mask_id, device=model.wte.weight.device))  # a first call is slow: not to be timed
    rank, world = ranks()
    bar = tqdm(total=sum(how["steps"] for how, _ in runs) * len(batches) * repeats, unit="step", disable=True if rank or args.watch is not None else None, leave=False)
    model.register_forward_hook(lambda *_: bar.update(world))  # the others are about as far
    for repeat in range(repeats):
        for first in share(batches):
            part = questions[first:first + args.batch_size]
            for i, (how, _) in enumerate(runs):
                bar.set_description(f"{name(how)}, prompt {first + 1} of {len(questions)}")
                with contextlib.nullcontext() if args.watch is None else Watch(tokenizer, model.config, how, args.watch) as view:
                    result = generate(model, [ids for _, ids, _ in part], generator=[draws(args, first + j) for j in range(len(part))], on_step=view, **how)
                seconds[i][repeat] += result.seconds
                for j, (tokens, (_, ids, _)) in enumerate(zip(result.tokens, part)):
                    answers[i][first + j] = tokens[len(ids):], result, j
            if show:
                show([head(j, questions[j], how, args) | body(*answers[i][j], text_of(answers[i][j][0], model, tokenizer))
                      for j in range(first, first + len(part)) for i, (how, _) in enumerate(runs)])
    bar.close()
    return answers, [statistics.median(times) for times in seconds]


def text_of(ids, model, tokenizer):
    return tokenizer.decode(cut(ids, model.config)) if tokenizer else None


def head(index, question, how, args):
    """The fields of --json that are known before the answer is."""
    return {"index": index, "prompt": question[0], "cache": how["cache"], "settings": {"ckpt": args.ckpt, "dtype": args.dtype, "seed": args.seed, **how}, "prompt_ids": question[1]}


def body(ids, result, row, text):
    return {"ids": ids, "text": text, "forwards": result.forwards, "positions_run": result.positions_run[row], "positions_full": result.positions_full[row], "seconds": result.seconds}


def print_json(objects):
    for o in objects:
        print(json.dumps(o), flush=True)


def chat(model, tokenizer, how, args):
    """Reads messages from stdin and answers them, each with what was said before, as far as there is room for it."""
    terminal, turns, n = sys.stdin.isatty(), [], 0
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    print(f"{name(how)}, {how['gen_length']} tokens an answer; /reset forgets what was said, /quit ends, Ctrl-C stops an answer")
    if "chat" not in model.extra:
        print("this model has not learned to talk: what was said before may confuse it")
    while True:
        try:
            text = input("\n> " if terminal else "")
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print("\n/quit ends")
            continue
        if text.strip() in ("/quit", "/reset"):
            if text.strip() == "/quit":
                return 0
            turns = []
            print("what was said is forgotten")
            continue
        if not text.strip():
            continue
        try:
            if len(text) > LONGEST:
                raise ValueError(f"a message has {len(text):,} characters: more than {LONGEST:,} are not read")
            ids, dropped = encode([*turns, text], tokenizer, model.extra, args.raw), 0
            while turns and len(ids) + how["gen_length"] > model.config.max_len:
                turns, dropped = turns[2:], dropped + 1
                ids = encode([*turns, text], tokenizer, model.extra, args.raw)
            if dropped:
                print(f"({dropped} earlier question{'s do' if dropped > 1 else ' does'} not fit any more and {'are' if dropped > 1 else 'is'} forgotten)")
            live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
            with Watch(tokenizer, model.config, how, args.watch or 0, keep=False) if live else contextlib.nullcontext() as view:
                result = generate(model, [ids], generator=draws(args, n), on_step=view, **how)
        except ValueError as e:
            print(printable(str(e)))
            continue
        except KeyboardInterrupt:
            print("(stopped; this question is not kept)")
            continue
        said = text_of(result.tokens[0][len(ids):], model, tokenizer)
        turns, n = [*turns, text, said], n + 1
        print(printable(said).strip() or "(no text)")
        print(f"({len(ids)} tokens before, {result.positions_full[0] / result.positions_run[0]:.2f}x fewer positions run, {result.seconds:.1f} s)", flush=True)


def main(argv=None):
    args = parse_args(argv)
    if ranks()[1] > 1 and (not args.out or args.prompts == "-"):
        raise ValueError("several processes answer a file of prompts into another: give --prompts FILE and --out FILE, or leave out torchrun")
    texts, ids = read_prompts(args), parse_ids(args.ids)  # what is wrong with these is said before 16 GB are fetched
    if args.chat and not (sys.stdin and sys.stdout):
        raise ValueError("--chat needs an open stdin and stdout")
    model, tokenizer = load_checkpoint(args.ckpt, pick_device(args.device), args.dtype, args.yes)
    if args.chat and tokenizer is None:
        raise ValueError(f"{args.ckpt} has no tokenizer, so there is no chatting with it: use --ids")
    questions = [] if args.chat else find_questions(args, texts, ids, model.extra, tokenizer)
    if args.watch is not None:
        args.batch_size = 1
    graded = all(right is not None for _, _, right in questions)

    gen_length = model.extra.get("gen_length", 128) if args.gen_length is None else args.gen_length
    steps = gen_length if args.steps is None else args.steps
    usual = model.extra.get("block_length")
    block_length = args.block_length if args.block_length is not None else usual if usual and gen_length % usual == 0 else gen_length
    args.cache = args.cache or "decode"
    runs = plan(args, model.extra, gen_length, steps, block_length)
    for how, _ in runs:  # what is wrong is said before the work, not in the middle
        check(model.config, **how)
    if args.chat:
        return chat(model, tokenizer, runs[0][0], args)
    check_prompts(model.config, [ids for _, ids, _ in questions], gen_length)
    if args.out:
        heads = [head(j, q, how, args) for j, q in enumerate(questions) for how, _ in runs]
        return answer_file(args.out, heads, len(questions), args.batch_size, functools.partial(answer, model, tokenizer, questions, runs, args, 1))
    repeats = REPEATS if graded and not args.json and args.watch is None else 1
    answers, seconds = answer(model, tokenizer, questions, runs, args, repeats, show=print_json if args.json else None)
    if args.json:
        return 0

    texts = [[text_of(ids, model, tokenizer) for ids, *_ in answered] for answered in answers]
    for i, (question, prompt_ids, right) in enumerate(questions):
        print(printable(question) if question is not None else f"ids {prompt_ids}")
        for (how, _), answered, said in zip(runs, answers, texts):
            mark = "" if right is None else "right  " if is_right(said[i], right) else "wrong  "
            print(f"  {name(how):34}  {mark}{printable(said[i]) if tokenizer else answered[i][0]}")
        print()
    lengths, plural = sorted(len(ids) for _, ids, _ in questions), lambda n, word: f"{n} {word}{'s' * (n != 1)}"
    print(f"{model.wte.weight.device.type}, {plural(torch.get_num_threads(), 'thread')}, {str(model.wte.weight.dtype)[6:]}, {plural(len(questions), 'prompt')} of {' to '.join(map(str, sorted({lengths[0], lengths[-1]})))} tokens in batches of "
          f"{min(args.batch_size, len(questions))}, {gen_length} tokens each (EOS padding included), blocks of {block_length}" + (f", medians of {repeats}" if repeats > 1 else ""))
    print(table(runs, answers, seconds if args.watch is None else None, questions, [sum(is_right(t, q[2]) for t, q in zip(said, questions)) for said in texts] if graded else None))
    return 0


def launch(main):
    """Runs a script's main. What a user got wrong is one sentence on stderr and exit code 2."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character shows its number

    def fail(sentence):
        if first_to_speak():
            sentence = printable(str(sentence)).replace("\n", "\\n")  # it may quote a file or a flag
            print("\n" * (ranks()[1] > 1) + f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr)  # the bar of a process that is gone stands there
        return 2

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # as Ctrl-C, but ends a chat too
    try:
        code = main()
        if sys.stdout:
            sys.stdout.flush()
    except ValueError as e:
        code = fail(e)
    except KeyboardInterrupt:
        code = 130
    except (RuntimeError, MemoryError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and not re.search("out of memory|ALLOC_FAILED|can't allocate memory", str(e)):
            raise
        code = fail("there is not enough memory for this: lower --batch-size, or the lengths")
    except OSError as e:  # stdout cannot be written; a pipe that is closed has seen enough, and is no fault
        code = 0 if isinstance(e, BrokenPipeError) else fail(f"cannot write the output: {e.strerror}")
        if sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


if __name__ == "__main__":
    launch(main)
