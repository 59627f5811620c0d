"""scripts/tradeoff.py: its statistics against known figures, and a run on two problems.

python -m pytest tests/test_scripts.py"""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, random_model

from dkv_min import cache_cost, generate
from model import save
from sample import cut
from train_tiny import build_tokenizer

sys.path.insert(0, str(ROOT / "scripts"))
import tradeoff  # noqa: E402
import bench as bench_py  # noqa: E402


def test_wilson():
    assert tradeoff.wilson(0, 10) == pytest.approx((0, 0, 27.75), abs=0.01)
    assert tradeoff.wilson(81, 263) == pytest.approx((30.80, 25.53, 36.62), abs=0.01)  # Newcombe 1998, table I


def test_paired():
    a, b = [True] * 50 + [False] * 50, [True] * 40 + [False] * 60
    difference, low, high = tradeoff.paired(a, b)
    assert (difference, low, high) == pytest.approx((10, 3.425, 16.183), abs=0.001)  # by hand
    assert tradeoff.paired([True] * 10, [False] * 10)[2] == 100
    assert tradeoff.paired(b, a) == pytest.approx((-10, -high, -low))
    assert tradeoff.paired(a, a)[0] == 0 and tradeoff.paired(a, a)[1] < 0 < tradeoff.paired(a, a)[2]  # never certain


def test_runs_are_compared_with_the_same_order():
    runs = tradeoff.runs()
    for how, base in runs:
        if base is not None:
            other = runs[base][0]
            assert other["cache"] == "none" and other.get("remasking") == how.get("remasking") and (how["cache"] == "none" or other.get("steps") == how.get("steps"))


def test_a_run_on_two_problems_and_going_on(tmp_path, capsys):
    model, tokenizer = random_model(dtype=torch.float32, vocab_size=260, n_vocab=258, mask_id=257, eos_id=256, eot_id=None), build_tokenizer("some text ", 258)
    ids = generate(model, [tokenizer.encode("and now\n")], gen_length=16, block_length=8).tokens[0][-16:]
    model.extra = dict(problems=[("how many", "none"), ("and now", tokenizer.decode(cut(ids, model.config)).strip())], gen_length=16, block_length=8, template="{}\n", known_order="left_to_right")
    save(tmp_path / "a.pt", model, tokenizer)
    ask = ["--ckpt", str(tmp_path / "a.pt"), "--n", "2", "--batch-size", "1", "--workers", "1", "--log", str(tmp_path / "log")]
    assert tradeoff.main(ask) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith(("| none", "| decode", "| greedy"))]
    lines = (tmp_path / "log").read_text().splitlines()
    parts = [json.loads(line) for line in lines[1:]]
    extra, G = model.extra, model.extra["gen_length"]
    lengths = [len(tokenizer.encode(extra["template"].replace("{}", q))) for q, _ in extra["problems"][:2]]
    assert len(rows) == len(tradeoff.runs()) == len(parts) / 2 and "| 50.0% [" in rows[0]
    agreements = set()
    for run, (row, (how, base)) in enumerate(zip(rows, tradeoff.runs())):
        cost = sum(cache_cost(n, G, int(G * how.get("steps", 1)), extra["block_length"], how["cache"], how.get("refresh"), how.get("window", 4), how.get("delay", True)) for n in lengths)
        full = sum(cache_cost(n, G, G, extra["block_length"]) for n in lengths)
        mine = [part for part in parts if part["run"] == run]
        assert sum(part["ran"] for part in mine) == cost and f"| {full / cost:.2f}x |" in row
        assert f"| {50 * sum(sum(part['right']) for part in mine):.1f}% [" in row and how.get("remasking", "low").split("_")[0] in row
        if base is not None:  # the two columns of the comparison, once more
            here, there = ({part["first"]: part for part in parts if part["run"] == j} for j in (run, base))
            same = sum(x == y for first in here for x, y in zip(here[first]["ids"][0], there[first]["ids"][0]))
            points = 50 * sum(here[first]["right"][0] - there[first]["right"][0] for first in here)
            assert f"| {points:+.1f} [" in row and f"| {100 * same / 32:.1f}% |" in row
            agreements.add(same)
    assert len(agreements) > 1
    (tmp_path / "log").write_text("\n".join(lines[:30]) + "\n" + lines[30][:20])  # as a killed run leaves it
    assert tradeoff.main(ask) == 0
    assert capsys.readouterr().out == printed and sorted((tmp_path / "log").read_text().splitlines()) == sorted(lines)
    (tmp_path / "other").write_bytes(b"\xff{ not ours\n")
    for flags in ([*ask, "--n", "1"], ["--log", str(tmp_path / "other")]):
        with pytest.raises(ValueError, match="no log of this"):
            tradeoff.main(flags)
    assert (tmp_path / "other").read_bytes() == b"\xff{ not ours\n"


@pytest.mark.parametrize("flags, words", [(["--n", "0"], "--n"), (["--ckpt", "nope"], "nope"), (["--what"], "--what")])
def test_user_errors(flags, words):
    with pytest.raises(ValueError, match=words):
        tradeoff.main(flags)


def bench(*flags, code=0):
    p = subprocess.run([sys.executable, str(ROOT / "scripts" / "bench.py"), *map(str, flags)], capture_output=True, text=True, timeout=200)
    assert p.returncode == code and "Traceback" not in p.stderr, p.stderr
    return p


def read(p, path):
    """What stands in the last line, and in the file, the same."""
    found = json.loads(path.read_text())
    assert json.loads(p.stdout.splitlines()[-1]) == found
    return found, {r["run"]: r for r in found["runs"]}


def test_bench(tmp_path):
    """Positions are those of the closed form; the arithmetic's gain is checked by hand for one layer more than none."""
    p = bench("--preset", "tiny", "--prompt-len", 8, "--gen-length", 16, "--block-length", 16, "--repeats", 1, "--batch", 2, "--check", "--json", tmp_path / "o.json")
    found, rows = read(p, tmp_path / "o.json")
    assert list(rows) == ["none", "none, half the steps", "decode 4", "decode 8", "decode never", "greedy 2", "greedy 4", "greedy 8"]
    for name, r in rows.items():
        cache, refresh = name.split()[0].strip(","), {"4": 4, "8": 8, "2": 2}.get(name.split()[-1])
        steps = 8 if "half" in name else 16
        assert r["positions"] == cache_cost(8, 16, steps, 16, cache, refresh or 16) and r["seconds"] > 0 and 0 < r["outside"] < 1 and r["forwards"] == steps
        assert r["alone"] > 0 and r["floor"] > 0 and r["peak"] > 0 and r["check"] > 0 and 0.5 < r["within"] < 2
    assert rows["none"]["predicted"] == rows["none"]["gain"] == 1 and 1 < rows["greedy 8"]["predicted"] < rows["none"]["positions"] / rows["greedy 8"]["positions"] + 0.5
    assert found["bandwidth"] > 0 and found["matmul_peak"] > 0 and "whole runs" in p.stdout and "seconds by sampling (16 steps of each kind) over those of whole runs" in p.stdout


class Slow(torch.nn.Module):
    """Takes, by its clock, as long as its arithmetic says."""
    def __init__(self, model, clock):
        super().__init__()
        self.model, self.config, self.wte, self.clock, self.ran = model, model.config, model.wte, clock, 0

    def forward(self, tokens, pos, cache, rows, pad):
        self.clock[0] += 1 + bench_py.work(self.config, *tokens.shape, rows.shape[1], cache.T if cache else tokens.shape[1]) / 1e4
        self.ran += 1
        return self.model(tokens, pos, cache, rows, pad)


@pytest.mark.parametrize("cache", ["none", "decode", "greedy"])
@pytest.mark.parametrize("block_length", [8, 24])
def test_sampled_runs_add_up(monkeypatch, cache, block_length):
    """On a clock that only the model moves: fewer forwards run, but the sums are those of the whole run."""
    clock = [0.0]
    monkeypatch.setattr(bench_py.time, "perf_counter", lambda: clock[0])
    model = Slow(random_model(dtype=torch.float32), clock)
    setting, how = bench_py.Bench(model, 2, 12, 24, block_length=block_length), dict(cache=cache, refresh=4)
    whole, figures = setting.run(how, replay=True)
    assert model.ran == 2 * 24 and whole.calls == setting.run(how, set())[0].calls and model.ran == 2 * 24  # nothing runs to know the steps
    assert figures["seconds"] == pytest.approx(24 + sum(w for _, w in whole.calls) / 1e4) and figures["alone"] == pytest.approx(figures["seconds"]) == pytest.approx(figures["inside"])
    steps = bench_py.spread(whole.calls, 3)
    sampled, few = setting.run(how, steps)
    assert len(steps) == (3 if cache == "none" else 6) and model.ran == 2 * 24 + len(steps) and set(sampled.kept) == steps and sampled.calls == whole.calls
    assert few["positions"] == figures["positions"] == cache_cost(12, 24, 24, block_length, cache, 4) and few["forwards"] == figures["forwards"] == 24
    assert few["seconds"] == pytest.approx(figures["seconds"], rel=0.02)
    assert setting.run(how, check=steps)[1]["within"] == pytest.approx(few["seconds"] / figures["seconds"])


@pytest.mark.slow
def test_bench_of_growth(tmp_path):
    p = bench("--preset", "tiny", "--scale", 48, 32, "--repeats", 1, "--sample", 2, "--json", tmp_path / "o.json")
    found, rows = read(p, tmp_path / "o.json")
    assert list(rows) == list(found["exponents"]) == ["none", "decode 8", "greedy 8", "greedy never"] and found["sampled"] == 2 and "2 steps of each kind" in p.stdout
    for r in found["runs"]:
        T, (cache, refresh) = r["total_length"], (r["run"].split() + ["1"])[:2]
        assert T in (32, 48) and r["seconds"] > 0 and r["gain"] > 0 and r["positions"] == cache_cost(T // 4, T * 3 // 4, cache=cache, refresh=T if refresh == "never" else int(refresh))
    assert found["exponents"]["none"]["positions"] == pytest.approx(2) and found["exponents"]["greedy never"]["positions"] < 1.2


@pytest.mark.slow
def test_bench_of_a_cell_of_the_grid(tmp_path):
    p = bench("--grid", "--preset", "tiny", "--batch", 1, "--prompt-len", 4, "--gen-length", 12, "--repeats", 1, "--json", tmp_path / "o.json")
    found, rows = read(p, tmp_path / "o.json")
    assert list(rows) == ["none", "decode 2", "decode 8", "greedy 2", "greedy 8"]
    gains = [r["gain"] for name, r in rows.items() if name != "none"]
    assert f"{sum(g < 0.97 for g in gains)} of 4 below 0.97; the smallest {min(gains):.3f}" in p.stdout and p.stdout.count("x: tiny, batch 1, prompt 4, generated 12") == max(1, sum(g < 0.97 for g in gains))


@pytest.mark.slow
def test_bench_of_training(tmp_path):
    p = bench("--train", "--batch", 2, "--prompt-len", 8, "--gen-length", 8, "--repeats", 1, "--json", tmp_path / "o.json")
    found, rows = read(p, tmp_path / "o.json")
    assert list(rows) == ["causal GPT", "diffusion", "diffusion, padded"]
    for r in rows.values():
        assert r["tokens_per_s"] == pytest.approx(32 / r["seconds"]) and r["over_causal"] == pytest.approx(rows["causal GPT"]["seconds"] / r["seconds"]) and 0 < r["of_peak"] < 1


def test_the_rival_is_causal():
    gpt = bench_py.GPT(bench_py.PRESETS["tiny"], 8)
    tokens = torch.arange(9)[None].repeat(2, 1)
    tokens[1, 5:] += 9
    with torch.no_grad():
        x = gpt.wte(tokens[:, :-1])
        for block in gpt.blocks:
            x = block(x, gpt.cos, gpt.sin)
    assert torch.equal(x[0, :5], x[1, :5]) and not torch.allclose(x[0, 5:], x[1, 5:])


def test_the_arithmetic():
    """Multiplications of a forward, against those that torch counts in the matrix products and the attention."""
    sys.path.insert(0, str(ROOT))
    from torch.utils.flop_counter import FlopCounterMode

    from scripts.bench import work
    model = random_model(dtype=torch.float32, n_kv_head=2, n_layer=3)
    with FlopCounterMode(display=False) as counter:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(torch.ones(2, 10, dtype=torch.int64), rows=torch.arange(4).expand(2, 4))
    assert counter.get_total_flops() == 2 * work(model.config, 2, 10, 4, 10)


@pytest.mark.parametrize("flags, words", [(["--batch", 0], "--batch"), (["--gen-length", 5000], "4096 positions"), (["--steps", 7, "--block-length", 128], "multiple"), (["--preset", "x"], "preset"),
                                          (["--ckpt", "no.pt"], "no.pt"), (["--device", "cuda"], "CUDA"),
                                          (["--sample", 1], "--sample"), (["--scale", 64], "two lengths"), (["--scale", 64, 5000], "4096"), (["--scale", "--steps", 8], "--steps"),
                                          (["--train", "--ckpt", "no.pt"], "--ckpt"), (["--train", "--preset", "llada-8b"], "llada-8b"), (["--json", "no/such/o.json"], "no/such"), (["--grid", "--train"], "not allowed")])
def test_bench_s_user_errors(flags, words):
    if flags[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError) as e:
        bench_py.main([*map(str, flags)])
    assert words in str(e.value) and "\n" not in str(e.value)
