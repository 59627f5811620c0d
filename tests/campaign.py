"""Kills training, converting and answering a file with kill -9 at random moments, lets each go on, and compares what comes out
with an unbroken run, bit for bit.

python tests/campaign.py                   20 kills of each kind, some minutes on two cores
python tests/campaign.py --dir DIR         the same, kept in DIR: a campaign that was broken off goes on there

Every second training is killed while it saves. The models are random and small. Converting needs the package safetensors
(requirements-llada.txt), and is left out without it. Exit code 1 if a file was lost, a run did not go on, or a result is wrong."""
import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

import torch
from forks import ended, start  # first: it finds the modules of the repository
from tqdm import tqdm

from model import load_file

TRAIN = "--n-layer 1 --n-head 2 --n-embd 32 --batch-size 8 --device cpu --eval 0 --steps 80 --val-every 10 --out a.pt".split()
ANSWER = "--ckpt ../wordy.pt --prompts ../p.txt --gen-length 32 --temperature 0.7 --cache all --batch-size 2 --device cpu --out a.jsonl".split()
FILES = {"training": ["a.pt", "a.pt.train"], "converting": ["a.pt"], "answering": ["a.jsonl"]}


def command(kind, folder):
    """-> script and flags: of a first run, or of one that goes on with what stands in the folder."""
    if kind == "training":
        return "train_tiny.py", ["--resume", "--out", "a.pt"] if (folder / "a.pt.train").exists() else TRAIN
    return ("convert.py", ["../fake", "--out", "a.pt"]) if kind == "converting" else ("sample.py", ANSWER)


def begin(kind, folder):
    (folder / "out").write_text("")
    return start(*command(kind, folder), folder / "out", folder / "err", patch=f"import os; os.chdir({str(folder)!r})")


def working(kind, folder):
    """Whether a run has begun with what it is for."""
    return (folder / "out").stat().st_size > 0 if kind == "training" else any(folder.glob("*.converting" if kind == "converting" else "a.jsonl"))


def wait(pid, until, pause=0.002):
    """-> the exit code, or None where until() came first."""
    while (code := ended(pid)) is None and not until():
        time.sleep(pause)
    return code


def nth_save(folder, n):
    """-> until() for the n-th time that a file is written beside the one that it will replace."""
    count, before = 0, False

    def until():
        nonlocal count, before
        now = any(name.endswith(".tmp") for name in os.listdir(folder))
        count, before = count + (now and not before), now
        return now and count >= n
    return until


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (dict, list)):
        return type(a) is type(b) and len(a) == len(b) and all(same(a[k], b[k]) for k in (a if isinstance(a, dict) else range(len(a))))
    return a == b


def answers(path):
    """The answers of a file; what was cut off in the middle of a line is none."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines(True) if line.endswith("\n")]


def prepare(home, seed):
    """What converting and answering read, made in a fork because it computes."""
    if not (pid := os.fork()):
        from conftest import random_model

        from model import save
        from scripts.fake_llada import main as fake
        from train_tiny import build_tokenizer
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            shutil.rmtree(home / "fake", ignore_errors=True)
            fake([str(home / "fake"), "--layers", "1", "--width", "32", "--vocab", "300", "--seed", str(seed)])
        save(home / "wordy.pt", random_model(seed, torch.float32, vocab_size=260, n_vocab=258, mask_id=257, eos_id=256, eot_id=None), build_tokenizer("some text ", 258))
        (home / "p.txt").write_text("".join(f"{'long ' * (i % 4)}prompt {i}\n" for i in range(30)))
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        sys.exit("campaign.py: could not make what it works on")


def unbroken(kind, home):
    """A run from beginning to end. -> its folder, and the seconds that it worked"""
    folder = home / f"{kind}-whole"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pid = begin(kind, folder)
    code, began = wait(pid, lambda: working(kind, folder)), time.time()
    if code or wait(pid, lambda: False):
        sys.exit(f"campaign.py: an unbroken run of {kind} failed: {(folder / 'err').read_text()}")
    return folder, time.time() - began


def kill(kind, number, home, whole, seconds, seed):
    """One run that is killed, and goes on. -> what became of it"""
    rng, folder = random.Random(f"{seed} {kind} {number}"), home / f"{kind}-{number}"
    saving = kind == "training" and number % 2
    while True:  # until a kill comes before the end
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if kind == "converting" and number % 2:  # another checkpoint stands there, not to be lost
            shutil.copy(home / "wordy.pt", folder / "a.pt")
        pid = begin(kind, folder)
        code = wait(pid, lambda: working(kind, folder))
        if saving and code is None:
            code = wait(pid, nth_save(folder, rng.randint(1, 12)), pause=0.0002)  # of 16
        began = time.time()
        if code is None:
            moment = began + rng.uniform(0, 0.004 if saving else seconds)
            code = wait(pid, lambda: time.time() >= moment)
        if code is None:
            break
        seconds = min(seconds, max(0.01, time.time() - began))  # the machine was slower when they were measured
        if code:
            sys.exit(f"campaign.py: {kind} failed without a kill: {(folder / 'err').read_text()}")
    there = [name for name in FILES[kind] if (folder / name).exists()]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found = dict(kind=kind, number=number, saving=any(folder.glob("*.tmp")) or any(folder.glob("*.converting")), lost=0)
    for name in there:
        try:
            if kind == "answering":
                given = answers(folder / name)
                found["lost"] += given != answers(whole / name)[:len(given)]
            else:
                load_file(folder / name)
        except ValueError:
            found["lost"] += 1
    kept = (folder / "a.jsonl").read_bytes() if kind == "answering" else b""
    found["stuck"] = wait(begin(kind, folder), lambda: False) != 0
    if kind == "answering":
        found["wrong"] = answers(folder / "a.jsonl") != answers(whole / "a.jsonl") or not (folder / "a.jsonl").read_bytes().startswith(kept[:kept.rfind(b"\n") + 1])
    else:
        found["wrong"] = any(not (folder / name).exists() or not same(load_file(folder / name), load_file(whole / name)) for name in FILES[kind])
    found["wrong"] |= {p.name for p in folder.iterdir()} != {p.name for p in whole.iterdir()}  # nothing is left lying about
    if not (found["lost"] or found["stuck"] or found["wrong"]):
        shutil.rmtree(folder)
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=20, help="of each kind (20)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dir", metavar="DIR", help="where to keep all of it (a temporary folder)")
    args = p.parse_args()
    torch.set_num_threads(1)
    home = pathlib.Path(args.dir or tempfile.mkdtemp()).absolute()
    home.mkdir(parents=True, exist_ok=True)
    log, kinds, began = home / f"kills-{args.seed}.jsonl", list(FILES), time.time()
    if not importlib.util.find_spec("safetensors"):
        kinds.remove("converting")
        print("converting is left out: it needs the package safetensors (requirements-llada.txt)")
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not (home / "p.txt").exists():  # what is made last
        prepare(home, args.seed)
    for kind in kinds:
        numbers = sorted(set(range(args.kills)) - {d["number"] for d in done if d["kind"] == kind})
        whole, seconds = unbroken(kind, home) if numbers else (None, None)
        for number in tqdm(numbers, kind, unit="kill", disable=None):
            done.append(kill(kind, number, home, whole, seconds, args.seed))
            with open(log, "a") as f:
                f.write(json.dumps(done[-1]) + "\n")
    print(f"{'':12}{'kills':>7}{'while writing':>16}{'files lost':>13}{'did not go on':>16}{'wrong results':>16}")
    for kind in kinds:
        rows = [d for d in done if d["kind"] == kind and d["number"] < args.kills]
        print(f"{kind:12}{len(rows):7}{sum(d['saving'] for d in rows):16}{sum(d['lost'] for d in rows):13}{sum(d['stuck'] for d in rows):16}{sum(d['wrong'] for d in rows):16}")
    bad = any(d["lost"] or d["stuck"] or d["wrong"] for d in done)
    print(f"seed {args.seed}, {time.time() - began:.0f} s" + (f"; what went wrong is in {home}" if bad else ""))
    if not args.dir and not bad:
        shutil.rmtree(home)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
