"""Traces of the authors' dKV-Cache code for LLaDA, to be matched token for token and position for position.

python -m pytest tests/test_golden.py

golden.npz was cut by scripts/cut_golden.py; the weights are random, so a wrong K/V somewhere shows in the tokens."""
import json
import pathlib

import numpy as np
import pytest
import torch

from dkv_min import cache_cost, generate
from model import DiffusionLM, gather_rows, load
from scripts.convert import convert, read_config, their_names

DATA = dict(np.load(pathlib.Path(__file__).parent / "golden.npz"))
DOC = json.loads(DATA["cases"].tobytes())


@pytest.fixture(scope="module", params=["float32", "float64", "converted"])
def llada(request, tmp_path_factory):
    """The authors' weights under our names; "converted": by way of scripts/convert.py's files, if its packages are there."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "config.json").write_bytes(DATA["config"].tobytes())
    weights = {k[7:]: torch.from_numpy(v) for k, v in DATA.items() if k.startswith("weight.")}
    if request.param == "converted":
        pytest.importorskip("safetensors.torch", reason="the way through files needs safetensors").save_file(weights, folder / "model.safetensors")
        convert(str(folder), folder / "out.pt")
        return load(folder / "out.pt")[0]
    config, notes = read_config(folder / "config.json")
    assert notes == []
    names = their_names(config)
    model = DiffusionLM(config)
    model.load_state_dict({names[k]: w for k, w in weights.items()})
    return model.to(getattr(torch, request.param)).eval().requires_grad_(False)


@pytest.mark.parametrize("case", DOC["forwards"], ids=lambda c: c["logits"])
def test_plain_forward(llada, case):
    difference = (llada(torch.tensor(case["input_ids"])) - torch.from_numpy(DATA["logits." + case["logits"]])).abs().max().item()
    assert difference < 1e-3, f"largest difference {difference}"


def settings(case):
    a, blocks = case["args"], case["order"]
    how = dict(cache=case["algorithm"].replace("baseline", "none"), steps=a["steps"], gen_length=a["gen_length"], block_length=a["block_length"],
               refresh=a.get("cache_reloading_step"), window=a.get("window_size", 4))
    order = blocks and [sum((block[row] for block in blocks), []) for row in range(len(case["prompt"]))]
    return how, order


@pytest.mark.parametrize("case", DOC["cases"], ids=lambda c: c["name"])
def test_every_step(llada, case):
    how, order = settings(case)
    T = len(case["prompt"][0]) + how["gen_length"]
    x = torch.tensor([p + [llada.config.mask_id] * how["gen_length"] for p in case["prompt"]])
    expected = iter(case["steps"])

    def on_step(step, tokens, run, decoded):
        s = next(expected)
        for row, transfers in enumerate(s["transfers"]):
            for position, token in transfers:
                x[row, position] = token
            assert decoded[row].nonzero().flatten().tolist() == [position for position, _ in transfers], f"revealed in step {step}"
            assert run[row].nonzero().flatten().tolist() == (s["fed"][row] if s["fed"] else list(range(T))), f"run in step {step}"
        assert torch.equal(tokens, x), f"tokens after step {step}"

    result = generate(llada, case["prompt"], order=order, cfg_scale=case["args"]["cfg_scale"], on_step=on_step, **how)
    assert next(expected, None) is None and result.forwards == len(case["steps"])
    assert result.tokens == case["final"]
    assert result.positions_run == [cache_cost(T - how["gen_length"], **how)] * len(x)


@pytest.mark.parametrize("case", [c for c in DOC["cases"] if c["step_logits_keys"]], ids=lambda c: c["name"])
def test_logits_of_cached_steps(llada, case):
    """All positions that a step runs, not just those that can be revealed."""
    how, order = settings(case)
    cfg, steps = case["args"]["cfg_scale"], []

    class Spy:
        config, wte = llada.config, llada.wte

        def __call__(self, tokens, pos, cache, rows, pad):
            logits = llada(tokens, pos, cache, None, pad)
            steps.append((pos, logits))
            return gather_rows(logits, rows)

    generate(Spy(), case["prompt"], order=order, cfg_scale=cfg, **how)
    for step, key in case["step_logits_keys"].items():
        pos, logits = steps[int(step)]
        if pos is not None:
            logits = gather_rows(logits, pos.argsort(1))
        if cfg:
            logits, free = logits.chunk(2)
            logits = free + (cfg + 1) * (logits - free)
        difference = (logits - torch.from_numpy(DATA["logits." + key])).abs().max().item()
        assert difference < 1e-3, f"step {step}: largest difference {difference}"
