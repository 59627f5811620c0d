"""Traces of published code, matched token by token and position by position."""
import copy
import dataclasses
import functools
import json
import pathlib
import tempfile

import numpy as np
import pytest
import torch

from caches import COSTS
from dkv_min import cache_cost, generate
from model import DiffusionLM, load
from scripts.convert import FAMILIES, convert, read_config, their_names

DATA = dict(np.load(pathlib.Path(__file__).parent / "golden.npz"))
DOC = json.loads(DATA["cases"].tobytes())
CASES = {case["name"]: case for case in DOC["cases"]}
KINDS = "float32", "float64", "converted"
EVERY = [(name, kind) for kind in KINDS for name in list(CASES)[::1 if kind == "float32" else 10]]
UNCOUNTED = {"cfg_scale", "remasking", "top_p", "top_k"}  # settings that no count depends on

@functools.cache
def golden_model(name, kind="float32", device="cpu"):
    """The authors' weights under our names; "converted": by way of files and scripts/convert.py."""
    prefix = f"weight.{name}."
    weights = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in DATA.items()
               if k.startswith(prefix)}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "config.json").write_bytes(DATA[f"config.{name}"].tobytes())
        family, config, notes = read_config(folder / "config.json")
        assert notes == []
        if kind == "converted":
            files = pytest.importorskip("safetensors.torch", reason="converting needs safetensors")
            files.save_file(weights, folder / "model.safetensors")
            convert(str(folder), folder / "out.pt")
            return load(folder / "out.pt", device, torch.float32)[0]
    model, names = DiffusionLM(config), their_names(config, FAMILIES[family])
    model.load_state_dict({names[k]: w for k, w in weights.items()}, strict=not config.tied)
    return model.to(device, getattr(torch, kind)).eval().requires_grad_(False)

def causal(model):
    """The same weights as an autoregressive model."""
    model = copy.copy(model)
    model.config = dataclasses.replace(model.config, causal=True)
    return model

@pytest.fixture
def device():
    return "cpu"

def run(case, kind, device, note, **more):
    """generate's answer to a case. note gets the model, and the arguments of every call."""
    model, how = golden_model(case["model"], kind, device), dict(case["how"])
    if case["guider"]:
        how["guider"] = causal(golden_model(case["guider"], kind, device))

    def spy(*args):
        note(model, *args)
        return model(*args)
    spy.config, spy.wte = model.config, model.wte
    return generate(spy, case["prompt"], order=case["order"], **how, **more)

@pytest.mark.parametrize("name, kind", EVERY)
def test_every_step(device, name, kind):
    """Tokens, and the positions that are run, attended and revealed."""
    case, how, hidden = CASES[name], CASES[name]["how"], []
    mask, G = golden_model(case["model"], kind, device).config.mask_id, how["gen_length"]
    x, prompts = [p + [mask] * G for p in case["prompt"]], case["prompt"]
    count, expected = [0] * len(x), iter(case["steps"])

    def note(model, tokens, pos, cache, rows, pad, seen):
        hidden.append([] if seen is None else (~seen).nonzero()[:, 1].tolist())

    def on_step(step, tokens, run, revealed):
        s = next(expected)
        assert hidden[step] == sum(s.get("unseen", []), []), f"not attended in step {step}"
        for row, transfers in enumerate(s["transfers"]):
            for position, token in transfers + s.get("filled", [[]])[0]:
                x[row][position] = token
            new = [position for position, _ in transfers]
            assert revealed[row].nonzero().flatten().tolist() == new, f"revealed in step {step}"
            fed = s["fed"][row] if "fed" in s else list(range(len(x[row])))
            assert run[row].nonzero().flatten().tolist() == fed, f"run in step {step}"
            assert tokens[row, :len(x[row])].tolist() == x[row], f"tokens after step {step}"
            count[row] += len(fed)
    r = run(case, kind, device, note, on_step=on_step)
    assert next(expected, None) is None and r.tokens == case["final"] and r.positions_run == count
    assert r.forwards == len(case["steps"]) and r.steps == [r.forwards] * len(x)
    if how["cache"] in COSTS and "threshold" not in how:
        counted = {k: v for k, v in how.items() if k not in UNCOUNTED}
        shift = case["model"] != "llada"
        assert count == [cache_cost(len(p), shift=shift, **counted) for p in prompts]

def check_logits(got, key):
    expected = torch.from_numpy(DATA["logits." + key]).to(got.dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", DOC["forwards"], ids=lambda case: case["logits"])
def test_plain_forward(kind, case):
    model, x, pad = golden_model(case["model"], kind), torch.tensor(case["input_ids"]), None
    model = causal(model) if case["causal"] else model
    real = torch.ones(*x.shape, 1)
    if case["pad"]:
        pad = torch.tensor(case["pad"])
        real = (torch.arange(x.shape[1]) >= pad[:, None])[..., None]
    check_logits(model(x, pad=pad) * real, case["logits"])

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [n for n in CASES if CASES[n]["logits"]])
def test_logits_of_cached_steps(name, kind):
    """At all positions that a step runs, not only at those that it can reveal."""
    steps, case = [], CASES[name]

    def note(model, tokens, pos, cache, rows, pad, seen):
        logits = model(tokens, pos, cache, None, pad, seen)
        steps.append(logits if pos is None else logits.take_along_dim(pos.argsort(1)[..., None], 1))
    run(case, kind, "cpu", note)
    for step, key in case["logits"].items():
        logits = steps[int(step)]
        if scale := case["how"].get("cfg_scale"):
            logits, free = logits.chunk(2)
            logits = free + (scale + 1) * (logits - free)
        check_logits(logits, key)
