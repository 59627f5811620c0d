"""The conversation of `sample.py --chat`."""
import contextlib
import re
import sys

from dkv_min import generate
from support.cli import printable
from support.evaluate import encode, text_of
from support.prompts import check_text, draws
from support.watch import Watch, name

def read_message():
    """-> a line that the user types, with line editing and history where the system has them."""
    if not sys.stdin.isatty():
        return input()
    with contextlib.suppress(ImportError):  # Windows edits lines without it
        import readline  # noqa: F401
    print()
    return re.sub(r"\x1b([\[O][0-9;]*)?[@-~]?", "", input("> "))  # keys that nothing has handled

def chat(model, tokenizer, how, args):
    """Reads messages from stdin and answers each, with as many of the earlier turns as fit."""
    turns, n = [], 0
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    print(f"{name(how)}, {how['gen_length']} tokens an answer; /reset forgets the conversation, "
          "/quit ends it, Ctrl-C stops an answer")
    if "chat" not in model.extra:
        print("this model was not trained on conversations: earlier turns may confuse it")
    while True:
        try:
            text = read_message()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print("\n/quit ends")
            continue
        if text.strip() == "/quit":
            return 0
        if text.strip() == "/reset":
            turns = []
            print("the conversation is forgotten")
        if text.strip() in ("", "/reset"):
            continue
        try:
            check_text(text, "a message")
            # the latest turns that leave room for the answer
            for first in range(0, len(turns) + 1, 2):
                kept = turns[first:]
                ids = encode([*kept, text], tokenizer, model.extra, args.raw)
                if len(ids) + how["gen_length"] <= model.config.max_len:
                    break
            if first:
                print(f"(questions that no longer fit and are left out: {first // 2})")
            watch = Watch(tokenizer, model.config, how, args.watch or 0, keep=False)
            with watch if watch.live else contextlib.nullcontext() as view:
                result = generate(model, [ids], generator=draws(args.seed, n), on_step=view, **how)
        except ValueError as e:
            print(printable(str(e)))
            continue
        except KeyboardInterrupt:
            print("(stopped; this question is not kept)")
            continue
        said = text_of(result.tokens[0][len(ids):], model, tokenizer)
        turns, n = [*kept, text, said], n + 1
        print(printable(said).strip() or "(no text)")
        fewer = result.positions_full[0] / result.positions_run[0]
        print(f"({len(ids)} tokens before, {fewer:.2f}x fewer positions run, "
              f"{result.seconds:.1f} s)", flush=True)
