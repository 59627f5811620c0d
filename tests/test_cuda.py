"""On a GPU: the authors' traces, the CPU's answers, loops that do not wait. Skipped without."""
import functools

import pytest
import torch
from conftest import random_model
from invariants import orders, scenario
from test_golden import golden_model, test_every_step  # noqa: F401  with the fixture of this file

from dkv_min import CACHES, LOOPS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return golden_model(tmp_path_factory.mktemp("golden"), "float32").cuda()

@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature, cfg_scale, stop", [(0.0, 0.0, False), (0.8, 0.5, True)])
def test_cuda_equals_cpu(cache, dtype, temperature, cfg_scale, stop):
    a, b = (scenario([5, 1, 9], random_model(dtype=dtype).to(device), cache=cache, steps=8,
                     temperature=temperature, cfg_scale=cfg_scale, stop_at_eos=stop).run()
            for device in ("cpu", "cuda"))
    assert a.tokens == b.tokens and a.positions_run == b.positions_run

@pytest.mark.parametrize("cache, remasking", [(c, o) for c in CACHES for o in orders(c)])
@pytest.mark.parametrize("temperature, cfg_scale", [(0.0, 0.0), (0.8, 0.5)])
def test_the_loops_do_not_wait(monkeypatch, cache, remasking, temperature, cfg_scale):
    """Inside the loop. Setting up and reading the answers out may wait."""
    loop = LOOPS[cache]

    @functools.wraps(loop)
    def strict(*args, **how):
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop(*args, **how)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setitem(LOOPS, cache, strict)
    s = scenario([5, 1], random_model(dtype=torch.float32).cuda(), cache=cache, steps=8,
                 remasking=remasking, temperature=temperature, cfg_scale=cfg_scale)
    assert s.run().forwards == 8
