"""Kills training, converting and answering a file with kill -9 at random moments, resumes each, and
compares the result with that of an unbroken run, bit for bit.

python tests/campaigns/kills.py              20 kills of each kind, some minutes on two cores

Every second training is killed while it saves. Converting needs safetensors. Exit code 1 if a file
was lost, a run did not resume, or a result is wrong. Linux only."""
import argparse
import collections
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
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # tests/
from conftest import byte_model, ended, fork, start  # noqa: E402

from model import save  # noqa: E402
from support.checkpoint import read  # noqa: E402

COMMANDS = {
    "training": "train_tiny.py --n-layer 1 --n-head 2 --n-embd 32 --batch-size 8 --device cpu "
                "--eval 0 --steps 80 --val-every 10 --out a.pt",
    "converting": "convert.py ../fake --out a.pt",
    "answering": "sample.py --ckpt ../small.pt --prompts ../p.txt --gen-length 16 --cache all "
                 "--temperature 0.7 --batch-size 2 --device cpu --out a.jsonl"}
FAULTS = "files lost", "did not resume", "wrong results"

def begin(kind, folder):
    """-> the id of a first run, or of one that resumes from the files in the folder."""
    again = "train_tiny.py --resume --out a.pt" if (folder / "a.pt.train").exists() else None
    script, *flags = (again or COMMANDS[kind]).split()
    (folder / "out").write_text("")
    return start(script, flags, folder / "out", folder / "err", cwd=folder)

def wait(pid, until=lambda: False, pause=0.002):
    """-> the exit code, None if until() came first."""
    while (code := ended(pid)) is None and not until():
        time.sleep(pause)
    return code

def working(folder):
    """Whether a run has begun its work: it prints, or has a file."""
    files = [*folder.glob("*.tmp"), *folder.glob("a.jsonl")]
    return files or (folder / "out").stat().st_size

def bits(w):
    return str(w.dtype), w.shape, w.flatten().view(torch.uint8).numpy().tobytes().hex()

def content(path):
    """What is in a file, of answers the whole lines without their times. None: it is broken."""
    try:
        if path.suffix != ".jsonl":
            return json.dumps(read(path), default=bits)
        lines = path.read_bytes().split(b"\n")[:-1]
        return [json.loads(line) | {"seconds": None} for line in lines]
    except ValueError:
        return None

def prepare(home, seed):
    """Makes the input of converting and answering."""
    from scripts.fake_hub import main as fake
    fake([str(home / "fake"), *"--layers 1 --width 32 --vocab 300 --seed".split(), str(seed)])
    save(home / "small.pt", *byte_model())
    (home / "p.txt").write_text("".join(f"{'long ' * (i % 4)}prompt {i}\n" for i in range(12)))

def killed(kind, folder, seconds, saving, rng):
    """Runs it in the folder until it is killed before its end. seconds: how long it works."""
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if kind == "converting" and rng.random() < 0.5:  # another checkpoint, that must not be lost
            shutil.copy(folder.parent / "small.pt", folder / "a.pt")
        pid = begin(kind, folder)
        code, began = wait(pid, lambda: working(folder)), time.time()
        if code is None:
            moment = began + rng.uniform(0, seconds)
            code = wait(pid, lambda: time.time() >= moment)
        if saving and code is None:
            code = wait(pid, lambda: any(folder.glob("*.tmp")), pause=0.0002)
            time.sleep(rng.uniform(0, 0.004))
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return
        assert code == 0, f"{kind} failed without a kill: {(folder / 'err').read_text()}"
        seconds = min(seconds, max(0.01, time.time() - began))  # this run was faster than the first

def check_kill(kind, folder, whole):
    """Reads the files of a killed run, resumes it and compares. -> {what: 0 or 1}"""
    writing = any(folder.glob("*.tmp"))
    found = collections.Counter({"kills": 1, "while writing": writing, **dict.fromkeys(FAULTS, 0)})
    expected = {path.name: content(path) for path in whole.glob("a.*")}
    kept, answers = b"", folder / "a.jsonl"
    for name in [name for name in expected if (folder / name).exists()]:
        now = content(folder / name)
        part = expected[name][:len(now or "")] if kind == "answering" else now
        found["files lost"] |= now is None or now != part
    if answers.exists():  # no line may be written again
        kept = answers.read_bytes().rpartition(b"\n")[0]
    found["did not resume"] = wait(begin(kind, folder)) != 0
    there = {path.name: content(path) for path in folder.glob("a.*")}  # and no other file is left
    again = answers.exists() and not answers.read_bytes().startswith(kept)
    found["wrong results"] = there != expected or again
    return found

def campaign(kills, seed=0, kinds=COMMANDS):
    """Prints the counts of the kills -> whether there is a fault."""
    home, began, bad = pathlib.Path(tempfile.mkdtemp()), time.time(), False
    assert wait(fork(lambda: prepare(home, seed), home / "out", home / "err")) == 0, home
    for kind in kinds:
        whole, row = home / f"{kind}-whole", collections.Counter()
        whole.mkdir()
        pid = begin(kind, whole)
        code, started = wait(pid, lambda: working(whole)), time.time()
        assert not code and not wait(pid), f"{kind} failed: {(whole / 'err').read_text()}"
        seconds = time.time() - started
        for number in tqdm(range(kills), kind, unit="kill", disable=None):
            rng, folder = random.Random(f"{seed} {kind} {number}"), home / f"{kind}-{number}"
            killed(kind, folder, seconds, kind == "training" and number % 2, rng)
            row.update(check_kill(kind, folder, whole))
        print(f"{kind}: " + ", ".join(f"{int(n)} {what}" for what, n in row.items()))
        bad |= any(row[fault] for fault in FAULTS)
    print(f"seed {seed}, {time.time() - began:.0f} s" + f"; see {home}" * bad)
    if not bad:
        shutil.rmtree(home)
    return bad

if __name__ == "__main__":
    p = argparse.ArgumentParser(usage=__doc__)
    p.add_argument("--kills", type=int, default=20, help="of each kind (20)")
    p.add_argument("--seed", type=int, default=0)
    sys.exit(campaign(**vars(p.parse_args())))
