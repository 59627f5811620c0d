"""On a GPU: the authors' traces, the CPU's answers, loops that do not wait. Skipped without."""
import functools

import pytest
import torch
from conftest import random_model
from invariants import scenario
from test_generate import CERTAIN, ORDERS
from test_golden import test_every_step  # noqa: F401  on the device of this file

from caches import CACHES
from dkv_min import find

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

@pytest.fixture
def device():
    return "cuda"

@pytest.mark.parametrize("cache, shift", [
    (cache, shift) for cache in CACHES for shift in (False, True)
    if shift or cache != "autoregressive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", [
    dict(steps=8), dict(steps=8, temperature=0.8, cfg_scale=0.5, stop_at_eos=True, top_p=0.9),
    dict(threshold=0.2), dict(threshold=0.2, temperature=0.8, cfg_scale=0.5, stop_at_eos=True)])
def test_cuda_equals_cpu(cache, shift, dtype, how):
    if cache in ("greedy", "autoregressive", "guided") and "threshold" in how:
        pytest.skip("has no threshold")
    causal, found = dict(dtype=dtype, shift=True, causal=True), []
    if cache == "guided":  # it draws nothing
        how = {name: how[name] for name in ("cfg_scale", "stop_at_eos") if name in how}
    for device in ("cpu", "cuda"):
        model = random_model(**causal if cache == "autoregressive" else dict(
            dtype=dtype, shift=shift)).to(device)
        guider = {"guider": random_model(n_layer=1, **causal).to(device)}
        found.append(scenario([5, 1, 9], model, cache=cache, **how,
                              **guider if cache == "guided" else {}).run())
    for name in ("tokens", "steps", "positions_run", "guider_positions"):
        assert getattr(found[0], name) == getattr(found[1], name)

@pytest.mark.parametrize("cache, remasking, shift", [
    (*case, shift) for case in ORDERS for shift in (False, True)
    if case[0] in CERTAIN or shift == (case[0] == "autoregressive")])
@pytest.mark.parametrize("temperature, cfg_scale, top_p", [(0.0, 0.0, None), (0.8, 0.5, 0.9)])
def test_the_loops_do_not_wait(monkeypatch, cache, remasking, shift, temperature, cfg_scale, top_p):
    """Inside the loop. Setting up and reading the answers out may wait."""
    loops = find("LOOPS", cache)
    loop = loops[cache]

    @functools.wraps(loop)
    def strict(*args, **how):
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop(*args, **how)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setitem(loops, cache, strict)
    model = random_model(dtype=torch.float32, shift=shift, causal=cache == "autoregressive")
    s = scenario([5, 1], model.cuda(), cache=cache, steps=8, remasking=remasking,
                 temperature=temperature, cfg_scale=cfg_scale, top_p=top_p)
    s.how["refresh"] = 3
    assert s.run().forwards == (16 if cache == "autoregressive" else 8)
