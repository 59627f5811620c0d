"""The view of `sample.py --watch` and `--chat`: which positions each step runs, and which K/V come
from the cache."""
import itertools
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import unicodedata

from caches import LOOPS
from support.cli import printable
from support.settings import loop_settings

MARKS = {"*": ("revealed", "1;32"), "#": ("run", "33"), ".": ("from cache", "36"),
         "o": ("mask, run", "2;33"), "_": ("mask, from cache", "2;36"),
         "-": ("mask, not attended", "2;35")}  # meaning, colour
LEGEND = [f"{mark} {meaning}" for mark, (meaning, _) in MARKS.items()] + ["~ end of text"]

def label(how):
    """The cache, and what is not the default of its loop; refresh has a column of its own."""
    usual = loop_settings(LOOPS[how["cache"]], {}) | {"refresh": how.get("refresh")}
    odd = [f"{s} {how[s]}" for s, v in usual.items() if s != "guider" and how.get(s, v) != v]
    return ", ".join([how["cache"], *odd]).replace("delay False", "no delay").replace(" True", "")

def rule(how):
    """autoregressive and guided know one order only."""
    if how.get("threshold"):
        return f"threshold {how['threshold']:g}"
    return how["remasking"] or "left_to_right"

def name(how):
    return f"{label(how)}, {rule(how)}, {how['steps']} steps".removesuffix(", None steps")

def marks_of(tokens, run, revealed, mask_id, unseen=()):
    """-> for each position a character for what the step did with it. unseen: their numbers"""
    return ["*" if d else "-" if i in unseen and not r else ("_o" if t == mask_id else ".#")[r]
            for i, (t, r, d) in enumerate(zip(tokens, run, revealed))]

def width(text):
    """Columns that text takes in a terminal."""
    return sum(0 if unicodedata.category(c) in ("Mn", "Me") else
               2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)

def clip(text, columns):
    while width(text) > columns:
        text = text[:-1]
    return text

def fill(pieces, columns):
    """-> lines of at most this width, which break between the pieces."""
    text = "  ".join(piece.replace(" ", "\xa0") for piece in pieces)
    return textwrap.fill(text, columns).replace("\xa0", " ").split("\n")

class Watch:
    """An on_step of generate, for one prompt. In a terminal the text is unmasked in place, with a
    mark under each token, and the last picture stays if `keep`. In a pipe each step is a line."""
    def __init__(self, tokenizer, config, how, pause, keep=True):
        self.tokenizer, self.config, self.how = tokenizer, config, how
        self.pause, self.keep, self.run, self.full, self.unseen = pause, keep, 0, 0, set()
        self.legend = [x for x in LEGEND if x[0] != "-" or how.get("cache") == "window"]
        terminal = sys.stdout is not None and sys.stdout.isatty()
        self.live = terminal and os.environ.get("TERM") != "dumb"
        self.colour = self.live and not os.environ.get("NO_COLOR")

    def __enter__(self):
        if self.live:  # on the terminal's second screen the next step repairs what a resize breaks
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # __exit__ still runs
            print("\x1b[?1049h\x1b[?25l", end="")
        else:
            print(name(self.how), *self.legend, sep="  ")
        return self

    def __exit__(self, fault, *_):
        if self.live:
            print("\n\x1b[?25h\x1b[?1049l", end="", flush=True)
            if self.keep and not fault:
                print(*self.frame(shutil.get_terminal_size().columns), "", sep="\n")
        else:
            print()

    def __call__(self, step, tokens, run, revealed):
        tokens, run, revealed = (t[0].tolist() for t in (tokens, run, revealed))
        mask = self.config.mask_id
        marks = "".join(marks_of(tokens, run, revealed, mask, self.unseen))
        if self.how["cache"] == "window" and all(run):  # the next steps attend the first masks only
            masks = [i for i, token in enumerate(tokens) if token == mask]
            self.unseen = {*masks[self.how["window"]:]}
        n, T, P = sum(run), len(run), len(run) - self.how["gen_length"]
        self.run, self.full = self.run + n, self.full + T
        # the cells of prompt and answer
        self.parts = [self.cells(tokens[:P], marks[:P]), self.cells(tokens[P:], marks[P:])]
        share = f"{100 * (T - n) / T:3.0f}% from cache"
        self.status = [f"step {step + 1}/{self.how['steps']}".removesuffix("/None"),
                       f"{n} of {T} run", share.strip(),
                       f"so far {self.full / self.run:.2f}x fewer"]
        if self.live:
            frame = "\x1b[K\n".join(self.frame(*shutil.get_terminal_size()))
            print(f"\x1b[H{frame}\x1b[J", end="", flush=True)
            return time.sleep(self.pause)
        if step == 0:
            print("".join(text for text, _ in self.parts[0]))
        new = " ".join(text if text == "~" else f"'{text}'"
                       for text, cell in self.parts[1] if "*" in cell)
        print(f"step {step + 1:3}  run {n:3} of {T}  {share}  {marks[:P]}|{marks[P:]}  {new}",
              flush=True)

    def cells(self, tokens, marks):
        """-> [(text, marks)]: a token and its mark, or a character's tokens and their marks."""
        found = []
        while tokens:
            n = self.whole(tokens[:8])
            found.append((self.text(tokens[:n]), marks[:n]))
            tokens, marks = tokens[n:], marks[n:]
        return found

    def whole(self, tokens):
        """-> how many of the first tokens make whole characters; 1 if they never do."""
        for n, token in enumerate(tokens, 1):
            if self.sign(token) or self.tokenizer is None:
                break
            if "\ufffd" not in self.tokenizer.decode(tokens[:n]):
                return n
        return 1

    def sign(self, token):
        c = self.config
        return {c.eos_id: "~", c.eot_id: "~", c.mask_id: "_"}.get(token)

    def text(self, tokens):
        if sign := self.sign(tokens[0]):
            return sign
        if self.tokenizer is None:
            return f"{tokens[0]} "
        text = printable(self.tokenizer.decode(tokens)).replace("\n", "\\n")
        text = re.sub("\ufffd+", "\ufffd", text)  # one placeholder for parts of characters
        encoding = sys.stdout and sys.stdout.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        return text if width(text) else " " + text  # a combining mark needs a place of its own

    def frame(self, columns, lines=None):
        """-> the picture's lines, none wider than columns. If too many, those around the news."""
        columns = max(1, columns - 1)  # the last column would wrap in some terminals
        rows = [row for cells in self.parts for row in self.rows(cells, columns)]
        top = [clip(name(self.how), columns), *fill(self.status, columns), ""]
        bottom = ["", *fill(self.legend, columns)]
        if lines:
            bottom = bottom if lines >= len(top) + len(bottom) + 2 else []
            top = top if lines >= len(top) + 2 else []
            room = max(1, (lines - len(top) - len(bottom)) // 2)
            now = next((r for r, row in enumerate(rows) if any("*" in m for _, m in row)), 0)
            first = max(0, min(now - room // 2, len(rows) - room))
            rows = rows[first:first + room]
        return [*top, *(line for row in rows for line in self.paint(row)), *bottom][:lines]

    def rows(self, cells, columns):
        """-> lists of cells that fit into columns. Each token gets a place for its mark."""
        rows = [[]]
        for text, marks in cells:
            text = clip(text, columns)
            n = max(width(text), min(len(marks), columns))
            if sum(len(m) for _, m in rows[-1]) + n > columns:
                rows.append([])
            rows[-1].append((text + " " * (n - width(text)), (marks + marks[-1] * n)[:n]))
        return rows

    def paint(self, row):
        """-> a line of text, a cell in the colour of its first mark in MARKS, and one of marks."""
        def colour(text, mark):
            return f"\x1b[{MARKS[mark][1]}m{text}\x1b[m" if self.colour else text
        texts = [colour(text, min(marks, key=list(MARKS).index)) for text, marks in row]
        marks = [colour("".join(run), mark)
                 for _, cell in row for mark, run in itertools.groupby(cell)]
        return "".join(texts), "".join(marks)
