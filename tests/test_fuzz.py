"""A slice of every campaign of tests/fuzz.py, and that the campaigns see what is wrong.

python -m pytest tests/test_fuzz.py"""
import os
import pickle

import fuzz
import pytest

import sample


@pytest.mark.parametrize("name, n", [("generate", 30), ("checkpoints", len(fuzz.KINDS)), ("converter", 3), ("commands", 8), ("prompts", 30)])
def test_a_slice(name, n, capfd):
    """Not the cases of the full campaigns' seed. The whole: python tests/fuzz.py NAME"""
    faults = fuzz.campaign(name, n, seed=1)
    out, err = capfd.readouterr()
    assert faults == 0, out + err
    assert f"{name}: {n} cases" in out or "skipped" in out


def test_generate_sees_a_cache_without_the_delay(monkeypatch, capfd):
    """And a closed form that is wrong: what the campaign says then names the case and how to repeat it."""
    real = fuzz.generate
    monkeypatch.setattr(fuzz, "generate", lambda *a, **how: real(*a, **how | {"delay": False}))
    assert fuzz.campaign("generate", 30, seed=1) > 0
    assert "python tests/fuzz.py generate --seed 1 --first" in capfd.readouterr().out


@pytest.fixture
def box(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sample.py"])
    return fuzz.Box(tmp_path)


def said(box, job, **how):
    return fuzz.verdict(*fuzz.contained(box, job, **how), "sample.py")


def test_the_limits_hold(box):
    def endless():
        while True:
            pass
    for job, words in ((lambda: bytearray(2 * fuzz.MEMORY), "took 2"), (endless, "SIGKILL"), (lambda: os.kill(os.getpid(), 10), "SIGUSR1"), (lambda: 1 / 0, "ZeroDivisionError"), (lambda: os.write(2, b"warning\n"), "stderr has 'warning"),
                       (lambda: sample.launch(lambda: exec("raise ValueError('DefaultCPUAllocator: not enough memory')")), "only a limit")):
        with pytest.raises(AssertionError, match=words):
            said(box, job, seconds=1 if job is endless else 10)
    assert said(box, lambda: sample.launch(lambda: exec("raise ValueError('so it is')"))) == "so it is"
    assert said(box, lambda: print("fine")) is None


def test_the_canary_sings(box):
    """Unpickled without care, the first attacks do what they are for: a file that appears is proof that code was run."""
    for attack in fuzz.attacks(str(box.canary))[:3]:
        assert said(box, lambda: pickle.loads(pickle.dumps(attack)) and None) is None
        assert box.canary.exists()
        box.canary.unlink()


def test_case_by_case_the_same(box):
    """Case i is drawn from (seed, i) alone, so the line printed for a failure repeats it."""
    for kind in fuzz.KINDS:
        files = []
        for _ in range(2):
            path = box.work / "broken.pt"
            fuzz.write_broken_checkpoint(box, kind, fuzz.random.Random("3"), path)
            files.append(path.read_bytes() if path.is_file() else None)
            box.clean()
        assert files[0] == files[1], kind
