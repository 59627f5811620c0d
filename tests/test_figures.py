"""scripts/figures.py: what it measures, against other ways to the same numbers; drawing."""
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_scripts import refused, run, toy

from dkv_min import generate
from model import load
from sample import main as sample
from scripts import figures
from support.evaluate import encode

def numbers_in(folder):
    return json.loads((folder / "figures.json").read_text())

def test_the_marks_are_those_of_watch():
    model, tokenizer = load(ROOT / "checkpoints" / "tiny.pt", dtype=torch.float32)
    question, answer = model.extra["problems"][0]
    part = figures.measure_watch(model, tokenizer, encode([question], tokenizer, model.extra))
    P = part["prompt_len"]
    for found, flags in zip(part["runs"], (["none"], ["decode"], ["greedy", "--refresh", "8"])):
        maps = [line.split("from cache  ")[1].split("  ")[0] for line in
                run(sample, "--watch", "--cache", *flags).splitlines() if line.startswith("step")]
        assert [row[:P] + "|" + row[P:] for row in found["rows"]] == maps
        assert found["run"] == sum(mark in "*#o" for row in found["rows"] for mark in row)
        assert "".join(found["texts"]).strip("~") == f"{question}\n{answer}"
    none, decode, greedy = ("".join(found["rows"]) for found in part["runs"])
    assert "_" in greedy and "." in decode and not {"_"} & {*decode, *none} and "." not in none

def test_settling_by_hooks_on_the_projections(tmp_path):
    model, (ids, *_) = toy(tmp_path / "a.pt", n_layer=2)
    values, offsets, counts = figures.settling(model, ids)
    tokens, _, decoded, *_ = figures.trace(model, ids, cache="none")
    final = generate(model, [ids], **figures.settings(model, {})).tokens[0]
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
    """Of "length" bench.py itself, on a model that takes no time."""
    toy(tmp_path / "a.pt")
    ask = ("--ckpt", tmp_path / "a.pt", "--dir", tmp_path, "--n", 2, "--measure")
    monkeypatch.setitem(figures.bench.PRESETS, "42m", figures.bench.PRESETS["tiny"])
    monkeypatch.setattr(figures.bench, "LENGTHS", [16, 32])
    run(figures.main, *ask, "watch")
    before = numbers_in(tmp_path)
    assert "watch, length" in run(figures.main, *ask, "length")
    after = numbers_in(tmp_path)
    assert after == before | {"length": after["length"]}
    length = after["length"]["runs"]
    assert all(row["gain"] > 0 and row["seconds"] > 0 for row in length)
    named = {(row["run"], row["total_length"]) for row in length if row["predicted"] >= 1}
    assert named == {(name, n) for n in (16, 32)
                     for name in ("none", "decode 8", "greedy 8", "dual", "local")}

def test_drawing(tmp_path, monkeypatch):
    """The numbers of the READMEs' pictures, with the first three steps of the moving one."""
    plt = pytest.importorskip("matplotlib.pyplot", reason="no matplotlib: requirements-figures.txt")
    from PIL import Image
    figs, close, numbers = [], plt.close, numbers_in(ROOT / "assets")
    monkeypatch.setattr(plt, "close", figs.append)
    for part in numbers["watch"]["runs"]:
        part["rows"] = part["rows"][:3]
    names = ["AR, same size", "AR, the guider", "none, threshold 0.99", "guided, window 8", "self"]
    numbers["rivals"] = dict(conditions={}, runs=[
        dict(batch=B, run=name, tokens_per_s=B + i, exact=i and 1 / i)
        for B in (1, 4) for i, name in enumerate(names)])
    figures.write_numbers(tmp_path / "figures.json", numbers)
    paths = [tmp_path / name for name in figures.PICTURES]
    assert run(figures.main, "--dir", tmp_path).split() == [*map(str, paths)]
    for fig, path in zip(figs, paths):
        assert path.stat().st_size < 200_000 and Image.open(path).width == 1350
        for ax in fig.axes:
            assert ax.get_xlabel() or ax.get_shared_x_axes().get_siblings(ax)[1:]
        close(fig)
    (steps, _, length, rivals), watch = figs, numbers["watch"]
    for ax in rivals.axes:
        assert [line.get_label().split(":")[0] for line in ax.lines] == names
    drawn, marks = steps.axes[0].images[0].get_array().tolist(), [*figures.COLOURS]
    assert ["".join(marks[i] for i in row) for row in drawn] == watch["runs"][1]["rows"]
    y = next(line.get_ydata() for line in length.axes[0].lines
             if line.get_label() == "greedy never")
    assert list(y) == [r["gain"] for r in numbers["length"]["runs"] if r["run"] == "greedy never"]
    ours = ROOT / "assets" / "watch.gif"
    with Image.open(tmp_path / "watch.gif") as moving, Image.open(ours) as bundled:
        assert moving.n_frames == 3 and moving.info["loop"] == 0 and bundled.n_frames == 64
    assert ours.stat().st_size < 1_000_000
    del numbers["length"]
    figures.write_numbers(tmp_path / "figures.json", numbers)
    assert "needs --measure length" in run(figures.main, "--dir", tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(figures.main, ["--dir", tmp_path], "requirements-figures.txt")

@pytest.mark.parametrize("content", ["not json", "[1, 2]", "{}"])
def test_a_file_that_is_not_ours(tmp_path, content):
    (tmp_path / "figures.json").write_text(content)
    refused(figures.main, ["--dir", tmp_path], "figures.json")
    assert (tmp_path / "figures.json").read_text() == content
