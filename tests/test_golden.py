"""Traces of published code for LLaDA, matched token by token and position by position."""
import json
import pathlib

import numpy as np
import pytest
import torch

from caches import COSTS
from dkv_min import cache_cost, generate
from model import DiffusionLM, load
from scripts.convert import convert, read_config, their_names

DATA = dict(np.load(pathlib.Path(__file__).parent / "golden.npz"))
DOC = json.loads(DATA["cases"].tobytes())
CASES = {case["name"]: case for case in DOC["cases"]}

def golden_model(folder, kind):
    """The authors' weights under our names; "converted": by way of files and scripts/convert.py."""
    (folder / "config.json").write_bytes(DATA["config"].tobytes())
    weights = {k[7:]: torch.from_numpy(v) for k, v in DATA.items() if k.startswith("weight.")}
    if kind == "converted":
        files = pytest.importorskip("safetensors.torch", reason="converting needs safetensors")
        files.save_file(weights, folder / "model.safetensors")
        convert(str(folder), folder / "out.pt")
        return load(folder / "out.pt")[0]
    config, notes = read_config(folder / "config.json")
    assert notes == []
    model, names = DiffusionLM(config), their_names(config)
    model.load_state_dict({names[k]: w for k, w in weights.items()})
    return model.to(getattr(torch, kind)).eval().requires_grad_(False)

@pytest.fixture(scope="module", params=["float32", "float64", "converted"])
def llada(request, tmp_path_factory):
    return golden_model(tmp_path_factory.mktemp("golden"), request.param)

def spied(llada, note):
    """The model. note gets the arguments of every call."""
    def spy(*args):
        note(*args)
        return llada(*args)
    spy.config, spy.wte = llada.config, llada.wte
    return spy

@pytest.mark.parametrize("name", CASES)
def test_every_step(llada, name):
    """Tokens, and the positions that are run, attended and revealed."""
    case, how, hidden = CASES[name], CASES[name]["how"], []
    P, G = len(case["prompt"][0]), how["gen_length"]
    x = torch.tensor([p + [llada.config.mask_id] * G for p in case["prompt"]])
    every, count = list(range(P + G)), [0] * len(x)
    expected = iter(case["steps"])

    def note(tokens, pos, cache, rows, pad, seen):
        hidden.append([] if seen is None else (~seen).nonzero()[:, 1].tolist())

    def on_step(step, tokens, run, revealed):
        s = next(expected)
        assert hidden[step] == sum(s.get("unseen", []), []), f"not attended in step {step}"
        for row, transfers in enumerate(s["transfers"]):
            for position, token in transfers:
                x[row, position] = token
            new = [position for position, _ in transfers]
            assert revealed[row].nonzero().flatten().tolist() == new, f"revealed in step {step}"
            fed = s["fed"][row] if "fed" in s else every
            assert run[row].nonzero().flatten().tolist() == fed, f"run in step {step}"
            count[row] += len(fed)
        assert torch.equal(tokens.cpu(), x), f"tokens after step {step}"
    r = generate(spied(llada, note), case["prompt"], on_step=on_step, order=case["order"], **how)
    assert next(expected, None) is None and r.tokens == case["final"] and r.positions_run == count
    assert r.forwards == len(case["steps"]) and r.steps == [r.forwards] * len(x)
    if how["cache"] in COSTS and "threshold" not in how:
        assert count[0] == cache_cost(P, **{k: v for k, v in how.items() if k != "cfg_scale"})

def check_logits(got, key):
    expected = torch.from_numpy(DATA["logits." + key]).to(got.dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)

@pytest.mark.parametrize("case", DOC["forwards"])
def test_plain_forward(llada, case):
    check_logits(llada(torch.tensor(case["input_ids"])), case["logits"])

@pytest.mark.parametrize("name", [n for n in CASES if CASES[n]["logits"]])
def test_logits_of_cached_steps(llada, name):
    """At all positions that a step runs, not only at those that it can reveal."""
    steps, case = [], CASES[name]

    def note(tokens, pos, cache, rows, pad, seen):
        logits = llada(tokens, pos, cache, None, pad, seen)
        steps.append(logits if pos is None else logits.take_along_dim(pos.argsort(1)[..., None], 1))
    generate(spied(llada, note), case["prompt"], order=case["order"], **case["how"])
    for step, key in case["logits"].items():
        logits = steps[int(step)]
        if scale := case["how"].get("cfg_scale"):
            logits, free = logits.chunk(2)
            logits = free + (scale + 1) * (logits - free)
        check_logits(logits, key)
