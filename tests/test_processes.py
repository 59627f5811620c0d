"""Several processes: what torchrun starts. Most of it with processes that tests/forks.py forks, which saves seconds, and
the two ways that a user goes with torchrun itself.

python -m pytest tests/test_processes.py"""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, random_model
from conftest import forked as several

from model import load, load_file, save
from train_tiny import build_tokenizer

TINY = "--n-layer 1 --n-head 2 --n-embd 32 --batch-size 15 --device cpu --eval 0 --amp off --steps 24 --val-every 8".split()


def losses(out):
    return [float(x) for x in re.findall(r"validation ([\d.]+) nats per token\n", out)]


def sentences(err):
    """What was said on stderr, without bars."""
    return [line for text in err for line in re.split(r"[\n\r]", text) if re.match(r"(train_tiny|sample)\.py: |stopped", line)]


def torchrun(script, *flags, until):
    """Starts two processes of a script with torchrun, kills the second one with -9 when until() says so. -> stdout, stderr"""
    p = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / script), *map(str, flags)],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 200
    while not until() and p.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    for pid in subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout.split():
        with open(f"/proc/{pid}/environ") as f:
            if "\0RANK=1\0" in f.read():
                os.kill(int(pid), signal.SIGKILL)
    out, err = p.communicate(timeout=200)
    assert p.returncode == 1, out + err
    return out, err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run of two processes: its file, and its losses."""
    path = tmp_path_factory.mktemp("whole") / "a.pt"
    codes, out, err = several(2, "train_tiny.py", *TINY, "--out", path)
    assert codes == [0, 0] and "2 processes" in out[0] and out[1] == err[1] == "", (out, err)
    return path, losses(out[0])


def weights(path):
    return load_file(f"{path}.train")["weights"]


def test_two_processes_train_as_one(whole, tmp_path):
    """One batch in one piece, in two processes (8 and 7 rows), in three parts, in two times two parts: the same losses, to rounding."""
    found = []
    for n, parts in ((1, 1), (1, 3), (2, 2)):
        codes, out, _ = several(n, "train_tiny.py", *TINY, "--accumulate", parts, "--out", tmp_path / "b.pt")
        assert codes == [0] * n and len(losses(out[0])) == 3
        found.append(losses(out[0]))
    for other in found:
        assert max(abs(a - b) for a, b in zip(whole[1], other)) < 5e-3, (whole[1], found)
    assert whole[1][0] - whole[1][-1] > 0.1, "nothing was learned that could differ"


def test_a_dead_process_ends_the_run_which_resumes_to_the_same_bits(whole, tmp_path):
    path = tmp_path / "a.pt"
    out, err = torchrun("train_tiny.py", *TINY, "--save-minutes", 0, "--out", path, until=(tmp_path / "a.pt.train").exists)
    assert sentences([err]) == [f"train_tiny.py: another process of this run has ended, and the run with it; {path}.train keeps the last save: "
                                f"go on with train_tiny.py --resume --out {path}"], err
    assert losses(out) == whole[1][:len(losses(out))] and load_file(f"{path}.train")["step"] < 24
    codes, out, err = several(2, "train_tiny.py", "--resume", "--out", path)
    assert codes == [0, 0] and all(torch.equal(w, weights(whole[0])[name]) for name, w in weights(path).items())


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
    codes, out, err = several(2, "train_tiny.py", *TINY, "--out", tmp_path / "a.pt", patch=AT_STEP_15.format("os.kill(os.getpid(), signal.SIGTERM)"))
    assert codes == [130, 130] and "stopped after 15 steps" in out[0] and load_file(tmp_path / "a.pt.train")["step"] == 15, (out, err)
    codes, out, err = several(1, "train_tiny.py", "--resume", "--out", tmp_path / "a.pt")  # with another number of processes
    assert codes == [0] and max(abs(a - b) for a, b in zip(whole[1][1:], losses(out[0]), strict=True)) < 5e-3


@pytest.mark.parametrize("what, said", [("return real(model, *batch) * float('nan')", "the loss is nan at step 15"), ("raise torch.OutOfMemoryError('CUDA out of memory')", "raise --accumulate")])
def test_what_happens_to_one_ends_all_with_one_sentence(whole, tmp_path, what, said):
    codes, out, err = several(2, "train_tiny.py", *TINY, "--out", tmp_path / "a.pt", patch=AT_STEP_15.format(what))
    assert 2 in codes and set(codes) <= {2, -15} and len(sentences(err)) == 1 and said in sentences(err)[0], (codes, err)
    assert load_file(tmp_path / "a.pt.train")["step"] == 8 and load(tmp_path / "a.pt")


@pytest.mark.parametrize("script, flags, said", [("train_tiny.py", [*TINY, "--accumulate", 10], "too small for 2 processes"), ("sample.py", ["--prompt", "hi"], "--out"),
                                                 ("sample.py", ["--chat"], "--out"), ("sample.py", ["--watch"], "--out"), ("sample.py", ["--prompts", "-", "--out", "x"], "--prompts FILE")])
def test_user_errors_are_said_once(script, flags, said):
    codes, out, err = several(2, script, *flags)
    assert 2 in codes and set(codes) <= {2, 130, -15} and len(sentences(err)) == 1 and said in sentences(err)[0], (codes, err)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A checkpoint of random weights and 11 prompts: flags that answer them."""
    folder = tmp_path_factory.mktemp("job")
    save(folder / "wordy.pt", random_model(dtype=torch.float32, vocab_size=260, n_vocab=258, mask_id=257, eos_id=256, eot_id=None), build_tokenizer("some text ", 258))
    (folder / "p.txt").write_text("".join(f"{'long ' * (i % 4)}prompt {i}\n" for i in range(11)))
    return ["--ckpt", folder / "wordy.pt", "--prompts", folder / "p.txt", "--gen-length", 8, "--temperature", 0.7, "--cache", "all", "--batch-size", 2, "--device", "cpu"]


def answers(path):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


SLOW = """
import os, signal, time
real, calls = sample.generate, 0
def generate(model, prompts, **how):
    global calls
    calls += 1
    if {kill}:
        while f"{{1 - rank}} " not in open({log!r}).read():  # the other one has begun
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep({seconds}[rank])
    with open({log!r}, "a") as f:
        f.write(f"{{rank}} {{len(prompts)}}\\n")
    return real(model, prompts, **how)
sample.generate = generate
"""


def test_the_answers_of_several_processes_are_those_of_one(job, tmp_path):
    """In order, each given once, whichever process is slow."""
    for n, seconds in ((1, [0]), (2, [0.2, 0]), (3, [0, 0.3, 0.02])):
        path, log = tmp_path / f"{n}{seconds}.jsonl", tmp_path / f"{n}{seconds}.log"
        codes, out, err = several(n, "sample.py", *job, "--out", path, patch=SLOW.format(kill=False, seconds=seconds, log=str(log)))
        assert codes == [0] * n and out == [f"{path}: 11 prompts answered\n"] + [""] * (n - 1), (out, err)
        ran = [line.split() for line in log.read_text().splitlines()]
        assert sum(int(rows) for _, rows in ran) == 11 * 3, "each prompt once, with each of three caches"
        assert answers(path) == answers(tmp_path / "1[0].jsonl") and len(answers(path)) == 33
        if max(seconds) >= 0.2:  # nobody waits for a slow one
            slow = str(seconds.index(max(seconds)))
            assert 3 <= [who for who, _ in ran].count(slow) <= 9
    codes, out, _ = several(2, "sample.py", *job, "--out", path)  # all of it is there
    assert codes == [0, 0] and out[0].endswith("11 of them before\n") and answers(path) == answers(tmp_path / "1[0].jsonl")
    path.write_text("precious\n")
    codes, out, err = several(2, "sample.py", *job, "--out", path)
    assert codes[0] == 2 and len(sentences(err)) == 1 and "line 1 of --out" in sentences(err)[0] and path.read_text() == "precious\n", (codes, err)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_answers_go_on_behind_a_dead_process(job, tmp_path, victim):
    path, whole, log = tmp_path / "a.jsonl", tmp_path / "whole.jsonl", tmp_path / "log"
    several(1, "sample.py", *job, "--out", whole)
    codes, out, err = several(2, "sample.py", *job, "--out", path, patch=SLOW.format(kill=f"rank == {victim} and calls == 4", seconds=[0.15 * (r != victim) for r in range(2)], log=str(log)))
    assert sorted(codes) == [-9, 130] and sentences(err) == [f"stopped; the same command goes on behind what --out {path} holds"], (codes, err)
    text = path.read_text()
    assert (not text or text.endswith("\n")) and answers(path) == answers(whole)[:text.count("\n")]
    assert several(3, "sample.py", *job, "--out", path)[0] == [0] * 3
    assert answers(path) == answers(whole) and path.read_text().startswith(text)


@pytest.mark.slow
def test_torchrun_answers_a_file(tmp_path):
    """The bundled model under torchrun, a kill -9 of one process, and the rest by another number of them."""
    model, _ = load(ROOT / "checkpoints" / "tiny.pt")
    (tmp_path / "p.txt").write_text("".join(question + "\n" for question, _ in model.extra["problems"][:20]))
    flags, path = ["--prompts", tmp_path / "p.txt", "--gen-length", 16, "--device", "cpu", "--batch-size", 2, "--out"], tmp_path / "a.jsonl"
    _, err = torchrun("sample.py", *flags, path, until=lambda: path.exists() and path.stat().st_size)
    assert sentences([err]) == [f"stopped; the same command goes on behind what --out {path} holds"], err
    assert 0 < len(answers(path)) < 20
    assert several(3, "sample.py", *flags, path)[0] == [0, 0, 0] and several(1, "sample.py", *flags, tmp_path / "whole.jsonl")[0] == [0]
    assert answers(path) == answers(tmp_path / "whole.jsonl")


def test_a_slice_of_the_campaign(tmp_path):
    """Two kills of each kind; the second run goes on with a campaign that is there, and has nothing left to do."""
    for _ in range(2):
        p = subprocess.run([sys.executable, str(ROOT / "tests" / "campaign.py"), "--kills", "2", "--dir", str(tmp_path)], capture_output=True, text=True, timeout=600)
        assert p.returncode == 0 and re.search(r"^training +2 +\d +0 +0 +0$", p.stdout, re.M) and re.search(r"^answering +2 +\d +0 +0 +0$", p.stdout, re.M), p.stdout + p.stderr
    assert len(list(tmp_path.glob("kills-0.jsonl"))) == 1
