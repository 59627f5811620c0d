"""scripts/figures.py: what it measures, against other ways to the same numbers; going on; drawing, where matplotlib is.

python -m pytest tests/test_figures.py"""
import contextlib
import importlib.util
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, random_model

import scripts.figures as figures
from dkv_min import cache_cost, generate
from model import load, save
from sample import main as sample
from train_tiny import build_tokenizer

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def toy(path, n_layer=2, G=16):
    """Random weights, a tokenizer of bytes, three problems, of which the model answers the second as it says there."""
    model, tokenizer = random_model(dtype=torch.float32, n_layer=n_layer, vocab_size=260, n_vocab=258, mask_id=257, eos_id=256, eot_id=None), build_tokenizer("some text ", 258)
    text = tokenizer.decode(generate(model, [tokenizer.encode("and now\n")], gen_length=G, block_length=G // 2).tokens[0][-G:]).strip()
    model.extra = dict(problems=[("how many", "none"), ("and now", text), ("who", "nobody")], gen_length=G, block_length=G // 2, template="{}\n", known_order="left_to_right")
    save(path, model, tokenizer)
    return model, [tokenizer.encode(q + "\n") for q, _ in model.extra["problems"]]


def run(*flags):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert figures.main([*map(str, flags)]) == 0
    return out.getvalue()


def test_the_map_is_that_of_watch():
    model, tokenizer = load(ROOT / "checkpoints" / "tiny.pt", dtype=torch.float32)
    found = figures.measure_map(model, [tokenizer.encode(model.extra["template"].replace("{}", model.extra["problems"][0][0]))])
    for cache, how in zip(("decode", "greedy"), found["runs"]):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            sample(["--watch", "--cache", cache, "--refresh", "8"])
        maps = [line.split("  from cache ")[-1].split("from cache  ")[1].split("  ")[0] for line in out.getvalue().splitlines() if line.startswith("step")]
        assert [row[:found["prompt_len"]] + "|" + row[found["prompt_len"]:] for row in how["rows"]] == maps
        assert how["run"] == sum(mark in "*#o" for row in how["rows"] for mark in row)
    assert "_" in "".join(found["runs"][1]["rows"]) and "_" not in "".join(found["runs"][0]["rows"])


def test_settling_by_hooks_on_the_projections(tmp_path):
    """Keys before the rotation, which changes no cosine within a position, caught in the layers themselves."""
    model, (ids, *_) = toy(tmp_path / "a.pt")
    values, offsets, counts = figures.settling(model, ids)
    caught, tokens = {}, []
    generate(model, [ids], on_step=lambda i, x, run, decoded: tokens.append((x[0], decoded[0])), **figures.settings(model, cache="none"))
    for i, block in enumerate(model.blocks):
        for kind, name in enumerate("kv"):
            getattr(block.attn, name).register_forward_hook(lambda m, a, out, key=(kind, i): caught.setdefault(key, []).append(out[0]))
    for x in [figures.start(model, ids)[0], *(x for x, _ in tokens[:-1])]:
        model(x[None])
    assert len(caught) == 4 and all(len(seen) == len(tokens) for seen in caught.values())
    for (kind, layer), seen in caught.items():
        for s in range(1, len(seen)):
            expected = F.cosine_similarity(seen[s], seen[s - 1], dim=-1)
            assert (values[kind, layer, s - 1] - expected).abs().max() < 1e-5, f"layer {layer}, step {s}"
    for step, (_, decoded) in enumerate(tokens):
        column = decoded.nonzero().item()
        assert offsets[:, column].tolist() == [s - step for s in range(1, len(tokens))]
    end = (tokens[-1][0] == 256).nonzero().flatten().tolist() or [len(tokens[-1][0])]
    assert counts.nonzero().flatten().tolist() == [c for c in range(len(ids), len(counts)) if c <= end[0]]


def test_one_layer_changes_once_and_its_cache_never_ages(tmp_path):
    """The paper's idea where it is exact: K and V depend on id and position alone, so with the delay a cached one is what a
    fresh one is, and without it a mask's."""
    model, prompts = toy(tmp_path / "a.pt", n_layer=1)
    found = figures.measure_settle(model, prompts)
    for kind in range(2):
        for offset, mean in zip(found["similar"]["x"], found["similar"]["mean"][kind][0]):
            assert mean is None or (mean < 0.9 if offset == 1 else mean == pytest.approx(1, abs=1e-4)), offset
        kept, lost = ([mean for mean in found[name]["mean"][kind][0] if mean is not None] for name in ("delay", "no delay"))
        assert len(kept) >= 6 and min(kept) == pytest.approx(1, abs=1e-4) and len(lost) >= 6 and max(lost) < 0.9
    assert found["similar"]["count"][figures.BEFORE] > found["similar"]["count"][0] > 0
    deeper = figures.measure_settle(*toy(tmp_path / "b.pt", n_layer=2))
    assert deeper["delay"]["mean"][1][0][1] == pytest.approx(1, abs=1e-4) and deeper["delay"]["mean"][1][1][1] < 0.9999  # the second layer's do age


@pytest.mark.slow
def test_measuring_and_going_on(tmp_path, monkeypatch):
    model, prompts = toy(tmp_path / "a.pt")
    ask = ("--ckpt", tmp_path / "a.pt", "--dir", tmp_path, "--n", 2, "--batch-size", 1, "--workers", 1)

    def killed(*args):
        collect(*args)
        raise KeyboardInterrupt

    collect = figures.collect
    monkeypatch.setattr(figures, "collect", killed)
    with pytest.raises(KeyboardInterrupt):
        run("--measure", "map", "speed", "quality", *ask)
    monkeypatch.undo()
    before = json.loads((tmp_path / "figures.json").read_text())
    assert set(before) == {"about", "map", "speed"}
    head, *parts = map(json.loads, (tmp_path / "quality.log").read_text().splitlines())
    assert len(parts) == 2 * len(figures.quality_runs(model))
    assert sorted(part["right"] for part in parts if part["run"] == 0) == [[False], [True]]
    parts[0]["right"] = [not parts[0]["right"][0]]  # what is logged is not answered again
    (tmp_path / "quality.log").write_text("\n".join([*map(json.dumps, [head, *parts[:-3]]), json.dumps(parts[-3])[:30]]))
    assert "map, speed, quality" in run("--measure", "quality", *ask) and not (tmp_path / "quality.log").exists()
    after = json.loads((tmp_path / "figures.json").read_text())
    assert {name: after[name] for name in before} == before

    quality, speed = after["quality"]["rows"], after["speed"]["rows"]
    assert [row["how"] for row in quality] == [row["how"] for row in speed] == figures.quality_runs(model) and all(row["tokens_per_s"] > 0 for row in speed)
    for i, row in enumerate(quality):
        how = row["how"]
        cost = [cache_cost(len(ids), 16, round(16 * how.get("steps", 1)), 8, how["cache"], how.get("refresh"), how.get("window", 4), how.get("delay", True)) for ids in prompts[:2]]
        assert row["positions"] == sum(cost) / 2 and row["fewer"] == pytest.approx(sum(cache_cost(len(ids), 16, block_length=8) for ids in prompts[:2]) / sum(cost), abs=1e-3)
        assert (row["right"], row["n"]) == (sum(sum(part["right"]) for part in parts if part["run"] == i), 2)
    with pytest.raises(ValueError, match="--n 2"):
        run("--measure", "map", *ask, "--n", 1)


@pytest.mark.slow
def test_length(tmp_path, monkeypatch):
    """With bench.py itself, but in this process and on a model that takes no time."""
    import scripts.bench

    def here(command, **how):
        scripts.bench.main([*command[2:], "--preset", "tiny", "--repeats", "1"])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(figures, "subprocess", SimpleNamespace(run=here, DEVNULL=None))
    toy(tmp_path / "a.pt")
    run("--measure", "length", "--lengths", 16, 32, "--ckpt", tmp_path / "a.pt", "--dir", tmp_path)
    found = json.loads((tmp_path / "figures.json").read_text())["length"]
    assert {row["total_length"] for row in found["runs"]} == {16, 32} and set(found["exponents"]) == {row["run"] for row in found["runs"]}
    assert all(row["gain"] > 0 and row["seconds"] > 0 and row["predicted"] >= 1 for row in found["runs"])


def numbers_to_draw():
    """Numbers of every part, made up."""
    model = random_model()
    model.extra = dict(gen_length=16, block_length=8, known_order="left_to_right")
    runs, layers = figures.quality_runs(model), lambda n: [[[0.5 + 0.01 * i for i in range(n)]] * 3] * 2
    lengths = [dict(run=name, total_length=T, seconds=T / gain, predicted=gain + 1, gain=gain) for T in (128, 512) for name, gain in (("none", 1), ("decode 8", 2), ("greedy 8", 5), ("greedy never", T / 20))]
    return dict(about=dict(n=10), map=dict(prompt_len=2, block_length=3, runs=[dict(name=name, rows=["##*oo", "..#*_", "...#*"], run=10, full=15) for name in ("Decode", "Greedy")]),
                settle=dict(prompts=3, similar=dict(x=list(range(-8, 17)), mean=layers(25)), **{name: dict(x=list(range(7)), mean=layers(7)) for name in ("delay", "no delay")}),
                quality=dict(n=10, gen_length=16, rows=[dict(how=how, right=i % 11, n=10, positions=9.0, fewer=1 + i / 9) for i, how in enumerate(runs)]),
                speed=dict(device="cpu", threads=1, dtype="float32", rows=[dict(how=how, tokens_per_s=100 + i) for i, how in enumerate(runs)]),
                length=dict(conditions=dict(model="42m"), runs=lengths, exponents={name: dict(seconds=2.0) for name in ("none", "decode 8", "greedy 8", "greedy never")}))


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="no matplotlib: python -m pip install -r requirements-figures.txt")
def test_drawing(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    from PIL import Image
    drawn, close = [], plt.close
    monkeypatch.setattr(plt, "close", drawn.append)
    numbers = numbers_to_draw()
    figures.write_numbers(tmp_path / "figures.json", numbers)
    assert run("--dir", tmp_path).split() == [str(tmp_path / f"{name}.png") for name in figures.PICTURES]
    for fig, name in zip(drawn, figures.PICTURES):
        path = tmp_path / f"{name}.png"
        assert path.stat().st_size < 200_000 and Image.open(path).width == 1350
        assert all(ax.get_xlabel() or ax.get_shared_x_axes().get_siblings(ax)[1:] for ax in fig.axes)
        close(fig)
    lines = {line.get_label(): line for ax in drawn[3].axes[:1] for line in ax.lines}
    assert list(lines["greedy never, seconds as length$^{2.0}$"].get_ydata()) == [128 / 20, 512 / 20]
    assert drawn[0].axes[0].images[0].get_array().tolist()[1] == [3, 3, 1, 0, 4]  # ..#*_
    points = {tuple(p) for ax in drawn[2].axes[::2] for line in ax.lines if len(line.get_xdata()) > 1 for p in line.get_xydata().round(3).tolist()}
    assert {(round(row["fewer"], 3), 100 * row["right"] / row["n"]) for row in numbers["quality"]["rows"]} <= points  # every run is drawn
    del numbers["speed"], numbers["length"]
    figures.write_numbers(tmp_path / "figures.json", numbers)
    assert "speed is not measured yet" in run("--dir", tmp_path)


def test_without_matplotlib(tmp_path, monkeypatch):
    figures.write_numbers(tmp_path / "figures.json", numbers_to_draw())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="requirements-figures.txt"):
        run("--dir", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures.json"]


@pytest.mark.parametrize("flags, words", [(["--n", 0], "--n"), (["--measure", "moods"], "moods"), (["--measure", "--ckpt", "no.pt"], "no.pt"), (["--dir", "/nowhere"], "--measure"), (["--measure", "map", "--dir", "/nowhere"], "/nowhere"),
                                          (["--what"], "--what"), (["--measure", "--workers", 0], "--workers"), (["--device", "x"], "device")])
def test_user_errors(flags, words):
    with pytest.raises(ValueError) as e:
        figures.main([*map(str, flags)])
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("content", ["not json", "[1, 2]", "{}"])
def test_a_file_that_is_not_ours(tmp_path, content):
    (tmp_path / "figures.json").write_text(content)
    with pytest.raises(ValueError, match="figures.json"):
        run("--dir", tmp_path)
    assert (tmp_path / "figures.json").read_text() == content
