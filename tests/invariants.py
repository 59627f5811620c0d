"""What has to hold for every loop and every setting: for test_generate.py and the campaign
`generate` of campaigns/fuzz.py."""
import collections
from dataclasses import dataclass

import torch
from conftest import random_model, random_prompts

from caches import CACHES, COSTS, LOOPS
from dkv_min import REMASKING, cache_cost, generate
from support.settings import loop_settings

OWN = {name for loop in LOOPS.values() for name in loop_settings(loop, {})}
# the settings with which a cache gives the answers of no cache, for every model and in every step
WHOLE = dict.fromkeys(["decode", "greedy", "local", "window"], dict(refresh=1)) | {
    "entropy": dict(tau=-1, window=None)}
# and for models of one layer: there K/V depend only on a token's id and position
ONE_LAYER = dict.fromkeys(["prefill", "prefix", "dual"], {}) | dict.fromkeys(
    ["decode", "greedy", "local", "pd", "freecache"], dict(delay=True)) | {
    "window": dict(window=None, active=None), "entropy": dict(window=None, recent=None)}

@dataclass
class Scenario:
    model: object
    prompts: list
    seeds: list  # one per prompt
    how: dict    # generate's settings, cache, gen_length, steps and block_length always among them

    def __str__(self):
        return f"{self.model.config} prompts={self.prompts} seeds={self.seeds} {self.how}"

    def settings(self, **change):
        """generate's settings; those that the loop does not have are left out."""
        how = self.how | change
        known = loop_settings(LOOPS[how["cache"]], {})
        return {k: v for k, v in how.items() if k in known or k not in OWN}

    def run(self, rows=None, **change):
        """Answers the prompts, or those of rows -> Result."""
        rows, how = rows or range(len(self.prompts)), self.settings(**change)
        if how.get("order") is not None:
            how["order"] = [how["order"][j] for j in rows]
        generators = [torch.Generator().manual_seed(self.seeds[j]) for j in rows]
        return generate(self.model, [self.prompts[j] for j in rows], generator=generators, **how)

def same(what, got, expected):
    assert got == expected, f"{what}: got {got}, expected {expected}"

def orders(cache):
    """What remasking can be."""
    never = dict(greedy="low_confidence", window="random", entropy="random").get(cache)
    return [order for order in REMASKING if order != never]

def scenario(lengths=(5, 2), model=None, seeds=None, **how):
    """Prompts of these lengths, in blocks of 8 of 16 tokens unless how says otherwise."""
    how = dict(cache="none", gen_length=16, block_length=8) | how
    how.setdefault("steps", None if "threshold" in how else how["gen_length"])
    if how["cache"] == "greedy":
        how.setdefault("remasking", "random")
    seeds = list(range(len(lengths))) if seeds is None else seeds
    return Scenario(model or random_model(), random_prompts(lengths), seeds, how)

def draw_scenario(rng):
    """A random model, with random prompts and settings."""
    L, head, vocab = rng.choice([1, 2, 3, 4, 6, 8]), rng.choice([1, 2, 4]), rng.randint(8, 60)
    blocks, n_vocab = rng.randint(1, max(2, 12 // L)), rng.randint(6, vocab)
    G, (eos, eot) = L * blocks, rng.sample(range(n_vocab), 2)
    mask = rng.choice([t for t in range(vocab) if t not in (eos, eot)])
    ids, sizes = [t for t in range(vocab) if t != mask], [1, 2, rng.randint(3, 12)]
    prompts = [rng.choices(ids, k=rng.choice(sizes)) for _ in range(rng.randint(1, 4))]
    model = random_model(
        rng.getrandbits(32), n_layer=rng.choice([1, 1, 2, 3]), n_head=head,
        n_kv_head=rng.choice([k for k in (1, 2, 4) if head % k == 0]),
        n_embd=head * rng.choice([2, 4, 8]), n_ff=rng.randint(1, 40), vocab_size=vocab,
        n_vocab=n_vocab, mask_id=mask, eos_id=eos, eot_id=rng.choice([None, eot]),
        qkv_bias=rng.random() < 0.3, max_len=max(map(len, prompts)) + G + rng.choice([0, 7]))
    model.head.weight.data[eos] *= rng.choice([1, 1, 2])  # some end early
    cache, order, threshold = rng.choice(CACHES), None, None
    steps, remasking, least = rng.randint(1, L) * blocks, rng.choice([None, *orders(cache)]), 1
    if cache != "greedy" and rng.random() < 0.4:
        threshold, steps = rng.choice([1e-9, 0.05, 0.1, 0.2, 0.4, 0.9, 1, 1.0]), None
        remasking = rng.choice([None, "low_confidence"])
    else:
        least = -(-G // steps)  # the masks that have to be run
        if "random" in orders(cache) and rng.random() < 0.25:
            order = [[len(p) + q for lo in range(0, G, L) for q in rng.sample(range(lo, lo + L), L)]
                     for p in prompts]
    how = dict(
        cache=cache, gen_length=G, block_length=L, steps=steps, threshold=threshold, order=order,
        remasking=None if order else remasking, delay=rng.random() < 0.75,
        refresh=rng.choice([None, 1, 2, 3, 5, 10**9]), window=rng.choice([0, 1, 2, 4, 10**9]),
        active=least + rng.choice([0, 1, 3, 10**9]), recent=rng.choice([None, 0, 1, 2, 5]),
        tau=rng.choice([None, -1, 0.3, 1, 2.0, 3.0, float("inf")]),
        temperature=rng.choice([0.0, 0.0, 0, 0.5, 1.0, 1e-30, 50.0]),
        cfg_scale=rng.choice([0.0, 0.0, 0.5, 1.5]), stop_at_eos=rng.random() < 0.4,
        suppress_eos=rng.choice([None, None, None, "logits", "confidence"]))
    if cache == "entropy":
        how["window"] = rng.choice([None, least, least + 1, 10**9])
    return Scenario(model, prompts, [rng.getrandbits(32) for _ in prompts], how)

class Watch:
    """As on_step, checks every step while the loop runs."""
    def __init__(self, s):
        self.s, self.before = s, None
        self.seen, self.counted = [[] for _ in s.prompts], [0] * len(s.prompts)
        self.steps = collections.Counter()  # of every block and prompt

    def __call__(self, step, tokens, run, revealed):
        G, L = self.s.how["gen_length"], self.s.how["block_length"]
        mask, block = self.s.model.config.mask_id, 0
        if self.before is not None:  # no block is begun while an earlier one holds a mask
            masks = (self.before == mask).nonzero().tolist()
            block = min([(q - len(self.s.prompts[j])) // L for j, q in masks], default=G // L)
        for j, (p, x) in enumerate(zip(self.s.prompts, tokens)):
            where, P = f"step {step}, prompt {j}", len(p)
            at = revealed[j].nonzero().flatten().tolist()
            same(f"{where}: reveals {at}, runs", bool(run[j].any()), bool(at))
            same(f"{where}: the prompt", x[:P].tolist(), p)
            same(f"{where}: past its end", ({*x[P + G:].tolist()} - {-1}, run[j, P + G:].any()),
                 (set(), False))
            same(f"{where}: blocks of {at}", {(q - P) // L for q in at} | {block}, {block})
            same(f"{where}: of {at} runs", [q for q in at if run[j, q]], at)
            if self.before is not None:
                other = (x != self.before[j]) & ~revealed[j]
                if self.s.how.get("stop_at_eos"):  # the rest of an answer becomes EOS
                    other &= x != self.s.model.config.eos_id
                same(f"{where}: reveals {at}, changes too", other.nonzero().tolist(), [])
            self.seen[j] += at
            self.counted[j] += int(run[j].sum())
            self.steps[block, j] += bool(at)
        self.before = tokens

def check_answer(s, r, watch, j):
    """One prompt of the result r -> the blocks that were decoded."""
    G, L, threshold = (s.how.get(name) for name in ("gen_length", "block_length", "threshold"))
    p, config, where = s.prompts[j], s.model.config, f"prompt {j}"
    eos, answer, n = config.eos_id, r.tokens[j][len(p):], G // L
    if s.how.get("stop_at_eos"):
        n = next((b + 1 for b in range(n) if eos in answer[b * L:b * L + L]), n)
        same(f"{where}: after the end", answer[n * L:], [eos] * (G - n * L))
    same(where, (r.tokens[j][:len(p)], len(answer)), (p, G))
    never = {config.mask_id, eos if s.how.get("suppress_eos") == "logits" else None}
    odd = [t for t in answer if t in never or not 0 <= t < config.n_vocab]
    same(f"{where}: ids that cannot be", odd, [])
    same(f"{where}: revealed", sorted(watch.seen[j]), list(range(len(p), len(p) + n * L)))
    run, steps = r.positions_run[j], r.steps[j]
    least, most = (n, n * L) if threshold else [s.how["steps"] * L // G * n] * 2
    same(f"{where}: {least} to {most} steps, {steps}", least <= steps <= most, True)
    same(f"{where}: steps", steps, sum(watch.steps[block, j] for block in range(n)))
    same(f"{where}: positions_run", run, watch.counted[j])
    same(f"{where}: positions_full", r.positions_full[j], (len(p) + G) * steps)
    if s.how["cache"] in COSTS and not threshold:
        counts = {"gen_length", "steps", "block_length", "cache", *OWN}
        cost = cache_cost(len(p), **{k: v for k, v in s.settings().items() if k in counts})
        same(f"{where}: cache_cost {cost}, run", run, cost if n == G // L else min(run, cost - 1))
    return n

def check_invariants(s):
    """Runs the scenario, and others that have to agree with it -> its Result."""
    try:
        watch, how = Watch(s), s.how
        r = s.run(on_step=watch)
        blocks = [check_answer(s, r, watch, j) for j in range(len(s.prompts))]
        slowest = [max(watch.steps[b, j] for j in range(len(blocks))) for b in range(max(blocks))]
        same("forwards", r.forwards, sum(slowest))
        every = list(range(len(s.prompts)))
        for rows in [every, *([j] for j in every if len(every) > 1)]:  # again, and each alone
            again = s.run(rows)
            for name in ("tokens", "steps", "positions_run", "positions_full"):
                same(f"{name} of {rows}", getattr(again, name), [getattr(r, name)[j] for j in rows])
        # greedy's own default is an order known ahead; no cache has to be compared in the same one
        known = how["cache"] == "greedy" or how.get("order") is not None
        remasking = how.get("remasking") or ("random" if known else "low_confidence")

        def agree(cache, change, expected):
            """In tokens -> the result of the cache with this change."""
            result = s.run(cache=cache, remasking=remasking, **change)
            same(f"{cache} with {change}", result.tokens, expected.tokens)
            return result
        plain = s.run(cache="none", remasking=remasking)
        for cache in CACHES[1:] if how["cache"] == "none" else {how["cache"]} - {"none"}:
            if remasking not in orders(cache) or cache == "greedy" and how.get("threshold"):
                continue
            if cache in WHOLE:
                whole = agree(cache, WHOLE[cache], plain)
                same(cache, (whole.positions_run, whole.positions_full), (plain.positions_run,) * 2)
            if cache == "pd":
                prefill = s.run(cache="prefill", remasking=remasking)
                whole = agree(cache, dict(refresh=1), prefill)
                same("pd, refresh 1", whole.positions_run, prefill.positions_run)
            if s.model.config.n_layer == 1:
                agree(cache, ONE_LAYER[cache], plain)
        return r
    except AssertionError as e:
        raise AssertionError(f"{e}; {s}") from None
