"""Sample from a masked diffusion model, with and without a delayed KV cache.

python sample.py                                          held-out questions, every cache, and a table
python sample.py --prompt "Anna has 7 boxes of 8 pens. Monday she loses 9. Tuesday she finds 3 more. How many pens are left?"
python sample.py --watch                                  see which positions each step runs
python sample.py --prompts questions.txt --cache none --json > answers.jsonl
python sample.py --ckpt llada --cache decode              LLaDA-8B, once its weights are converted
"""
import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import time
import unicodedata

import torch
from tqdm import tqdm

from dkv_min import CACHES, REFRESH, REMASKING, check, check_prompts, generate
from model import load

HERE = os.path.dirname(os.path.abspath(__file__))
N_DEMO = 4  # questions of the run without flags, answered in one batch
PROMPTS = ["What is a key-value cache?"]  # for checkpoints that bring neither problems nor prompts


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parse_args(argv):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="tiny", metavar="tiny|llada|PATH", help="checkpoint (tiny, the bundled one)")
    p.add_argument("--cache", choices=[*CACHES, "all"], help="default: decode for prompts of yours, all without any")
    g = p.add_argument_group("prompts (none: the checkpoint's own held-out problems or texts)")
    g.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    g.add_argument("--prompts", metavar="FILE", help="one prompt a line, or objects with a `prompt` in a .jsonl; - is stdin")
    g.add_argument("--ids", metavar="1,2,3", help="a prompt as token ids")
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
    g.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: float32 below a billion parameters, else as stored")
    g.add_argument("--batch-size", type=int, default=8, metavar="PROMPTS", help="prompts answered at once (8)")
    g.add_argument("--json", action="store_true", help="one JSON object per prompt and cache on stdout, nothing else")
    g.add_argument("--watch", type=float, nargs="?", const=0.1, metavar="SECONDS", help="show every step, in a terminal for so many seconds (0.1); in a pipe a line a step")
    args = p.parse_args(argv)
    if args.watch is not None:
        if not 0 <= args.watch <= 60:
            raise ValueError(f"--watch is {args.watch}, and has to be 0 to 60 seconds")
        if args.json:
            raise ValueError("--watch and --json both want stdout: leave one of them out")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}, and has to be at least 1")
    if args.refresh not in (None, "never"):
        if not args.refresh.isdecimal() or int(args.refresh) < 1:
            raise ValueError(f"--refresh is {args.refresh!r}, and has to be a whole number of at least 1, or never")
    return args


def pick_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here, so use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def load_checkpoint(name, device, dtype):
    path = os.path.join(HERE, "checkpoints", f"{name}.pt") if name in ("tiny", "llada") else name
    if name == "llada" and not os.path.exists(path):
        raise ValueError(f"LLaDA's weights are not converted yet: python scripts/convert.py llada will download GSAI-ML/LLaDA-8B-Instruct and write {path}; that script is not part of this version")
    if name not in ("tiny", "llada") and not os.path.exists(path):
        raise ValueError(f"there is no checkpoint {path}: give --ckpt tiny, llada or the path of a file")
    model, tokenizer = load(path)
    if dtype == "auto":
        small = sum(p.numel() for p in model.parameters()) < 1e9
        dtype = "float32" if small else None
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
        except (json.JSONDecodeError, TypeError, KeyError, RecursionError):
            raise ValueError(f"--prompts {args.prompts}: every line has to be a JSON object with a `prompt`") from None
        texts += lines
        if not texts:
            raise ValueError(f"--prompts {args.prompts} holds no prompt")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"a prompt has to be text, and this is none: {text!r}")
        if not text:
            raise ValueError("a prompt is empty: it needs at least one character")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"the prompt {text!r} is not UTF-8 text") from None
    return texts


def parse_ids(text):
    try:
        return None if text is None else [int(i) for i in text.split(",")]
    except ValueError:
        raise ValueError(f"--ids is {text!r}, and has to be token ids with commas between them, such as 1,2,3") from None


def cut(ids, config):
    """The ids up to the first end of text or of turn."""
    ends = [i for i, t in enumerate(ids) if t in (config.eos_id, config.eot_id)]
    return ids[:ends[0]] if ends else ids


def is_right(text, answer):
    """Exact match of the whole worked answer, not of its result alone: a right result may stand behind wrong sums."""
    return text.strip() == answer


def printable(text):
    """Model output cannot drive the terminal: control characters are shown escaped."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def find_questions(args, extra, tokenizer):
    """-> [(text, ids, right answer)]: the user's prompts, or else the checkpoint's own, whose answers may be known. What is
    not known is None."""
    texts, ids = read_prompts(args), parse_ids(args.ids)
    pairs = [(text, None) for text in texts]
    if not texts and not ids:
        pairs = extra["problems"][:N_DEMO] if "problems" in extra else [(text, None) for text in extra.get("prompts", PROMPTS)]
        if args.watch is not None:  # one question, to look at
            pairs, args.cache = pairs[:1], args.cache or "decode"
        args.cache = args.cache or "all"
    args.cache = args.cache or "decode"
    if pairs and tokenizer is None:
        raise ValueError(f"{args.ckpt} has no tokenizer, so it cannot read text: give the prompt as token ids, with --ids")
    template = extra.get("template", "{}")  # what stands around a prompt: the toy's ends a question with a newline
    return [(text, tokenizer.encode(template.replace("{}", text)), right) for text, right in pairs] + ([(None, ids, None)] if ids else [])


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
    if args.json:
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


def name(how):
    return f"{how['cache']}, {how['remasking']}, {how['steps']} steps"

# ---------------------------------------------------------------------------------------------------------------------
# --watch

MARKS = {"*": ("just decoded", "1;32"), "#": ("run", "33"), ".": ("from cache", "36"), "o": ("mask, run", "2;33"),
         "_": ("mask, from cache", "2;36")}  # character: meaning, colour
LEGEND = [f"{mark} {meaning}" for mark, (meaning, _) in MARKS.items()] + ["~ end of text"]


def width(text):
    """Columns that text takes in a terminal."""
    return sum(0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def clip(text, columns):
    while width(text) > columns:
        text = text[:-1]
    return text


def fill(pieces, columns):
    """-> lines of at most so many columns."""
    lines = [clip(pieces[0], columns)]
    for piece in pieces[1:]:
        if width(lines[-1]) + 2 + width(piece) <= columns:
            lines[-1] += "  " + piece
        else:
            lines.append(clip(piece, columns))
    return lines


class Watch:
    """An on_step of generate, for one prompt. In a terminal the text is unmasked in place, a mark under every token; in a
    pipe each step is a line, with a mark for every position of prompt and answer."""
    def __init__(self, tokenizer, config, how, pause):
        self.tokenizer, self.config, self.how, self.pause = tokenizer, config, how, pause
        self.live = sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.colour = self.live and not os.environ.get("NO_COLOR")
        self.run = self.full = 0
        self.cells = []

    def __enter__(self):
        if self.live:  # the terminal's second screen: what a resize does to it, the next step repairs
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that __exit__ gives the terminal back
            print("\x1b[?1049h\x1b[?25l", end="")
        else:
            print(name(self.how), *LEGEND, sep="  ")
        return self

    def __exit__(self, fault, *_):
        if self.live:
            print("\n\x1b[?25h\x1b[?1049l", end="", flush=True)
            if not fault:
                print(*self.frame(self.size()[0]), "", sep="\n")
        else:
            print()

    def size(self):
        with contextlib.suppress(OSError, ValueError):
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
            if columns and lines:
                return columns, lines
        return 80, 24

    def text(self, token):
        if token == self.config.mask_id:
            return "_"
        if token in (self.config.eos_id, self.config.eot_id):
            return "~"
        text = printable(self.tokenizer.decode([token])).replace("\n", "\\n") if self.tokenizer else f"{token} "
        encoding = sys.stdout and sys.stdout.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        return text if width(text) else " " + text  # every token has a place for its mark

    def __call__(self, step, tokens, run, decoded):
        tokens, run, decoded = (t[0].tolist() for t in (tokens, run, decoded))
        marks = ["*" if d else ("_o" if t == self.config.mask_id else ".#")[r] for t, r, d in zip(tokens, run, decoded)]
        n, T, G = sum(run), len(run), self.how["gen_length"]
        self.run, self.full = self.run + n, self.full + T
        self.cells = [(self.text(t), mark) for t, mark in zip(tokens, marks)]
        share = f"{100 * (T - n) / T:3.0f}% from cache"
        self.status = [f"step {step + 1}/{self.how['steps']}", f"{n} of {T} run", share.strip(), f"so far {self.full / self.run:.2f}x fewer"]
        if not self.live:
            if step == 0:
                print("".join(text for text, _ in self.cells[:-G]))
            new = " ".join(text if text == "~" else f"'{text}'" for text, mark in self.cells if mark == "*")
            print(f"step {step + 1:3}  run {n:3} of {T}  {share}  {''.join(marks[:-G])}|{''.join(marks[-G:])}  {new}", flush=True)
        else:
            columns, lines = self.size()
            print("\x1b[H" + "\x1b[K\n".join(self.frame(columns, lines)) + "\x1b[J", end="", flush=True)
            time.sleep(self.pause)

    def frame(self, columns, lines=None):
        """-> the lines of the picture, none wider than columns; where they are too many, those around what was just decoded."""
        columns = max(1, columns - 1)  # the last column would wrap in some terminals
        rows, used, G = [[]], 0, self.how["gen_length"]
        for i, (text, mark) in enumerate(self.cells):
            text = clip(text, columns)
            used += width(text)
            if used > columns or i == len(self.cells) - G:  # the answer begins on a line of its own
                rows.append([])
                used = width(text)
            rows[-1].append((text, mark))
        top, bottom = [clip(name(self.how), columns), *fill(self.status, columns), ""], ["", *fill(LEGEND, columns)]
        if lines:
            bottom = bottom if lines >= len(top) + len(bottom) + 2 else []
            top = top if lines >= len(top) + 2 else []
            room = max(1, (lines - len(top) - len(bottom)) // 2)
            now = next((r for r, row in enumerate(rows) if any(mark == "*" for _, mark in row)), 0)
            first = max(0, min(now - room // 2, len(rows) - room))
            rows = rows[first:first + room]
        middle = []
        for row in rows:
            middle.append("".join(self.paint(text, mark) for text, mark in row))
            middle.append("".join(self.paint(mark * width(text), mark) for text, mark in row))
        return (top + middle + bottom)[:lines]

    def paint(self, text, mark):
        return f"\x1b[{MARKS[mark][1]}m{text}\x1b[m" if self.colour else text

# ---------------------------------------------------------------------------------------------------------------------
# the run


def answer(model, tokenizer, questions, runs, args, repeats):
    """Answers all questions with every run, in turn, batch by batch; with --json prints what is done.
    -> answers[run][question] = (ids, Result of its batch, row in it), seconds[run]: medians of the repeats"""
    answers = [[None] * len(questions) for _ in runs]
    seconds = [[0.0] * repeats for _ in runs]
    batches = range(0, len(questions), args.batch_size)
    model(torch.full((1, 8), model.config.mask_id, device=model.wte.weight.device))  # a first call is slow: not to be timed
    bar = tqdm(total=sum(how["steps"] for how, _ in runs) * len(batches) * repeats, unit="step", disable=None if args.watch is None else True, leave=False)
    model.register_forward_hook(lambda *_: bar.update())
    for repeat in range(repeats):
        for first in batches:
            part = questions[first:first + args.batch_size]
            for i, (how, _) in enumerate(runs):
                bar.set_description(name(how))
                # what is random belongs to the prompt, by seed and index: answers do not depend on the batch
                rngs = [torch.Generator().manual_seed(random.Random(f"{args.seed} {first + j}").getrandbits(32)) for j in range(len(part))]
                with contextlib.nullcontext() if args.watch is None else Watch(tokenizer, model.config, how, args.watch) as view:
                    result = generate(model, [ids for _, ids, _ in part], generator=rngs, on_step=view, **how)
                seconds[i][repeat] += result.seconds
                for j, (tokens, (_, ids, _)) in enumerate(zip(result.tokens, part)):
                    answers[i][first + j] = tokens[len(ids):], result, j
            if args.json:
                for j in range(first, first + len(part)):
                    for i, (how, _) in enumerate(runs):
                        print_json(j, questions[j], how["cache"], *answers[i][j], text_of(answers[i][j][0], model, tokenizer))
    bar.close()
    return answers, [statistics.median(times) for times in seconds]


def text_of(ids, model, tokenizer):
    return tokenizer.decode(cut(ids, model.config)) if tokenizer else None


def print_json(index, question, cache, ids, result, row, text):
    print(json.dumps({"index": index, "prompt": question[0], "cache": cache, "prompt_ids": question[1], "ids": ids, "text": text, "forwards": result.forwards,
                      "positions_run": result.positions_run[row], "positions_full": result.positions_full[row], "seconds": result.seconds}), flush=True)


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    model, tokenizer = load_checkpoint(args.ckpt, device, args.dtype)
    questions = find_questions(args, model.extra, tokenizer)
    if args.watch is not None:
        args.batch_size = 1
    graded = all(right is not None for _, _, right in questions)

    gen_length = model.extra.get("gen_length", 128) if args.gen_length is None else args.gen_length
    steps = gen_length if args.steps is None else args.steps
    usual = model.extra.get("block_length")
    block_length = args.block_length if args.block_length is not None else usual if usual and gen_length % usual == 0 else gen_length
    runs = plan(args, model.extra, gen_length, steps, block_length)
    for how, _ in runs:  # what is wrong is said before the work, not in the middle
        check(model.config, **how)
    check_prompts(model.config, [ids for _, ids, _ in questions], gen_length)
    repeats = 3 if graded and not args.json and args.watch is None else 1  # the toy's times are short
    answers, seconds = answer(model, tokenizer, questions, runs, args, repeats)
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
    print(f"{device}, {plural(torch.get_num_threads(), 'thread')}, {str(model.wte.weight.dtype)[6:]}, {plural(len(questions), 'prompt')} of {lengths[0]} to {lengths[-1]} tokens in batches of "
          f"{min(args.batch_size, len(questions))}, {gen_length} tokens each (EOS padding included), blocks of {block_length}" + (f", medians of {repeats}" if repeats > 1 else ""))
    print(table(runs, answers, seconds if args.watch is None else None, questions, [sum(is_right(t, q[2]) for t, q in zip(said, questions)) for said in texts] if graded else None))
    return 0


def launch(main):
    """Runs a script's main. What a user got wrong is one sentence on stderr and exit code 2."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character shows its number
    try:
        code = main()
        if sys.stdout:
            sys.stdout.flush()
    except ValueError as e:
        print(f"{os.path.basename(sys.argv[0])}: {e}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except OSError as e:  # stdout cannot be written; a pipe that is closed has seen enough, and is no fault
        code = 0 if isinstance(e, BrokenPipeError) else 2
        if code:
            print(f"{os.path.basename(sys.argv[0])}: cannot write the output: {e.strerror}", file=sys.stderr)
        if sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


if __name__ == "__main__":
    launch(main)
