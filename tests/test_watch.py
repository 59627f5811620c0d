"""sample.py --watch and --chat: the map in a pipe, and the picture in a (pseudo-)terminal."""
import contextlib
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, byte_model, forked

import caches.window
from dkv_min import generate, unmask_schedule
from model import load
from support.watch import MARKS, Watch, width

STEP = re.compile(r"step +(\d+)  run +(\d+) of (\d+)  +(\d+)% from cache  "
                  r"([*#.o_-]+)\|([*#.o_-]+)  (.*)")

def watched(*flags):
    [code], [out], [err] = forked(1, "sample.py", *flags, "--watch")
    assert code == 0, err
    return out

@pytest.mark.parametrize("own", [dict(cache="none"), dict(cache="decode", refresh=4),
                                 dict(cache="greedy", refresh=4, window=2),
                                 dict(cache="window", refresh=4, window=4, active=2,
                                      remasking="low_confidence")])
@pytest.mark.parametrize("steps, blocks", [(16, 1), (8, 2)])
def test_the_map_in_a_pipe_is_what_ran(wordy, monkeypatch, own, steps, blocks):
    how = dict(gen_length=16, steps=steps, block_length=16 // blocks, remasking="left_to_right")
    how |= own
    flags = [flag for k, v in how.items() for flag in (
        ("--set", f"{k}={v}") if k == "active" else ("--" + k.replace("_", "-"), v))]
    found = watched("--ckpt", wordy, "--prompt", "hello", *flags)
    assert "\x1b" not in found and found.splitlines()[1] == "hello\\n"  # which prompt it is
    lines = [STEP.fullmatch(line).groups() for line in found.splitlines() if line[:4] == "step"]
    assert [int(line[0]) for line in lines] == list(range(1, steps + 1))
    (model, tokenizer), seen = load(wordy), []
    ids = [tokenizer.encode("hello\n")]
    attended, real = [], caches.window.forward
    monkeypatch.setattr("caches.window.forward", lambda *a: attended.append(a[5]) or real(*a))
    result = generate(model, ids, on_step=lambda *step: seen.append(step), **how)
    ks = [k for _, k in unmask_schedule(16 // blocks, steps // blocks)] * blocks
    for (_, *step), (_, n, T, share, prompt, answer, new), k in zip(seen, lines, ks):
        (tokens, run, decoded), marks = (t[0] for t in step), prompt + answer
        assert len(prompt) == 6 and len(answer) == 16 and not set("o_-") & set(prompt)
        assert [mark in "*#o" for mark in marks] == run.tolist()
        assert [mark == "*" for mark in marks] == decoded.tolist()
        assert [mark in "o_-" for mark in marks] == (tokens == 257).tolist()
        assert (int(n), int(T), int(share)) == (run.sum(), 22, round(100 * (22 - int(n)) / 22))
        assert marks.count("*") == k and new.count("~") == int((tokens[decoded] == 256).sum())
    for (_, _, run, _), (*_, prompt, answer, _), known in zip(seen, lines, attended):
        beyond = torch.zeros_like(run) if known is None else ~known & ~run
        assert [mark == "-" for mark in prompt + answer] == beyond[0].tolist()
    assert ("not attended" in found) == ("-" in lines[1][5]) == (own["cache"] == "window")
    assert sum(int(line[1]) for line in lines) == result.positions_run[0]
    # the delay: a token runs once more after the step that revealed it, while the prompt does not
    revealed = [i for i, mark in enumerate(lines[1][5]) if mark == "*"]
    if own["cache"] != "none":
        assert all(lines[2][5][i] == "#" for i in revealed) and set(lines[2][4]) == {"."}

def test_which_questions_and_caches(wordy):
    found = watched("--steps", 2)
    assert found.startswith("decode, low_confidence") and found.count("step   1 ") == 1
    assert re.search(r" [01]/1 .*\n$", found) and not re.search("seconds|speed-up", found)
    names = re.findall(r"^(\w+), .* revealed", watched("--cache", "all", "--steps", 4), re.M)
    assert names == ("none decode none greedy prefill pd local freecache freecache prefix dual "
                     "window entropy none").split()
    found = watched("--ckpt", wordy, "--prompt", "a", "--prompt", "bcd", "--gen-length", 4)
    assert re.findall(r" of (\d+)  ", found) == ["6"] * 4 + ["8"] * 4  # each is alone, unpadded

def view(prompt, answer, colour=False):
    how = dict(cache="decode", remasking="low_confidence", steps=9, gen_length=len(answer))
    found = Watch(None, None, how, 0)
    found.parts, found.colour = [prompt, answer], colour
    found.status = ["step 1/9", "4 of 9 run", "56% from cache", "so far 1.50x fewer"]
    return found

@pytest.mark.parametrize("lines", [None, 1, 5, 12, 40])
@pytest.mark.parametrize("columns", [1, 2, 7, 20, 79, 80, 200])
def test_every_size_of_terminal(columns, lines):
    words = [" word", "x", "漢字", "e\u0301", "\\x1b[2J", "_", "~", "☃"]
    cells = [(words[i % 8], "*" if i == 60 else "#.#" if i % 8 == 7 else ".#o_"[i % 4])
             for i in range(96)]
    frame = view(cells[:50], cells[50:]).frame(columns, lines)
    assert all(width(line) <= max(1, columns - 1) for line in frame)
    assert lines is None or len(frame) <= lines
    if columns >= 20 and lines is None:
        assert all("".join(frame).count(word) >= 12 for word in words)
    if columns >= 20 and lines != 1:  # what was revealed stays in sight
        assert any("*" in line and "revealed" not in line for line in frame)

def test_marks_stand_under_their_tokens_and_the_answer_begins_a_line():
    frame = view([("ab", "#"), ("c", ".")], [("漢", "*"), ("\\n", "o"), ("☃", "#*.")]).frame(80)
    assert frame[3:7] == ["abc", "##.", "漢\\n☃  ", "**oo#*."]
    frame = view([("a", mark) for mark in MARKS], [("x", "o")], colour=True).frame(80)
    for mark, (_, sgr) in MARKS.items():
        assert f"\x1b[{sgr}m{mark}\x1b[m" in frame[4] and f"\x1b[{sgr}ma\x1b[m" in frame[3]

def test_characters_of_several_tokens_are_whole():
    model, tokenizer = byte_model()
    view = Watch(tokenizer, model.config, {}, 0)
    tokens = tokenizer.encode("a漢é😀")
    assert view.cells(tokens, "#.#*.#.#.#") == [("a", "#"), ("漢", ".#*"), ("é", ".#"),
                                                ("😀", ".#.#")]
    # parts that are not whole, a mask or a letter between them: a placeholder for each token
    for middle, text in ((257, "_"), (65, "A")):
        found = view.cells([*tokens[1:3], middle, tokens[3]], "####")
        assert found == [("\ufffd", "#"), ("\ufffd", "#"), (text, "#"), ("\ufffd", "#")]
    found = view.cells([257, 256, 65, 10, 27, 7, 258], "_______")
    assert [text for text, _ in found] == ["_", "~", "A", "\\n", "\\x1b", "\\x07", " "]
    tokenizer.decode = lambda ids: "\u0301"
    assert width(view.text([0])) == 1
    assert (width("e\u0301"), width("\u0e31"), width("漢")) == (1, 0, 2)

class Terminal:
    def __init__(self, *flags, columns=80, lines=24, **env):
        import pty
        self.master, slave = pty.openpty()
        self.resize(columns, lines)
        env = {k: v for k, v in os.environ.items()
               if k not in ("NO_COLOR", "COLUMNS", "LINES")} | {"TERM": "xterm"} | env
        self.process = subprocess.Popen([sys.executable, ROOT / "sample.py", *map(str, flags)],
                                        stdin=slave, stdout=slave, stderr=slave, env=env)
        os.close(slave)
        self.out = b""

    def resize(self, columns, lines):
        import fcntl
        import termios
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def until(self, words, times=1):
        """Reads until these words have come -> what came before them."""
        while self.out.count(words.encode()) < times:
            assert select.select([self.master], [], [], 100)[0], self.out
            self.out += os.read(self.master, 65536)
        *before, self.out = self.out.split(words.encode(), times)
        return words.encode().join(before).decode().replace("\r\n", "\n")

    def say(self, keys, words):
        """Waits for the prompt, types these keys -> what came before these words."""
        self.until("> ")
        os.write(self.master, keys.encode())
        return self.until(words)

    def end(self):
        with contextlib.suppress(OSError):  # Linux: the other side is closed
            while select.select([self.master], [], [], 100)[0]:
                self.out += os.read(self.master, 65536)
        os.close(self.master)
        assert b"Traceback" not in self.out
        return self.process.wait(100), self.out.decode().replace("\r\n", "\n")

@pytest.mark.slow
def test_in_a_terminal(wordy):
    ask = ["--ckpt", wordy, "--prompt", "hello", "--gen-length", 16, "--watch", "0.05"]
    terminals = [Terminal(*ask, **how) for how in (
        {}, {"TERM": "dumb"}, dict(columns=30, lines=12, NO_COLOR="1"))]
    narrow = terminals[2].until("\x1b[J", times=5) + "\x1b[J"
    terminals[2].resize(50, 9)
    (code, out), (c1, dumb), (c2, rest) = (t.end() for t in terminals)
    assert code == c1 == c2 == 0
    assert out.startswith("\x1b[?1049h\x1b[?25l") and out.count("\x1b[?25h\x1b[?1049l") == 1
    shown, small = (re.findall(r"\x1b\[H(.*?)\x1b\[J", text, re.S)
                    for text in (out, narrow + rest))
    # 22 + 22 + 15 + 14 + 13 positions for 5 * 22
    assert "so far 1.00x" in shown[1] and "so far 1.28x" in shown[4]
    assert len(shown) == 16 and "step 16/16" in shown[-1]
    assert re.search(r"\x1b\[1;32m\*+\x1b\[m", shown[0])
    text = re.sub(r"\x1b\[(?:[0-9;]*m|H|K|J|\?25[lh]|\?1049[lh])", "", out)
    assert all(c == "\n" or c.isprintable() for c in text) and "\\x1b" in text  # shown escaped
    assert len(small) == 16 and not re.search(r"\x1b\[[0-9;]*m", narrow + rest)
    assert "\x1b" not in dumb and len(STEP.findall(dumb)) == 16
    pictures = [frame.replace("\x1b[K", "").split("\n") for frame in small]
    shapes = [(max(map(width, lines)), len(lines)) for lines in pictures]
    assert all(w <= 29 and n <= 12 for w, n in shapes[:5])
    assert all(w <= 49 and n <= 9 for w, n in shapes[-3:]) and max(shapes[-3:])[0] > 29
    t = Terminal(*ask[:-1], 60)
    t.until("\x1b[J")
    t.process.send_signal(signal.SIGTERM)
    code, out = t.end()
    assert code == 143 and out.rstrip().endswith("\x1b[?25h\x1b[?1049l")  # the screen is back

def test_a_bar_and_an_answer_in_a_terminal():
    code, out = Terminal("--prompt", "hi", "--threshold", 1).end()
    assert code == 0 and "step/s]" in out and out.splitlines()[-1].startswith("decode  threshold 1")

def test_chat_in_a_terminal(wordy):
    """Ctrl-C stops an answer and keeps the chat; at the prompt it says how to leave."""
    t = Terminal("--ckpt", wordy, "--chat", "--gen-length", 8, "--watch", 0.2, "--raw")
    t.until("> ")
    time.sleep(0.5)  # readline misses a signal between its prompt and its wait for keys
    t.process.send_signal(signal.SIGINT)
    t.until("/quit ends")
    t.say("hi\r", "step 3/8")
    t.process.send_signal(signal.SIGINT)
    assert "\x1b[?1049l" in t.until("(stopped; this question is not kept)")  # the screen is back
    assert "step 8/8" in t.say("helo\x1b[D\x1b[Dl\r", "(5 tokens before")  # Left, Left
    t.say("/reset\r", "forgotten")
    assert "hello!" in t.say("\x1b[A\x1b[A!\r", "(6 tokens before")  # Up, Up
    t.until("> ")
    os.write(t.master, b"\x04")
    assert t.end()[0] == 0
