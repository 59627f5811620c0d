"""On a GPU: the authors' traces, the CPU's answers, loops that do not wait. Skipped without."""
import functools

import pytest
import torch
from conftest import random_model
from invariants import orders, scenario
from test_golden import golden_model, test_every_step  # noqa: F401  with the fixture of this file

from caches import CACHES
from dkv_min import find

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return golden_model(tmp_path_factory.mktemp("golden"), "float32").cuda()

@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", [
    dict(steps=8), dict(steps=8, temperature=0.8, cfg_scale=0.5, stop_at_eos=True),
    dict(threshold=0.2), dict(threshold=0.2, temperature=0.8, cfg_scale=0.5, stop_at_eos=True)])
def test_cuda_equals_cpu(cache, dtype, how):
    if cache == "greedy" and "threshold" in how:
        pytest.skip("greedy has to know ahead what a step reveals")
    a, b = (scenario([5, 1, 9], random_model(dtype=dtype).to(device), cache=cache, **how).run()
            for device in ("cpu", "cuda"))
    for name in ("tokens", "steps", "positions_run"):
        assert getattr(a, name) == getattr(b, name)

@pytest.mark.parametrize("cache, remasking", [
    (c, o) for c in CACHES if c != "entropy" for o in orders(c)])
@pytest.mark.parametrize("temperature, cfg_scale", [(0.0, 0.0), (0.8, 0.5)])
def test_the_loops_do_not_wait(monkeypatch, cache, remasking, temperature, cfg_scale):
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
    s = scenario([5, 1], random_model(dtype=torch.float32).cuda(), cache=cache, steps=8, refresh=3,
                 remasking=remasking, temperature=temperature, cfg_scale=cfg_scale)
    assert s.run().forwards == 8
