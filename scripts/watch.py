"""The view of `sample.py --watch` and `--chat`: which positions each step runs, and what the cache serves."""
import contextlib
import os
import signal
import sys
import time
import unicodedata


def printable(text):
    """Model output cannot drive the terminal: control characters are shown escaped."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def name(how):
    return f"{how['cache']}, {how['remasking']}, {how['steps']} steps"


MARKS = {"*": ("just decoded", "1;32"), "#": ("run", "33"), ".": ("from cache", "36"), "o": ("mask, run", "2;33"),
         "_": ("mask, from cache", "2;36")}  # character: meaning, colour
LEGEND = [f"{mark} {meaning}" for mark, (meaning, _) in MARKS.items()] + ["~ end of text"]


def marks_of(tokens, run, decoded, mask_id):
    """What a step did with each position, as characters."""
    return ["*" if d else ("_o" if t == mask_id else ".#")[r] for t, r, d in zip(tokens, run, decoded)]


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
    """An on_step of generate, for one prompt. In a terminal the text is unmasked in place, a mark under every token, and
    the last picture stays if `keep`; in a pipe each step is a line, with a mark for every position of prompt and answer."""
    def __init__(self, tokenizer, config, how, pause, keep=True):
        self.tokenizer, self.config, self.how, self.pause, self.keep = tokenizer, config, how, pause, keep
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
            if self.keep and not fault:
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
        marks = marks_of(tokens, run, decoded, self.config.mask_id)
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
