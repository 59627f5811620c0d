"""What has to hold for every loop: exactness where theory says exact, independent rows, and counts.

Random weights tie often in low precision, so most of these models compute in float64."""
import dataclasses
import functools
import itertools
import random

import pytest
import torch
from conftest import random_model, random_prompts
from invariants import OWN, UNCOUNTED, check_invariants, draw_scenario, orders, scenario

from caches import CACHES, COSTS, LOOPS
from dkv_min import cache_cost, find, generate
from support.settings import loop_settings

DIFFUSION = [cache for cache in CACHES if cache not in ("autoregressive", "guided")]

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("i", range(120))
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

@pytest.mark.parametrize("cache", [c for c in DIFFUSION if c != "greedy"])
def test_a_low_threshold_reveals_a_block_in_one_step(cache):
    s = scenario([9, 4, 1], cache=cache, steps=2)
    low, one = s.run(steps=None, threshold=1e-9), s.run()
    assert low.steps == one.steps == [2] * 3 and low.tokens == one.tokens
    assert low.positions_run == one.positions_run

@pytest.mark.parametrize("cache", DIFFUSION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_equals_its_prompts_alone_in_low_precision(cache, dtype):
    """Up to rounding: answers may differ after a tie. Of three steps one is cached."""
    s = scenario([3, 8, 1, 6], random_model(dtype=dtype), cache=cache, gen_length=9, block_length=9,
                 steps=3, remasking="left_to_right")
    together, alone = s.run().tokens, [s.run([j]).tokens[0] for j in range(4)]
    same = sum(a == b for x, y in zip(together, alone) for a, b in zip(x, y))
    assert same >= 18 + 36 - 4, f"{same} of 54 tokens are equal"

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

@pytest.mark.parametrize("cache", CACHES[:-1])
def test_same_seed_same_output(cache):
    remasking = "random" if "random" in orders(cache) else None
    s = scenario([5, 7], cache=cache, temperature=1.0, remasking=remasking)
    runs = [generate(s.model, s.prompts, generator=torch.Generator().manual_seed(seed),
                     **s.settings()).tokens for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]

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
    """On a device without data, whatever asks for a number fails, and so do mixed devices."""
    loop, ended = LOOPS[cache], []
    how = [{}, dict(temperature=0.7, cfg_scale=1.5), dict(suppress_eos="confidence", top_p=0.9),
           dict(temperature=0.7, top_k=3), dict(cfg_scale=1.5, suppress_eos="logits")][i % 5]

    @functools.wraps(loop)
    def watched(*args, **how):
        loop(*args, **how)
        ended.append(True)
    monkeypatch.setitem(find("LOOPS", cache), cache, watched)
    causal = cache == "autoregressive"
    model = random_model(n_layer=1, shift=bool(shift or causal), causal=causal)
    s = scenario([5, 1], model.to("meta"), cache=cache, remasking=remasking, steps=6, **how)
    order = [[len(p) + q for q in range(16)] for p in s.prompts]
    with pytest.raises(NotImplementedError, match="meta"):  # the read-out after the loop
        s.run(order=order if remasking is None and cache in DIFFUSION else None)
    assert ended

@pytest.mark.parametrize("cache, own, foreign", [
    ("none", {}, ("refresh", "window", "delay")),
    ("decode", dict(refresh=8, delay=True), ("window",)),
    ("greedy", dict(refresh=2, window=4, delay=True), ("depth",)),
    ("prefill", {}, ("refresh",)), ("pd", dict(refresh=8, delay=True), ("window",)),
    ("local", dict(refresh=None, delay=True), ("window",)),
    ("freecache", dict(delay=False), ("refresh",)), ("prefix", {}, ("delay",)),
    ("dual", {}, ("delay",)), ("window", dict(refresh=32, window=64, active=16), ("delay", "tau")),
    ("entropy", dict(tau=0.2, recent=64, window=None), ("refresh", "active")),
    ("autoregressive", {}, ("refresh",)),
    ("guided", dict(guider=None, accept="deterministic", accept_top_k=5, ratio=0.5, window=None,
                    accept_threshold=None, speculative=False), ("refresh", "delay"))])
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

WRONG = {  # what a setting cannot be
    "gen_length": [0, 2.5, None], "steps": [17, 0], "temperature": [1e39, -0.1, float("nan")],
    "cfg_scale": [1e39, -1], "refresh": [0, 2.5], "window": [-1], "delay": [1],
    "threshold": [0, 1.5, "0.9", float("nan")], "top_p": [0, 1.5, "1"], "top_k": [0, 2.5],
    "schedule": ["slow"],
    "stop_at_eos": ["yes"], "suppress_eos": ["yes"], "cache": ["fast"], "remasking": ["best"]}

@pytest.mark.parametrize("words, change", [
    *((f"{name} is {value!r}, and has to be ", {name: value}) for name in WRONG
      for value in WRONG[name]),
    *(("list of lists of whole numbers", dict(prompts=prompts))
      for prompts in ([3, 4], [["a"]], None, [[3.7]], ["34"])),
    ("no prompt", dict(prompts=[])), ("prompt 1 is empty", dict(prompts=[[3], []])),
    ("mask", dict(prompts=[[3, 40]])), ("0..47: 48", dict(prompts=[[3, 48]])),
    ("0..47: -1", dict(prompts=[[-1]])), ("64", dict(prompts=[[3] * 49])),
    ("one of none, decode, greedy, prefill", dict(cache="fast")),
    ("0 to 1e6", dict(temperature=1e39)),
    ("one of low_confidence, margin, entropy, random", dict(remasking="best")),
    ("multiple", dict(block_length=5)),
    ("multiple", dict(block_length=4, steps=6)), ("4, the number", dict(block_length=4, steps=3)),
    *((f"{name} is {value!r}, and has to be ", {"cache": cache, name: value})
      for cache, name, value in (("entropy", "tau", float("nan")), ("entropy", "tau", "1"),
                                 ("entropy", "recent", -1), ("window", "active", 0))),
    ("no effect with a threshold", dict(cache="none", threshold=0.9, steps=16)),
    ("use another cache", dict(threshold=0.9)),
    *(("leave out the order, and any remasking", dict(cache="none", threshold=0.9, **how))
      for how in (dict(remasking="random"), dict(order=[list(range(2, 18))]))),
    *((f"first 3 masks ({name}), and a step reveals 4", {"cache": cache, name: 3, "steps": 4})
      for cache, name in (("window", "active"), ("entropy", "window"))),
    ("an order may start anywhere", dict(cache="window", order=[list(range(2, 18))])),
    ("it has tau, recent, window", dict(cache="entropy", refresh=3)),
    ("greedy", dict(remasking="low_confidence")), ("order has to be", dict(order=5)),
    ("order 0", dict(order=[[0]])), ("order has 0", dict(order=[])),
    ("block", dict(order=[list(range(2, 18))[::-1]], block_length=8)),
    ("order", dict(order=[list(range(2, 18))], remasking="left_to_right")),
    ("generator has", dict(generator=[])), ("generator has", dict(generator=7)),
    ("use schedule llada", dict(schedule="dream")),
    # to a causal model
    *((f"leave out {words}{name}", {"shift": 1, "cache": "autoregressive", name: value})
      for words, name, value in (
          ("", "steps", 16), ("", "block_length", 4), ("", "threshold", 0.9),
          ("", "schedule", "dream"), ("", "remasking", "random"),
          ("an ", "order", [list(range(2, 18))]))),
    *(("causal model writes from left to right", dict(shift=1, **how)) for how in (
        dict(cache="decode"), dict(cache="none", remasking="random"),
        dict(cache="none", order=[list(range(2, 18))]))),
    ("needs a causal model", dict(cache="autoregressive")),
    ("this one is causal", dict(shift=1, cache="guided", accept="self")),
    *((words, dict(cache="guided", accept="self") | how) for words, how in (
        *((f"leave out {name}", {name: value}) for name, value in (
            ("temperature", 0.5), ("steps", 16), ("block_length", 4), ("threshold", 0.9),
            ("remasking", "random"), ("schedule", "dream"), ("top_p", 0.9), ("top_k", 3))),
        ("leave out an order", dict(order=[list(range(2, 18))])),
        ("need one: give guider", dict(accept="topk")), ("takes no guider", dict(guider=1)),
        ("has to be a causal model", dict(guider=0, accept="topk")),
        ("it needs a guider", dict(speculative=True)),
        *((f"window is {window}, and has to be", dict(window=window))
          for window in ((0, 1), (-1, 2), 4, (2, 2, 2))),
        ("accept is 'most', and has to be one of", dict(accept="most")),
        ("accept_top_k is 0, and has to be", dict(accept_top_k=0)),
        ("ratio is 2, and has to be", dict(ratio=2)),
        ("accept_threshold is 'x', and has to be", dict(accept_threshold="x"))))])
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
