"""The toy corpus, its tokenizer, and training runs of a few seconds through the real script.

python -m pytest tests/test_train.py"""
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, forked

import train_tiny as t
from model import load, load_file
from sample import launch

TINY = "--n-layer 1 --n-head 2 --n-embd 32 --batch-size 16 --threads 1 --device cpu --eval 0".split()


def command(*flags):
    return [sys.executable, str(ROOT / "train_tiny.py"), *map(str, flags)]


def run(*flags, code=0):
    [found], [out], [err] = forked(1, "train_tiny.py", *flags)
    assert found == code, out + err
    return SimpleNamespace(stdout=out, stderr=err)


@pytest.mark.parametrize("wordy", [False, True])
def test_answers_are_right_and_sides_are_disjoint(wordy):
    sides = {}
    for which in ("train", "validation", "test"):
        rng, sides[which] = random.Random(5), set()
        for question, answer in t.problems(rng, 3000, (1, 4), which, wordy):
            steps = re.findall(r"(\d+)([*+-])(\d+)=(\d+)\.", answer)
            numbers = [int(steps[0][0])] + [int(c) if op != "-" else -int(c) for _, op, c, _ in steps]
            for (a, op, b, result), following in zip(steps, [s[0] for s in steps[1:]] + [answer.split("#### ")[1]]):
                assert {"*": int(a) * int(b), "+": int(a) + int(b), "-": int(a) - int(b)}[op] == int(result) and result == following
            assert re.findall(r"\d+", question) == [str(abs(n)) for n in numbers]  # the question has what the answer needs
            assert re.findall(r"(gets|loses) (\d): \d+([+-])", answer) == [("loses" if n < 0 else "gets", str(abs(n)), "-" if n < 0 else "+") for n in numbers[2:] if wordy]
            sides[which].add((min(numbers[:2]), max(numbers[:2]), *numbers[2:]))  # 3*4 is 4*3
    assert all(len(numbers) > 500 for numbers in sides.values())
    assert not sides["train"] & sides["test"] and not sides["train"] & sides["validation"] and not sides["validation"] & sides["test"]


def test_training_batches_hold_no_test_problem():
    data = t.Problems(t.parse_args(["--sums", "0"])[0])
    texts = [data.tokenizer.decode(row) for step in range(20) for row in data.batch(step)[0].tolist()]
    worked = [text.split("left?\n")[1] for text in texts if "left?" in text]
    assert len(worked) == 20 * 56
    for answer in worked:  # the numbers with their signs, read back from the worked answer
        numbers = [int(n) for n in re.findall(r"^(\d)\*(\d)", answer)[0]] + [int(op + d) for op, d in re.findall(r"\d([+-])(\d)=", answer)]
        assert t.side(numbers) == "train"


def test_bpe():
    text = "low lower lowest newer newest 2024 2024 2024 " * 30
    ranks = t.train_bpe(text, 300)
    assert len(set(ranks.values())) == len(ranks) <= 300 and [ranks[bytes([b])] for b in range(256)] == list(range(256))
    tokenizer = t.build_tokenizer(text, 302)
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode(text)) < len(text) / 2
    assert len(tokenizer.encode("2024")) == 4
    first = min((pair for pair in ranks if len(pair) == 2), key=ranks.get)
    assert first in (b"we", b"lo", b"ow", b"ne")  # the most frequent pairs of that text


def test_rows():
    args, _ = t.parse_args([])
    data = t.Problems(args)
    pairs, eos = t.problems(random.Random(0), 20, args.ops, "train"), data.tokenizer.special["<|eos|>"]
    tokens, pad, frozen = t.story_rows(pairs, data.tokenizer, args.prompt_len, args.gen_length)
    for (question, answer), row, p in zip(pairs, tokens.tolist(), pad.tolist()):
        assert data.tokenizer.decode(row[p:args.prompt_len]) == question + "\n" and set(row[:p]) <= {eos}
        text = data.tokenizer.decode(row[args.prompt_len:])
        assert text.startswith(answer + "<|eos|>") and set(text[len(answer):].split("<|eos|>")) == {""}
    assert frozen[:, :args.prompt_len].all() and not frozen[:, args.prompt_len:].any()


def test_masks_of_sums():
    data = t.Problems(t.parse_args([])[0])
    equal, dot, rows = data.tokenizer.encode("=")[0], data.tokenizer.encode(".")[0], t.sum_rows(random.Random(0), 40, 64, data.tokenizer)
    shown, hidden, results = 0, 0, set()
    masked, weight = t.mask_sums(random.Random(0), rows, data.tokenizer)
    assert torch.allclose((weight * masked).sum(1), torch.ones(40))
    for row, m, w in zip(rows.tolist(), masked.tolist(), (weight > 0).tolist()):
        for i in range(1, 64):  # what counts stands behind an = that is seen, at most one digit further on
            assert not w[i] or equal in [x for x, hidden in zip(row[i - 2:i], m[i - 2:i]) if not hidden]
        behind = row.index(dot, max(i for i in range(64) if w[i]))
        assert all(m[behind:]) and not any(w[behind:])  # all behind the last result is masked, and does not count
        two = [i + 1 for i in range(behind) if row[i] == equal and row.index(dot, i) - i == 3]
        shown, hidden = shown + sum(not m[i] for i in two), hidden + sum(m[i] for i in two)
        results.add(sum(row[i] == equal for i in range(behind)))
    assert 0.35 < shown / (shown + hidden) < 0.65 and len(results) > 3


def test_masks_of_tails():
    args = t.parse_args([])[0]
    data = t.Problems(args)
    tokens, _, _ = t.story_rows(t.problems(random.Random(0), 400, args.ops, "train"), data.tokenizer, args.prompt_len, args.gen_length)
    masked, weight = t.mask_tail(random.Random(0), tokens, args.prompt_len, data.tokenizer)
    assert torch.allclose(weight.sum(1), torch.ones(400)) and not (weight[~masked] > 0).any() and not masked[:, :args.prompt_len].any()
    first = masked.int().argmax(1)
    assert all(row[i:].all() and not row[:i].any() for row, i in zip(masked, first.tolist()))  # a tail
    equal = data.tokenizer.encode("=")[0]
    behind = [equal in row[max(0, i - 3):i] for row, i in zip(tokens.tolist(), first.tolist())]
    assert sum(behind[1::2]) > 1.5 * sum(behind[::2])  # every other row asks for a result
    asked = Counter()
    for row, w, i in zip(tokens.tolist(), weight, first.tolist()):
        text = data.tokenizer.decode([x for x, wanted in zip(row, w > 0) if wanted])
        assert re.fullmatch(r"[^.]*\.|[^.]*<\|eos\|>", text) and w[i] > 0  # the rest of one sum, or of the end
        asked[data.tokenizer.decode([row[i]]).strip()] += 1
    assert asked["="] and asked["."] and asked["Monday"] and asked["####"] and asked["<|eos|>"]  # every kind of token is asked for with nothing to its right

def test_a_batch_is_sums_then_tails_stories_and_sums():
    args = t.parse_args(["--batch-size", "16", "--steps", "100"])[0]
    data = t.Problems(args)
    tokens, masked, weight, pad = data.batch(9)
    assert tokens.shape == (16, 72) and all("left?" not in data.tokenizer.decode(row) for row in tokens.tolist())  # the first tenth
    tokens, masked, weight, pad = data.batch(10)
    start, tails = tokens.shape[1] - args.gen_length, 0
    for r, (row, p) in enumerate(zip(tokens.tolist(), pad.tolist())):
        if r < 14:
            assert data.tokenizer.decode(row[p:start]).endswith("left?\n") and not masked[r, :start].any()
            tails += r < 5 and bool(masked[r, masked[r].int().argmax():].all())
        else:
            assert "left?" not in data.tokenizer.decode(row) and p == 0
    assert tails == 5 and pad[:14].min() == 0  # no column is padding in all rows


def test_loss_falls_and_the_file_samples(tmp_path):
    p = run(*TINY, "--out", tmp_path / "a.pt", "--steps", 150, "--val-every", 75, "--eval", 4, "--sums", 0)
    losses = [float(x) for x in re.findall(r"validation ([\d.]+) nats per token\n", p.stdout)]
    assert len(losses) == 2 and losses[1] < losses[0] < 6.3 and losses[1] < 3, p.stdout
    assert re.search(r"greedy +left_to_right +\d of 4 exact .* 1\.\d\dx fewer", p.stdout), p.stdout
    model, tokenizer = load(tmp_path / "a.pt")
    assert model.wte.weight.dtype == torch.bfloat16 and len(model.extra["problems"]) == 1000 and tokenizer is not None


def same_weights(a, b):
    a, b = (load_file(f"{path}.train")["weights"] for path in (a, b))
    return all(torch.equal(a[k], b[k]) for k in a)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    flags = [*TINY, "--steps", 40, "--val-every", 10]
    run(*flags, "--out", tmp_path / "whole.pt")
    victim = subprocess.Popen(command(*flags, "--out", tmp_path / "cut.pt"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 100
    while not (tmp_path / "cut.pt.train").exists() and time.time() < deadline:
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    at = load_file(tmp_path / "cut.pt.train")["step"]
    assert 10 <= at < 40, f"killed too late to show anything: at step {at}"
    run("--resume", "--out", tmp_path / "cut.pt")
    assert same_weights(tmp_path / "whole.pt", tmp_path / "cut.pt")


def test_ctrl_c_saves_and_exits_130(tmp_path):
    p = subprocess.Popen(command(*TINY, "--steps", 100000, "--val-every", 100000, "--out", tmp_path / "a.pt"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while p.poll() is None and p.stderr.read(1) != "|":  # the bar: it trains
        pass
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=100)
    assert p.returncode == 130 and "--resume" in out and "Traceback" not in err, out + err
    assert load(tmp_path / "a.pt")[1] is not None and load_file(tmp_path / "a.pt.train")["step"] >= 0


STEPS = [*TINY, "--amp", "off", "--steps", "20", "--val-every", "6"]


def here(path, *flags, at=None, do=None, monkeypatch=None, capsys=None):
    """Trains in this process, to save the seconds of starting one; do() happens while the loss of step `at` is computed.
    -> exit code, stdout, stderr"""
    real, calls = t.diffusion_loss, [0]

    def loss(model, *batch):
        calls[0] += torch.is_grad_enabled()  # validation has none
        return real(model, *batch) if calls[0] != at + 1 or not torch.is_grad_enabled() else do() or real(model, *batch)

    if do:
        monkeypatch.setattr(t, "diffusion_loss", loss)
    monkeypatch.setattr(sys, "argv", ["train_tiny.py"])
    interrupt = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as e:
        launch(lambda: t.main([*map(str, flags), "--out", str(path)]))
    signal.signal(signal.SIGINT, interrupt)
    monkeypatch.setattr(t, "diffusion_loss", real)
    return e.value.code, *capsys.readouterr()


def test_sigterm_is_ctrl_c_and_saves_come_by_the_clock(tmp_path, monkeypatch, capsys):
    how = dict(monkeypatch=monkeypatch, capsys=capsys)
    assert here(tmp_path / "whole.pt", *STEPS, **how)[0] == 0
    code, out, err = here(tmp_path / "a.pt", *STEPS, at=9, do=lambda: os.kill(os.getpid(), signal.SIGTERM), **how)
    assert code == 130 and "stopped after 9 steps" in out and load_file(tmp_path / "a.pt.train")["step"] == 9, out + err
    code, out, err = here(tmp_path / "a.pt", "--resume", "--save-minutes", 0, at=1, do=lambda: sys.exit(3), **how)
    assert code == 3 and load_file(tmp_path / "a.pt.train")["step"] == 9  # before the first step of this run
    code, out, err = here(tmp_path / "a.pt", "--resume", "--save-minutes", 0, at=2, do=lambda: sys.exit(3), **how)
    assert code == 3 and load_file(tmp_path / "a.pt.train")["step"] == 10
    (tmp_path / "a.pt.train.123.tmp").write_text("of a run that was killed while it saved")
    assert here(tmp_path / "a.pt", "--resume", **how)[0] == 0
    assert same_weights(tmp_path / "whole.pt", tmp_path / "a.pt") and not list(tmp_path.glob("*.tmp"))


def test_what_stops_a_run_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    """A loss that is no number, a gradient that is none, a GPU that is full, a disk that is full."""
    path, how = tmp_path / "a.pt", dict(monkeypatch=monkeypatch, capsys=capsys)
    here(path, *STEPS, at=8, do=lambda: os.kill(os.getpid(), signal.SIGTERM), **how)
    model, state = path.read_bytes(), (tmp_path / "a.pt.train").read_bytes()

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def huge():
        return torch.tensor(float("inf"), requires_grad=True)

    def steep():  # a loss that is a number, with gradients that are none
        made[0].norm.weight.register_hook(lambda g: g * float("nan"))

    made, build = [], t.build
    monkeypatch.setattr(t, "build", lambda *a: made.insert(0, (built := build(*a))[0]) or built)
    for do, words in ((huge, "the loss is inf at step 10"), (steep, "the gradient is nan at step 10"), (out_of_memory, "raise --accumulate")):
        code, out, err = here(path, "--resume", at=2, do=do, **how)
        assert code == 2 and words in err and err.strip().splitlines()[-1].startswith("train_tiny.py: ") and "Traceback" not in err, err
        assert path.read_bytes() == model and (tmp_path / "a.pt.train").read_bytes() == state
    resource = pytest.importorskip("resource", reason="needs limits on the size of a file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(state) // 2, limits[1]))
    try:
        code, out, err = here(path, "--resume", **how)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and re.search(r"^train_tiny.py: cannot write .*a.pt", err, re.M) and "Traceback" not in err, err
    assert (tmp_path / "a.pt.train").read_bytes() == state and load(path) and not list(tmp_path.glob("*.tmp"))
    assert here(path, "--resume", **how)[0] == 0  # and with room it goes on


def test_resume_refuses_what_it_cannot_go_on_with(tmp_path):
    run(*TINY, "--steps", 2, "--out", tmp_path / "a.pt")
    assert "leave out --steps" in run("--resume", "--steps", 5, "--out", tmp_path / "a.pt", code=2).stderr
    torch.save({"x": 1}, tmp_path / "b.pt.train")
    assert "b.pt.train" in run("--resume", "--out", tmp_path / "b.pt", code=2).stderr
    state = torch.load(tmp_path / "a.pt.train")
    for name, value in (("n_layer", None), ("lr", "x"), ("ops", [1]), ("batch_size", -1), ("threads", "x")):  # writing tests/fuzz.py brought up tracebacks for these
        kept = {**state["args"], name: value}
        torch.save({**state, "args": {k: v for k, v in kept.items() if v is not None or k == "data"}}, tmp_path / "d.pt.train")
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} "):
            t.main(["--resume", "--out", str(tmp_path / "d.pt")])
    torch.save({**state, "weights": {}}, tmp_path / "c.pt.train")
    assert "does not fit together" in run("--resume", "--out", tmp_path / "c.pt", code=2).stderr


def test_text_of_ones_own(tmp_path):
    (tmp_path / "my.txt").write_text("".join(f"{i} little ducks went out to play. Été, naïve! " for i in range(400)), encoding="utf-8")
    p = run(*TINY, "--data", tmp_path / "my.txt", "--out", tmp_path / "a.pt", "--steps", 60, "--val-every", 30, "--vocab", 300)
    losses = [float(x) for x in re.findall(r"validation ([\d.]+) nats per token\n", p.stdout)]
    assert losses[1] < losses[0] and "nats per byte" in p.stdout
    assert "prompts" in load(tmp_path / "a.pt")[0].extra


@pytest.mark.parametrize("flags, words", [
    (["--steps", "0"], "--steps is 0"), (["--steps", "x"], "x"), (["--preset", "huge"], "huge"), (["--data", "/no/such.txt"], "/no/such.txt"),
    (["--ops", "3", "1"], "--ops"), (["--ops", "9", "9"], "--ops"), (["--ops", "7", "7"], "--prompt-len"), (["--n-embd", "30", "--n-head", "4"], "n_embd 30"), (["--vocab", "100"], "--vocab is 100"),
    (["--resume", "--out", "/no/such.pt"], "/no/such.pt.train"), (["--out", "/no/such/folder/x.pt", "--steps", "1"], "/no/such/folder"), (["--what"], "--what"),
    (["--gen-length", "32", "--block-length", "7"], "no multiple"), (["--seed", "-1"], "--seed"), (["--lr", "nan"], "--lr"), (["--threads", "1000000000"], "1 to 1024"),
    pytest.param(["--device", "cuda"], "CUDA", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")),
])
def test_user_errors(flags, words, monkeypatch, tmp_path, capsys):
    """In this process, to save the seconds of starting one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_tiny.py"])
    with pytest.raises(SystemExit) as e:
        launch(lambda: t.main([*TINY, *flags]))
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and not list(tmp_path.iterdir()), err


def test_user_errors_in_a_process_of_their_own(tmp_path):
    p = run("--steps", 0, "--out", tmp_path / "a.pt", code=2)
    assert "--steps is 0" in p.stderr and p.stderr.count("\n") == 1 and p.stdout == ""


def test_text_that_is_none(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    assert "not UTF-8" in run(*TINY, "--data", tmp_path / "latin.txt", code=2).stderr
    (tmp_path / "short.txt").write_text("too short")
    assert "too short" in run(*TINY, "--data", tmp_path / "short.txt", code=2).stderr
