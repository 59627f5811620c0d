"""A slice of every campaign of tests/campaigns/, and that the campaigns see faults."""
import os
import pickle
import random

import invariants
import pytest

pytest.importorskip("resource", reason="the campaigns are for Linux")

from campaigns import fuzz, kills  # noqa: E402

@pytest.mark.parametrize("name, n", [
    ("generate", 10), ("checkpoints", len(fuzz.KINDS)), ("converter", 3), ("commands", 4),
    ("prompts", 10), *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in kills.COMMANDS)])
def test_a_slice(name, n, capfd):
    """Not the cases of the full campaigns' seed. The whole: python tests/campaigns/fuzz.py NAME"""
    if name in ("converter", "converting"):
        pytest.importorskip("safetensors")
    faults = kills.campaign(n, 1, [name]) if name in kills.COMMANDS else fuzz.campaign(name, n, 1)
    out, err = capfd.readouterr()
    assert not faults and f"{name}: {n} " in out, out + err

@pytest.mark.parametrize("broken", [
    lambda real, args, how: real(*args, **how | dict.fromkeys({"delay"} & {*how}, False)),
    lambda real, args, how: real(*args, **how | {"generator": None}),
    lambda real, args, how: real(args[0], args[1][::-1], **how)])
def test_generate_sees_faults(broken, monkeypatch, capfd):
    """Here: no delay, seeds that are lost, rows that are mixed up."""
    real = invariants.generate
    monkeypatch.setattr(invariants, "generate", lambda *args, **how: broken(real, args, how))
    assert fuzz.campaign("generate", 20, seed=1) > 0
    assert "python tests/campaigns/fuzz.py generate --seed 1 --first" in capfd.readouterr().out

@pytest.mark.parametrize("job, words", [
    (lambda: bytearray(2 * fuzz.MEMORY) and None, "took 2"), (lambda: 1 / 0, "ZeroDivisionError"),
    (lambda: all(iter(lambda: 1, 0)), "SIG(KILL|XCPU)"),
    (lambda: os.kill(os.getpid(), 10), "SIGUSR1"),
    (lambda: os.write(2, b"warning") and None, "stderr has 'warning"),
    # each raises a ValueError with this text
    (lambda: int("enough memory"), "only a limit"), (lambda: int("NoneType"), "not a sentence")])
def test_a_fault_is_seen(job, words, tmp_path):
    box = fuzz.Box(tmp_path)
    with pytest.raises(AssertionError, match=words):
        fuzz.attempt(box, "sample.py", job=job, seconds=2 if "XCPU" in words else 60)
    assert fuzz.attempt(box, "sample.py", job=lambda: print("fine")) == (None, "fine\n")

def test_attacks_leave_a_trace(tmp_path):
    """Unpickled without care, the first attacks write the file that proves that code was run."""
    box = fuzz.Box(tmp_path)
    for attack in fuzz.attacks(str(box.canary))[:4]:
        fuzz.attempt(box, "sample.py", job=lambda: pickle.loads(pickle.dumps(attack)) and None)
        assert box.canary.exists()
        box.canary.unlink()

@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_case_by_case_the_same(kind, tmp_path):
    """Case i is drawn from (seed, i) alone, so the line printed for a failure repeats it."""
    box, files = fuzz.Box(tmp_path), []
    for _ in range(2):
        fuzz.KINDS[kind](box, random.Random("3"))
        files.append(box.broken.read_bytes() if box.broken.is_file() else None)
        box.clean()
    assert files[0] == files[1]
