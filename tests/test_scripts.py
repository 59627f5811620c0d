"""scripts/tradeoff.py: its statistics against known figures, and a run on two problems.

python -m pytest tests/test_scripts.py"""
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from dkv_min import cache_cost
from model import load

sys.path.insert(0, str(ROOT / "scripts"))
import tradeoff  # noqa: E402


def test_wilson():
    assert tradeoff.wilson(0, 10) == pytest.approx((0, 0, 27.75), abs=0.01)
    assert tradeoff.wilson(81, 263) == pytest.approx((30.80, 25.53, 36.62), abs=0.01)  # Newcombe 1998, table I


def test_paired():
    a, b = [True] * 50 + [False] * 50, [True] * 40 + [False] * 60
    difference, low, high = tradeoff.paired(a, b)
    assert difference == 10 and 3 < low < 10 < high < 17
    assert tradeoff.paired(b, a) == pytest.approx((-10, -high, -low))
    assert tradeoff.paired(a, a)[0] == 0 and tradeoff.paired(a, a)[1] < 0 < tradeoff.paired(a, a)[2]  # never certain


def test_runs_are_compared_with_the_same_order():
    runs = tradeoff.runs()
    for how, base in runs:
        if base is not None:
            other = runs[base][0]
            assert other["cache"] == "none" and other.get("remasking") == how.get("remasking") and (how["cache"] == "none" or other.get("steps") == how.get("steps"))


def test_a_run_on_two_problems(tmp_path):
    p = subprocess.run([sys.executable, str(ROOT / "scripts" / "tradeoff.py"), "--n", "2", "--workers", "1", "--json", str(tmp_path / "a.json")], capture_output=True,
                       text=True, timeout=280)
    assert p.returncode == 0, p.stderr
    rows = [line for line in p.stdout.splitlines() if line.startswith(("| none", "| decode", "| greedy"))]
    found = json.loads((tmp_path / "a.json").read_text())
    model, tokenizer = load(ROOT / "checkpoints" / "tiny.pt")
    extra, G = model.extra, model.extra["gen_length"]
    lengths = [len(tokenizer.encode(extra["template"].replace("{}", q))) for q, _ in extra["problems"][:2]]
    assert len(rows) == len(found) == len(tradeoff.runs())
    for row, run in zip(rows, found):
        how = run["settings"]
        cost = sum(cache_cost(n, G, int(G * how.get("steps", 1)), extra["block_length"], how["cache"], how.get("refresh"), how.get("window", 4), how.get("delay", True)) for n in lengths)
        full = sum(cache_cost(n, G, G, extra["block_length"]) for n in lengths)
        assert run["positions_run"] == cost and f"| {full / cost:.2f}x |" in row
        assert f"| {50 * sum(run['right']):.1f}% [" in row and re.search(r"left|low|random", row)


@pytest.mark.parametrize("flags, words", [(["--n", "0"], "--n"), (["--ckpt", "nope"], "nope"), (["--what"], "--what")])
def test_user_errors(flags, words):
    p = subprocess.run([sys.executable, str(ROOT / "scripts" / "tradeoff.py"), *flags], capture_output=True, text=True, timeout=100)
    assert p.returncode == 2 and words in p.stderr and p.stderr.count("\n") == 1 and p.stdout == "", p.stderr
