"""sample.py --watch: the map in a pipe, and the picture in a terminal (a pseudo-terminal here).

python -m pytest tests/test_watch.py"""
import contextlib
import io
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, random_model

from dkv_min import generate, unmask_schedule
from model import load, save
from sample import main
from scripts.watch import MARKS, Watch, width
from train_tiny import build_tokenizer

try:
    import fcntl
    import pty
    import termios
except ImportError:  # Windows
    pty = None

STEP = re.compile(r"step +(\d+)  run +(\d+) of (\d+)  +(\d+)% from cache  ([*#.o_]+)\|([*#.o_]+)  (.*)")


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """Random weights with a tokenizer of bytes: what it writes is anything, terminal escapes included."""
    path = tmp_path_factory.mktemp("watch") / "wordy.pt"
    model = random_model(dtype=torch.float32, vocab_size=260, n_vocab=258, mask_id=257, eos_id=256, eot_id=None)
    model.head.weight.data[27] *= 3  # ESC often
    model.extra = {"template": "{}\n"}
    save(path, model, build_tokenizer("some text ", 258))
    return path


def watched(*flags):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*map(str, flags), "--watch"]) == 0
    return out.getvalue()


@pytest.mark.parametrize("cache", ["none", "decode", "greedy"])
@pytest.mark.parametrize("steps, blocks", [(16, 1), (8, 2)])
def test_the_map_in_a_pipe_is_what_ran(wordy, cache, steps, blocks):
    ask = ("--ckpt", wordy, "--prompt", "hello", "--gen-length", 16, "--steps", steps, "--block-length", 16 // blocks, "--cache", cache, "--remasking", "left_to_right",
           "--refresh", 4, "--window", 2)
    found = watched(*ask)
    assert "\x1b" not in found
    lines = [STEP.fullmatch(line).groups() for line in found.splitlines() if line.startswith("step")]
    assert [int(line[0]) for line in lines] == list(range(1, steps + 1))
    model, tokenizer = load(wordy)
    ids, seen = tokenizer.encode("hello\n"), []
    result = generate(model, [ids], cache=cache, gen_length=16, steps=steps, block_length=16 // blocks, remasking="left_to_right", refresh=4, window=2,
                      on_step=lambda *a: seen.append(a))
    ks = [k for _, k in unmask_schedule(16 // blocks, steps // blocks)] * blocks
    for (_, tokens, run, decoded), (_, n, T, share, prompt, answer, new), k in zip(seen, lines, ks):
        marks = prompt + answer
        assert len(prompt) == 6 and len(answer) == 16 and "o" not in prompt and "_" not in prompt
        assert [mark in "*#o" for mark in marks] == run[0].tolist() and [mark == "*" for mark in marks] == decoded[0].tolist()
        assert [mark in "o_" for mark in marks] == (tokens[0] == 257).tolist()
        assert int(n) == sum(mark in "*#o" for mark in marks) and int(T) == 22 and int(share) == round(100 * (22 - int(n)) / 22)
        assert marks.count("*") == k and new.count("~") == int((tokens[0][decoded[0]] == 256).sum())
    assert sum(int(line[1]) for line in lines) == result.positions_run[0]
    assert found.splitlines()[1] == "hello\\n"  # which prompt it is
    # the lag: one step after a token was decoded it runs; with Decode it then comes from the cache, until the next refresh
    before, after = lines[1][5], lines[2][5]
    if cache != "none":
        assert all(mark == "#" for was, mark in zip(before, after) if was == "*") and set(lines[2][4]) == {"."}


def test_one_question_and_the_cache_itself_by_default():
    found = watched()
    assert found.startswith("decode, low_confidence") and found.count("step   1 ") == 1 and re.search(r" [01]/1 ", found.splitlines()[-1])
    assert "seconds" not in found and "speed-up" not in found  # the view takes time
    assert re.findall(r"^(none|decode|greedy), ", watched("--cache", "all"), re.M) == ["none", "decode", "none", "greedy", "none"]


def test_several_prompts_one_after_the_other(wordy):
    found = watched("--ckpt", wordy, "--prompt", "a", "--prompt", "bcd", "--gen-length", 4, "--cache", "none")
    assert re.findall(r" of (\d+)  ", found) == ["6"] * 4 + ["8"] * 4  # no padding: each is alone


@pytest.mark.parametrize("flags, words", [(["--watch", "-1"], "--watch"), (["--watch", "nan"], "--watch"), (["--watch", "--json"], "--json"), (["--watch", "soon"], "soon")])
def test_wrong_flags(flags, words):
    with pytest.raises(ValueError, match=words):
        main(flags)


def picture(cells, gen_length, columns, lines=None, colour=False):
    """The frame for some cells, without a model."""
    view = Watch(None, None, dict(cache="decode", remasking="low_confidence", steps=9, gen_length=gen_length), 0)
    view.cells, view.colour, view.status = cells, colour, ["step 1/9", "4 of 9 run", "56% from cache", "so far 1.50x fewer"]
    return view.frame(columns, lines)


@pytest.mark.parametrize("lines", [None, 1, 5, 12, 40])
@pytest.mark.parametrize("columns", [1, 2, 7, 20, 79, 80, 200])
def test_every_size_of_terminal(columns, lines):
    words = [" word", "x", "漢字", "e\u0301", "\\x1b[2J", "_", "~"]  # wide characters, combining ones, an escape shown escaped
    cells = [(words[i % 7], "*" if i == 60 else ".#o_"[i % 4]) for i in range(90)]
    frame = picture(cells, 40, columns, lines)
    assert all(width(line) <= max(1, columns - 1) for line in frame)
    assert lines is None or len(frame) <= lines
    if columns >= 20 and lines is None:
        text = "".join(frame)
        assert all(text.count(word) >= 12 for word in words)
    if columns >= 20 and lines != 1:
        assert any("*" in line and "just" not in line for line in frame), "what was just decoded stays in sight"


def test_marks_stand_under_their_tokens_and_the_answer_begins_a_line():
    frame = picture([("ab", "#"), ("c", "."), ("漢", "*"), ("\\n", "o")], 2, 80)
    assert frame[3:7] == ["abc", "##.", "漢\\n", "**oo"]


def test_every_token_has_a_place_for_its_mark():
    view = Watch(build_tokenizer("some text ", 258), random_model(vocab_size=260, n_vocab=258, mask_id=257, eos_id=256, eot_id=None).config, {}, 0)
    assert [view.text(i) for i in (257, 256, 65, 10, 27, 7)] == ["_", "~", "A", "\\n", "\\x1b", "\\x07"]
    assert width("e\u0301") == 1 and width("\u0e31") == 0 and width("漢") == 2
    view.tokenizer.decode = lambda ids: "\u0301"
    assert width(view.text(0)) == 1


def test_without_stdout():
    p = subprocess.run(f"{sys.executable} {ROOT / 'sample.py'} --watch --steps 2 >&-", shell=True, capture_output=True, text=True, timeout=100)
    assert p.returncode == 0 and p.stderr == ""


def test_colours_follow_the_marks():
    frame = picture([("a", mark) for mark in MARKS] + [("x", "o")], 1, 80, colour=True)
    for mark, (_, sgr) in MARKS.items():
        assert f"\x1b[{sgr}m{mark}\x1b[m" in frame[4] and f"\x1b[{sgr}ma\x1b[m" in frame[3]
    assert len({sgr for _, sgr in MARKS.values()}) == len(MARKS)


def in_a_terminal(*flags, columns=80, lines=24, resize=None, **env):
    """Runs sample.py in a pseudo-terminal of that size -> (exit status, its output). resize: the size from frame 5 on."""
    master, slave = pty.openpty()
    def set_size(columns, lines):
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    set_size(columns, lines)
    keep = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "COLUMNS", "LINES")}
    p = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), *map(str, flags)], stdin=slave, stdout=slave, stderr=slave, env=keep | {"TERM": "xterm"} | env)
    os.close(slave)
    out = b""
    while select.select([master], [], [], 100)[0]:
        try:
            data = os.read(master, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not data:
            break
        out += data
        if resize and out.count(b"\x1b[J") >= 5:
            set_size(*resize)
            resize = None
    os.close(master)
    return p.wait(100), out.decode().replace("\r\n", "\n")


def frames(out):
    return re.findall(r"\x1b\[H(.*?)\x1b\[J", out, re.S)


@pytest.mark.skipif(pty is None, reason="no pseudo-terminals on this system")
def test_in_a_terminal(wordy):
    ask = ("--ckpt", wordy, "--prompt", "hello", "--gen-length", 16, "--cache", "decode", "--watch", "0.05")
    settings = {}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, dict(columns=30, lines=12, resize=(50, 9), NO_COLOR="1")
    with ThreadPoolExecutor(4) as pool:
        found = [run.result() for run in [pool.submit(in_a_terminal, *ask, **how) for how in settings]]
    code, out = found[0]
    assert code == 0 and out.startswith("\x1b[?1049h\x1b[?25l") and out.count("\x1b[?25h\x1b[?1049l") == 1  # the screen is given back, the cursor too
    assert "so far 1.00x" in frames(out)[1] and "so far 1.28x" in frames(out)[4]  # 22 + 22 + 15 + 14 + 13 positions for 5 * 22
    assert len(frames(out)) == 16 and re.search(r"\x1b\[1;32m\*+\x1b\[m", frames(out)[0]) and "step 16/16" in frames(out)[-1]
    ours = re.compile(r"\x1b\[(?:[0-9;]*m|H|K|J|\?25[lh]|\?1049[lh])")
    rest = ours.sub("", out)
    assert all(c == "\n" or c.isprintable() for c in rest) and "\\x1b" in rest  # its ESC are shown escaped

    code, plain = found[1]
    assert code == 0 and len(frames(plain)) == 16 and not re.search(r"\x1b\[[0-9;]*m", plain)

    code, dumb = found[2]
    assert code == 0 and "\x1b" not in dumb and len(STEP.findall(dumb)) == 16

    code, out = found[3]
    shapes = [(max(map(width, lines)), len(lines)) for lines in (frame.replace("\x1b[K", "").split("\n") for frame in frames(out))]
    assert code == 0 and all(w <= 29 and n <= 12 for w, n in shapes[:5]) and all(w <= 49 and n <= 9 for w, n in shapes[-3:]) and any(w > 29 for w, _ in shapes[-3:])


@pytest.mark.skipif(pty is None, reason="no pseudo-terminals on this system")
@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_gives_the_terminal_back(wordy, sent, code):
    master, slave = pty.openpty()
    p = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), "--ckpt", str(wordy), "--prompt", "hello", "--gen-length", "16", "--watch", "60"], stdin=slave, stdout=slave, stderr=slave,
                         env=os.environ | {"TERM": "xterm"})
    os.close(slave)
    out = b""
    while b"\x1b[J" not in out:
        assert select.select([master], [], [], 100)[0]
        out += os.read(master, 65536)
    began = time.time()
    p.send_signal(sent)
    with contextlib.suppress(OSError):
        while data := os.read(master, 65536):
            out += data
    os.close(master)
    assert p.wait(100) == code and time.time() - began < 30 and out.decode().rstrip().endswith("\x1b[?25h\x1b[?1049l") and b"Traceback" not in out


@pytest.mark.skipif(pty is None, reason="no pseudo-terminals on this system")
def test_chat_in_a_terminal(wordy):
    """Ctrl-C stops an answer and keeps the chat; at the prompt it says how to leave."""
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    p = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), "--ckpt", str(wordy), "--chat", "--gen-length", "8", "--watch", "0.2"], stdin=slave, stdout=slave, stderr=slave, env=os.environ | {"TERM": "xterm"})
    os.close(slave)
    out = b""

    def until(words):
        nonlocal out
        out, before = b"", out
        while words not in out:
            assert select.select([master], [], [], 100)[0], (before, out)
            out += os.read(master, 65536)

    until(b"> ")
    p.send_signal(signal.SIGINT)
    until(b"/quit ends\r\n\r\n> ")
    os.write(master, b"hello\n")
    until(b"step 3/8")
    p.send_signal(signal.SIGINT)
    until(b"(stopped; this question is not kept)")
    assert b"\x1b[?1049l" in out  # the screen was given back
    os.write(master, b"hi\n")
    until(b"step 8/8")
    until(b"(3 tokens before")
    os.write(master, b"/quit\n")
    with contextlib.suppress(OSError):
        while data := os.read(master, 65536):
            out += data
    os.close(master)
    assert p.wait(100) == 0 and b"Traceback" not in out
