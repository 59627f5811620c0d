"""Several processes, as torchrun starts them: most are forked by conftest.py, which saves seconds,
and one test uses torchrun itself."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, answers, forked

from model import load
from support.checkpoint import read

TINY = ("--n-layer 1 --n-head 2 --n-embd 32 --batch-size 15 --device cpu --eval 0 --amp off "
        "--steps 24 --val-every 8").split()

def losses(out):
    return [float(x) for x in re.findall(r"validation ([\d.]+) nats per token\n", out)]

def sentences(err):
    """What the processes said on stderr, without bars."""
    return [line for line in re.split(r"[\n\r]", "\n".join(err))
            if re.match(r"(train_tiny|sample)\.py: |stopped", line)]

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run of two processes: its file, and its losses."""
    path = tmp_path_factory.mktemp("whole") / "a.pt"
    codes, out, err = forked(2, "train_tiny.py", *TINY, "--out", path)
    assert codes == [0, 0] and "2 processes" in out[0] and out[1] == err[1] == "", (out, err)
    return path, losses(out[0])

def test_two_processes_train_as_one(whole, tmp_path):
    """A batch in one piece, in three parts, in two processes (8 and 7 rows), in two times two
    parts: the same losses, to rounding."""
    for n, parts in ((1, 1), (1, 3), (2, 2)):
        codes, [out, *_], _ = forked(n, "train_tiny.py", *TINY, "--accumulate", parts,
                                     "--out", tmp_path / "b.pt")
        assert codes == [0] * n and losses(out) == pytest.approx(whole[1], abs=5e-3), (n, parts)
    assert whole[1][0] - whole[1][-1] > 0.1, "nothing was learned that could differ"

@pytest.mark.slow
def test_a_dead_process_ends_the_run_which_resumes_to_the_same_bits(whole, tmp_path):
    """torchrun starts two processes, and the second one is killed when the first has saved."""
    path, kept = tmp_path / "a.pt", tmp_path / "a.pt.train"
    flags = [*TINY, "--save-minutes", "0", "--out", path]
    p = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=2", ROOT / "train_tiny.py", *flags],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 200
    while not kept.exists() and p.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    children = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout
    for pid in children.split():
        if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
            os.kill(int(pid), signal.SIGKILL)
    out, err = p.communicate(timeout=200)
    [said] = sentences([err])
    assert p.returncode == 1 and "another process of this run has ended" in said, out + err
    assert f"train_tiny.py --resume --out {path}" in said
    assert losses(out) == whole[1][:len(losses(out))] and read(kept)["step"] < 24
    assert forked(2, "train_tiny.py", "--resume", "--out", path)[0] == [0, 0]
    weights, expected = (read(f"{file}.train")["weights"] for file in (path, whole[0]))
    assert all(torch.equal(w, expected[name]) for name, w in weights.items())

AT_STEP_15 = """
real, calls = train_tiny.diffusion_loss, 0
def loss(model, *batch):
    global calls
    calls += len(batch[0]) < 15  # a part of a batch, and not validation
    if rank == 1 and calls == 16:
        import os, signal, torch
        {}
    return real(model, *batch)
train_tiny.diffusion_loss = loss
"""

def test_sigterm_stops_all_at_the_same_step(whole, tmp_path):
    path, patch = tmp_path / "a.pt", AT_STEP_15.format("os.kill(os.getpid(), signal.SIGTERM)")
    codes, out, err = forked(2, "train_tiny.py", *TINY, "--out", path, patch=patch)
    assert codes == [130, 130] and "stopped after 15 steps" in out[0], (out, err)
    assert read(f"{path}.train")["step"] == 15
    codes, out, _ = forked(1, "train_tiny.py", "--resume", "--out", path)  # with fewer processes
    assert codes == [0] and losses(out[0]) == pytest.approx(whole[1][1:], abs=5e-3)

@pytest.fixture(scope="module")
def job(wordy, tmp_path_factory):
    """Flags that answer 11 prompts with a checkpoint of random weights, and the answers."""
    folder = tmp_path_factory.mktemp("job")
    prompts = [f"{'long ' * (i % 4)}prompt {i}" for i in range(11)]
    (folder / "p.txt").write_text("\n".join(prompts))
    flags = ["--ckpt", wordy, "--prompts", folder / "p.txt"]
    flags += "--gen-length 8 --temperature 0.7 --cache all --batch-size 2 --device cpu".split()
    assert forked(1, "sample.py", *flags, "--out", folder / "whole.jsonl")[0] == [0]
    return flags, answers(folder / "whole.jsonl")

@pytest.mark.parametrize("script, flags, fault, words", [
    ("train_tiny.py", ["--accumulate", 10], "", "too small for 2 processes"),
    ("train_tiny.py", [], "return real(model, *batch) * float('nan')", "loss is nan at step 15"),
    ("train_tiny.py", [], "raise torch.OutOfMemoryError('out of memory')", "raise --accumulate"),
    *[("sample.py", flags.split(), "", "--out") for flags in ("--prompt hi", "--chat", "--watch")],
    ("sample.py", ["--prompts", "-", "--out", "x"], "", "FILE"),
    ("sample.py", None, "", "line 1 of --out")])
def test_one_process_says_what_is_wrong(job, tmp_path, script, flags, fault, words):
    """The others fail too, or are ended before or while they do."""
    (tmp_path / "a.jsonl").write_text("precious\n")
    usual = [*TINY, "--out", "a.pt"] if script == "train_tiny.py" else []
    flags = [*job[0], "--out", "a.jsonl"] if flags is None else [*usual, *flags]
    patch = AT_STEP_15.format(fault) if fault else ""
    codes, _, err = forked(2, script, *flags, cwd=tmp_path, patch=patch)
    assert 2 in codes and set(codes) <= {2, 130, -15}, (codes, err)
    assert len(sentences(err)) == 1 and words in sentences(err)[0], err
    assert (tmp_path / "a.jsonl").read_text() == "precious\n"
    assert codes[0] == 2 or "line 1" not in words  # the first process reads the file
    if fault:
        assert read(tmp_path / "a.pt.train")["step"] == 8 and load(tmp_path / "a.pt")

# each call of generate leaves a line in a file, so that processes can wait for each other
WAIT = """
import os, signal, time
real, calls = sample.generate, 0
def wait(ready, seconds=100):
    end = time.time() + seconds
    while not ready(open("log").read().splitlines()) and time.time() < end:
        time.sleep(0.01)
def generate(model, prompts, **how):
    global calls
    calls += 1
    with open("log", "a") as f:
        f.write(f"{rank} {len(prompts)} {calls}\\n")
    HERE
    return real(model, prompts, **how)
sample.generate = generate
"""

@pytest.mark.parametrize("n, slow", [(2, 0), (3, 1)])
def test_the_answers_of_several_processes_are_those_of_one(job, tmp_path, n, slow):
    """In order, each given once, though one process is so slow that the others answer the rest."""
    path = tmp_path / "a.jsonl"
    here = f"""if calls == 1:
        wait(lambda log: len({{line[0] for line in log}}) == {n})
        wait(lambda log: rank != {slow} or len(log) == 61)"""
    codes, out, err = forked(n, "sample.py", *job[0], "--out", path, cwd=tmp_path,
                             patch=WAIT.replace("HERE", here))
    assert codes == [0] * n and out == [f"{path}: 11 prompts answered\n"] + [""] * (n - 1), err
    assert answers(path) == job[1] and len(job[1]) == 11 * 12
    ran = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sum(int(rows) for _, rows, _ in ran) == 11 * 12, "each prompt once, with each cache"
    assert [rank for rank, *_ in ran].count(str(slow)) == 12, "nobody waits for the slow one"
    codes, out, _ = forked(2, "sample.py", *job[0], "--out", path)  # all of it is there
    assert codes == [0, 0] and out[0].endswith("11 of them before\n") and answers(path) == job[1]
    assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl", "log"}, "a lock was left"

@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_answers_resume_after_a_dead_process(job, tmp_path, victim):
    """It dies in its second batch, while the other one is in its own."""
    path = tmp_path / "a.jsonl"
    here = f"""if calls == 13:
        wait(lambda log: sum(line.endswith(' 13') for line in log) == 2)
        os.kill(os.getpid(), signal.SIGKILL) if rank == {victim} else time.sleep(100)"""
    codes, out, err = forked(2, "sample.py", *job[0], "--out", path, cwd=tmp_path,
                             patch=WAIT.replace("HERE", here))
    said = f"stopped; the same command resumes after the answers in --out {path}"
    assert sorted(codes) == [-9, 130] and sentences(err) == [said], (codes, err)
    text = path.read_text()
    assert text.endswith("\n") and answers(path) == job[1][:text.count("\n")]
    assert forked(3, "sample.py", *job[0], "--out", path)[0] == [0] * 3
    assert answers(path) == job[1] and path.read_text().startswith(text)
