"""scripts/figures.py: what it measures, against other ways to the same numbers; drawing."""
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, random_model
from test_scripts import refused, run, toy

from dkv_min import generate
from model import load
from sample import main as sample
from scripts import figures
from support.cli import load_guider
from support.evaluate import encode

def numbers_in(folder):
    return json.loads((folder / "figures.json").read_text())

def test_the_marks_are_those_of_watch():
    model, tokenizer = load(ROOT / "checkpoints" / "tiny.pt", dtype=torch.float32)
    question, answer = model.extra["problems"][0]
    P, runs = figures.measure_watch(
        model, tokenizer, encode([question], tokenizer, model.extra),
        load_guider("guider", tokenizer, "cpu", "auto")).values()
    for found, name in zip(runs, ("none", "decode", "local", "dual",
                           "guided --guider guider"), strict=True):
        printed = run(sample, "--watch", "--cache", *name.split()).split("\nstep ")[1:]
        maps = [line.split("from cache  ")[1].split("  ")[0] for line in printed]
        assert [row[:P] + "|" + row[P:] for row in found["rows"]] == maps
        assert found["run"] == sum(mark in "*#o" for row in found["rows"] for mark in row)
        assert "".join(found["texts"]).strip("~") == f"{question}\n{answer}"
    assert [len(found["rows"]) for found in runs] == [64, 64, 64, 64, 3]

def test_settling_by_hooks_on_the_projections(tmp_path):
    model, (ids, *_) = toy(tmp_path / "a.pt", n_layer=2)
    values, offsets, counts = figures.settling(model, ids)
    tokens, _, decoded, *_ = figures.trace(model, ids, cache="none")
    final = generate(model, [ids], **figures.settings(model, dict(cache="none"))).tokens[0]
    assert (tokens[0] == 257).nonzero().flatten().tolist() == [*range(len(ids), len(final))]
    assert (tokens[-1].where(~decoded[-1], torch.tensor(final))).tolist() == final
    for i, block in enumerate(model.blocks):
        for kind, name in enumerate("kv"):
            seen = []
            with getattr(block.attn, name).register_forward_hook(lambda m, a, y: seen.append(y[0])):
                for x in tokens:
                    model(x[None])
            seen = torch.stack(seen)                                       # (steps, T, width)
            expected = F.cosine_similarity(seen[1:], seen[:-1], dim=-1)
            assert (values[kind, i] - expected).abs().max() < 1e-5, f"layer {i}, {name}"
    for step, new in enumerate(decoded):
        after = range(1 - step, len(decoded) - step)
        assert offsets[:, new.nonzero().item()].tolist() == [*after]
    end = final.index(256) if 256 in final else len(final)
    assert counts.tolist() == [len(ids) <= c <= end for c in range(len(final))]

def test_one_layer_changes_once_and_its_cache_never_ages(tmp_path):
    """K and V depend on id and position alone: with the delay cached ones equal fresh ones."""
    found = figures.measure_settle(*toy(tmp_path / "a.pt", n_layer=1))
    exactly_one = pytest.approx(1, abs=1e-4)
    for kind in range(2):
        for offset, mean in zip(found["similar"]["x"], found["similar"]["mean"][kind][0]):
            assert mean is None or (mean < 0.9 if offset == 1 else mean == exactly_one), offset
        kept, lost = ([mean for mean in found[name]["mean"][kind][0] if mean is not None]
                      for name in ("delay", "no delay"))
        assert min(len(kept), len(lost)) >= 6
        assert min(kept) == exactly_one and max(lost) < 0.9
    assert found["similar"]["count"][figures.BEFORE] > found["similar"]["count"][0] > 0
    first, second = figures.measure_settle(*toy(tmp_path / "b.pt", n_layer=2))["delay"]["mean"][1]
    assert first[1] == exactly_one and second[1] < 0.9999  # the second layer's age

def test_measuring(tmp_path, monkeypatch):
    toy(tmp_path / "a.pt")
    small = random_model(1, torch.float32, vocab_size=260, n_vocab=258, causal=True, shift=True)
    monkeypatch.setattr(figures, "load_guider", lambda name, *_: dict(small=small)[name])
    ask = ("--ckpt", tmp_path / "a.pt", "--dir", tmp_path, "--n", 2, "--measure")
    run(figures.main, *ask, "settle")
    before = numbers_in(tmp_path)
    assert "watch, settle" in run(figures.main, *ask, "--guider", "small")
    watch = numbers_in(tmp_path)["watch"]
    assert numbers_in(tmp_path) == before | {"watch": watch} and "guid" in watch["runs"][4]["also"]

def test_drawing(tmp_path, monkeypatch):
    """The numbers of the READMEs' pictures, with the first five steps of the moving one."""
    plt = pytest.importorskip("matplotlib.pyplot", reason="no matplotlib: requirements-figures.txt")
    from PIL import Image
    figs, close, numbers = [], plt.close, numbers_in(ROOT / "assets")
    monkeypatch.setattr(plt, "close", figs.append)
    for part in numbers["watch"]["runs"]:
        part["rows"] = part["rows"][:5]
    figures.write_numbers(tmp_path / "figures.json", numbers)
    length = figures.read_numbers(ROOT / "assets" / "length.json")
    figures.write_numbers(tmp_path / "length.json", length)
    shares = dict(none=100, autoregressive=None, freecache=20, dual=98, guided=99, local=98)
    runs = [{"rule": "a rule", "cache": name, "tokens/s": speed} | ({"exact": [y]} if y else {})
            for speed, (name, y) in enumerate(shares.items(), 1)]
    figures.write_numbers(tmp_path / "league.json", dict(conditions={}, runs=runs))
    paths = [tmp_path / name for name in figures.PICTURES]
    assert run(figures.main, "--dir", tmp_path).split() == [*map(str, paths)]
    for fig, path in zip(figs, paths):
        assert path.stat().st_size < 200_000 and Image.open(path).width == 1350
        for ax in fig.axes:
            assert not ax.axison or ax.get_xlabel() or ax.get_shared_x_axes().get_siblings(ax)[1:]
        close(fig)
    (maps, _, lengths, pareto), marks = figs, [*figures.COLOURS]
    for ax, part in zip(maps.axes, numbers["watch"]["runs"]):
        assert part["rows"] == ["".join(marks[i] for i in row) for row in ax.images[0].get_array()]
    for line in lengths.axes[0].lines:
        rows = [row for row in length["runs"] if row["run"] == line.get_label()]
        assert rows and [*line.get_ydata()] == [row["gain"] for row in rows]
    lines = [(line.get_label(), line.get_mfc(), line.get_xydata().tolist())
             for line in pareto.axes[0].lines]
    assert lines[-1] == ("frontier", figures.BLACK, [[6, 98], [5, 99], [1, 100]])
    assert [at for _, face, at in lines if face == "white" and at] == [[[3, 20]]]
    assert [[2, 0], [2, 1]] in [at for *_, at in lines]  # the line to cross
    ours = ROOT / "assets" / "watch.gif"
    with Image.open(tmp_path / "watch.gif") as moving, Image.open(ours) as bundled:
        assert moving.n_frames == 6 and moving.info["loop"] == 0 and bundled.n_frames == 65
    assert ours.stat().st_size < 1_000_000
    (tmp_path / "league.json").unlink()
    assert "needs accuracy.py --json league.json" in run(figures.main, "--dir", tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(figures.main, ["--dir", tmp_path], "requirements-figures.txt")

@pytest.mark.parametrize("content", ["not json", "[1, 2]", "{}"])
def test_a_file_that_is_not_ours(tmp_path, content):
    (tmp_path / "figures.json").write_text(content)
    refused(figures.main, ["--dir", tmp_path], "figures.json")
    assert (tmp_path / "figures.json").read_text() == content
