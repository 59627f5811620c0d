"""What has to hold for every loop: exactness where theory says exact, independent rows, and counts.

Random weights tie often in low precision, so most of these models compute in float64."""
import dataclasses
import functools
import itertools
import random

import pytest
import torch
from conftest import REFUSED, random_model, random_prompts
from invariants import OWN, UNCOUNTED, check_invariants, draw_scenario, orders, scenario

from caches import CACHES, COSTS, LOOPS
from dkv_min import cache_cost, find, generate
from support.settings import loop_settings

DIFFUSION = [cache for cache in CACHES if cache not in ("autoregressive", "guided")]

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("i", range(90))
def test_invariants(i):
    check_invariants(draw_scenario(random.Random(f"test {i}")))

@pytest.mark.parametrize("cache", DIFFUSION[1:])
@pytest.mark.parametrize("steps", [16, 6])
def test_one_layer_is_not_exact_without_the_delay(cache, steps):
    """K/V of a first layer depend only on a token's own id and position: run once more after it was
    revealed, they are right for good, see check_invariants. Kept from the step that revealed it,
    they are those of a mask. The paper's idea as a unit test.

    Freecache as published has no delay, which shows as soon as there is a second block. The caches
    without that setting run a revealed token again anyway."""
    L, own = 16 if "delay" in loop_settings(LOOPS[cache], {}) and cache != "freecache" else 8, {}
    if cache == "greedy":
        own = dict(window=2, remasking="random")
    s = scenario([9, 4, 1], random_model(n_layer=1), cache=cache, block_length=L, steps=steps,
                 refresh=1000, tau=float("inf"), delay=True, **own)
    remasking = {"remasking": s.how.get("remasking", "low_confidence")}
    plain = s.run(cache="none", **remasking).tokens
    assert s.run().tokens == plain
    if "delay" in s.settings():
        assert s.run(delay=False).tokens != plain
    # deeper models are not exact either way: otherwise the tests of exactness would prove nothing
    deep = dataclasses.replace(s, model=random_model())
    assert deep.run().tokens != deep.run(cache="none", **remasking).tokens

def test_the_table_of_gains():
    for P, cache, refresh, gain in (
            (128, "decode", 4, 2.25), (128, "decode", 8, 2.85), (128, "decode", 128, 3.79),
            (512, "decode", 8, 4.5), (128, "greedy", 2, 1.95), (512, "greedy", 2, 1.98)):
        found = cache_cost(P) / cache_cost(P, cache=cache, refresh=refresh)
        assert found == pytest.approx(gain, abs=0.05)
    with pytest.raises(ValueError, match="refresh is 0, and has to be"):
        cache_cost(9, cache="decode", refresh=0)
    for how in (dict(cache="entropy"), dict(cache="dual", threshold=0.9), dict(cache="guided"),
                *(dict(cache=cache, shift=True) for cache in UNCOUNTED)):
        with pytest.raises(ValueError, match="no closed form for .* none, decode, greedy"):
            cache_cost(9, **how)

def test_autoregressive_against_plain_decoding():
    s = scenario([9, 4, 1], cache="autoregressive")
    r = s.run()
    for p, answer, run in zip(s.prompts, r.tokens, r.positions_run):
        for _ in range(16):
            logits = s.model(torch.tensor([p]))[0, -1, :44].index_fill(0, torch.tensor(40), -9e9)
            p = [*p, int(logits.argmax())]
        assert (answer, run) == (p, len(p) - 1)
    assert r.steps == [16] * 3 and r.forwards == 16

@pytest.mark.parametrize("shift", [False, True])
def test_guiders_that_know_nothing(shift):
    """Drafts that are all accepted are one step. Of those that never are, each step keeps the
    first: then it is FreeCache from left to right in a window, with the delay where the column that
    was revealed last does not run anyway; and Prefill, which with a shift runs a column more."""
    s = scenario([9, 4, 1], random_model(shift=shift), cache="guided", accept="topk")
    one = dataclasses.replace(s, how=dict(cache="none", gen_length=16, block_length=16, steps=1))
    guess = dict(accept="self", guider=None, accept_threshold=1e-30)
    for how in (dict(accept_top_k=99), guess, guess | dict(window=(3, 17))):
        r = s.run(**how)
        assert r.forwards == 1 and r.tokens == one.run().tokens
    never = dict(accept="dynamic_threshold", accept_threshold=1)
    prefill, free = dict(cache="prefill"), dict(cache="freecache", block_length=1, delay=not shift)
    for window, other in [(None, prefill)] * (not shift) + [((0, 16), free)]:
        a, b = s.run(window=window, **never), one.run(steps=16, remasking="left_to_right", **other)
        assert (a.tokens, a.steps) == (b.tokens, b.steps)
    # the guider reads the newest token and the drafts, at first the prompt too, but for the last
    drafts = sum(range(1, 16))
    assert a.guider_positions == [len(p) + 15 + drafts for p in s.prompts]

def test_temperature_samples_the_softmax(model):
    """One token after one prompt, many times: its frequencies are the probabilities."""
    prompt, n, t = random_prompts([4])[0], 4000, 0.7
    logits = model(torch.tensor([prompt + [40]]))[0, -1, :44]
    logits[40] = -torch.inf
    result = generate(model, [prompt] * n, gen_length=1, temperature=t,
                      generator=torch.Generator().manual_seed(0))
    p = (logits / t).softmax(-1)
    found = torch.bincount(torch.tensor([x[-1] for x in result.tokens]), minlength=44)
    assert found[40] == 0
    assert ((found - n * p).abs() < 5 * (n * p * (1 - p)).sqrt() + 1).all()

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_extreme_temperatures_and_weights(dtype):
    """At a temperature, NaN once gave the id after the last one, then a RuntimeError of torch."""
    s = scenario([5, 7] * 20, random_model(dtype=dtype))
    for tiny in (1e-30, 1e-46, 1e-320):
        assert s.run([0, 1], temperature=tiny).tokens == s.run([0, 1]).tokens
    hot = {t for row in s.run(temperature=1e6).tokens for t in row[-16:]}
    assert hot == set(range(44)) - {40}, "at a high temperature every id but the mask comes up"
    s.model.blocks[1].mlp.down.weight.data[:] = float("nan")
    for answer in (s.run([0], temperature=t).tokens[0][5:] for t in (0.0, 0.7)):
        assert len(answer) == 16 and max(answer) < 44 and 40 not in answer

@pytest.mark.parametrize("top_k", [None, 1])
def test_suppress_eos(top_k):
    often = random_model()
    often.head.weight.data[1:3] *= 3  # EOS and EOT
    s, steps, late = scenario([5, 7, 3], often, gen_length=12, block_length=12, top_k=top_k), [], 0
    assert any(1 in t for t in s.run().tokens)
    assert not any(1 in t[-12:] for t in s.run(suppress_eos="logits").tokens)
    # "confidence": EOS or EOT come only where no position of the block proposes anything else
    s.run(suppress_eos="confidence", on_step=lambda i, x, run, new: steps.append((x, new)))
    for j, (x, new) in itertools.product(range(3), steps):
        if x[j][new[j]].item() in (1, 2):
            before = torch.where(new[j], 40, x[j])[:len(s.prompts[j]) + 12]
            logits = s.model(before[None])[0, :, :44]
            logits[:, 40] = -torch.inf
            assert set(logits.argmax(-1)[before == 40].tolist()) <= {1, 2}
            late += 1
    assert late > 3

ORDERS = [(cache, order) for cache in CACHES if cache not in ("entropy", "guided")
          for order in orders(cache) + [None] * (cache != "window")]
CERTAIN = "none", "decode", "prefill", "pd", "freecache", "prefix"  # with shifted logits too

@pytest.mark.parametrize("i, cache, remasking, shift", [
    (i, *case) for i, case in enumerate(
        [(*case, n) for n in (0, 1) for case in ORDERS if n == 0 or case[0] in CERTAIN])])
def test_the_loops_do_not_wait_for_the_device(monkeypatch, i, cache, remasking, shift):
    """Without data, whatever asks for a number fails, and so do mixed devices and dtypes."""
    loop, ended = LOOPS[cache], []
    how = [{}, dict(temperature=0.7, cfg_scale=1.5), dict(suppress_eos="confidence", top_p=0.9),
           dict(temperature=0.7, top_k=3), dict(cfg_scale=1.5, suppress_eos="logits")][i % 5]

    @functools.wraps(loop)
    def watched(*args, **how):
        loop(*args, **how)
        ended.append(True)
    monkeypatch.setitem(find("LOOPS", cache), cache, watched)
    causal = cache == "autoregressive"
    model = random_model(dtype=torch.bfloat16, n_layer=1, shift=bool(shift or causal),
                         causal=causal)
    s = scenario([5, 1], model.to("meta"), cache=cache, remasking=remasking, steps=6, **how)
    order = [[len(p) + q for q in range(16)] for p in s.prompts]
    with pytest.raises(NotImplementedError, match="meta"):  # the read-out after the loop
        s.run(order=order if remasking is None and cache in DIFFUSION else None)
    assert ended

@pytest.mark.parametrize("cache, own, foreign", REFUSED["settings"])
def test_settings_of_the_loops(cache, own, foreign):
    """None means the default, and a loop refuses what it does not have."""
    assert OWN == {"refresh", "window", "delay", "active", "tau", "recent", "guider", "accept",
                   "accept_top_k", "ratio", "accept_threshold", "speculative"}
    assert loop_settings(LOOPS[cache], {}) == own
    s = scenario([9], cache=cache, remasking=None)
    model, guider = s.model, {k: v for k, v in s.how.items() if k == "guider"}
    for how in (own, dict.fromkeys(own), {}):
        r = scenario([9], cache=cache, **how | guider).run()
        if cache in COSTS:
            assert r.positions_run == [cache_cost(9, 16, block_length=8, cache=cache)]
    for name in foreign:
        r = generate(model, [[3]], cache=cache, gen_length=4, **guider, **{name: None})
        assert r.forwards == 4 or guider
        costs = [functools.partial(cache_cost, 1)] * (cache in COSTS)
        for call in (functools.partial(generate, model, [[3]]), *costs):
            with pytest.raises(ValueError) as e:
                call(cache=cache, gen_length=4, **{name: 4})
            assert all(word in str(e.value) for word in (cache, name, *own))

@pytest.mark.parametrize("words, change", REFUSED["generate"])
def test_user_errors_are_one_sentence(words, change):
    """shift: to a causal model. A guider is 1, causal, or 0, not."""
    model, *guiders = (random_model(shift=bool(n), causal=bool(n), n_layer=1)
                       for n in (change.get("shift", 0), 0, 1))
    change = {k: v for k, v in change.items() if k != "shift"}
    if "guider" in change:
        change["guider"] = guiders[change["guider"]]
    with pytest.raises(ValueError) as e:
        generate(model, **{"prompts": [[3, 4]], "gen_length": 16, "cache": "greedy", **change})
    assert words in str(e.value) and "\n" not in str(e.value), e.value
