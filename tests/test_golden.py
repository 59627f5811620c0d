"""Traces of the authors' code for LLaDA, matched token by token and position by position."""
import json
import pathlib

import numpy as np
import pytest
import torch

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

def settings(case):
    """generate's: those that its cost depends on, and all."""
    a, cache = case["args"], case["algorithm"].replace("baseline", "none")
    how = dict(cache=cache, **{k: a[k] for k in ("steps", "gen_length", "block_length")})
    how |= {} if cache == "none" else dict(refresh=a["cache_reloading_step"])
    how |= dict(window=a["window_size"]) if cache == "greedy" else {}
    order = case["order"] and [sum(blocks, []) for blocks in zip(*case["order"])]
    return how, dict(how, order=order, cfg_scale=a["cfg_scale"])

@pytest.mark.parametrize("name", CASES)
def test_every_step(llada, name):
    """Tokens, positions run and positions revealed."""
    case = CASES[name]
    (how, everything), G = settings(case), case["args"]["gen_length"]
    x = torch.tensor([p + [llada.config.mask_id] * G for p in case["prompt"]])
    expected, T = iter(case["steps"]), x.shape[1]

    def on_step(step, tokens, run, revealed):
        s = next(expected)
        for row, transfers in enumerate(s["transfers"]):
            for position, token in transfers:
                x[row, position] = token
            new = [position for position, _ in transfers]
            assert revealed[row].nonzero().flatten().tolist() == new, f"revealed in step {step}"
            fed = s["fed"][row] if s["fed"] else list(range(T))
            assert run[row].nonzero().flatten().tolist() == fed, f"run in step {step}"
        assert torch.equal(tokens.cpu(), x), f"tokens after step {step}"
    result = generate(llada, case["prompt"], on_step=on_step, **everything)
    assert next(expected, None) is None and result.forwards == len(case["steps"])
    assert result.tokens == case["final"]
    assert result.positions_run == [cache_cost(T - G, **how)] * len(x)

def check_logits(got, key):
    expected = torch.from_numpy(DATA["logits." + key]).to(got.dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)

@pytest.mark.parametrize("case", DOC["forwards"])
def test_plain_forward(llada, case):
    check_logits(llada(torch.tensor(case["input_ids"])), case["logits"])

@pytest.mark.parametrize("name", [n for n in CASES if CASES[n]["step_logits_keys"]])
def test_logits_of_cached_steps(llada, name):
    """At all positions that a step runs, not only at those that it can reveal."""
    steps, case = [], CASES[name]

    def spy(tokens, pos=None, cache=None, rows=None, pad=None):
        logits = llada(tokens, pos, cache, None, pad)
        steps.append(logits if pos is None else logits.take_along_dim(pos.argsort(1)[..., None], 1))
        return logits if rows is None else logits.take_along_dim(rows[..., None], 1)
    spy.config, spy.wte = llada.config, llada.wte
    generate(spy, case["prompt"], **settings(case)[1])
    for step, key in case["step_logits_keys"].items():
        logits = steps[int(step)]
        if scale := case["args"]["cfg_scale"]:
            logits, free = logits.chunk(2)
            logits = free + (scale + 1) * (logits - free)
        check_logits(logits, key)
