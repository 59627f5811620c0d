"""What has to hold for every loop and every setting: for test_generate.py and the campaign
`generate` of campaigns/fuzz.py."""
import collections
from dataclasses import dataclass
from unittest import mock

import torch
from conftest import random_model, random_prompts

from caches import CACHES, COSTS, LOOPS
from dkv_min import REMASKING, KVCache, cache_cost, generate
from support.decoding import block_schedules
from support.settings import ACCEPT, AHEAD, loop_settings

OWN = {name for loop in LOOPS.values() for name in loop_settings(loop, {})}
# the settings with which a cache gives the answers of no cache, for every model and in every step
WHOLE = dict.fromkeys(["decode", "greedy", "local", "window"], dict(refresh=1)) | {
    "entropy": dict(tau=-1, window=None)}
# and for models of one layer: there K/V depend only on a token's id and position
ONE_LAYER = dict.fromkeys(["prefill", "prefix", "dual"], {}) | dict.fromkeys(
    ["decode", "greedy", "local", "pd", "freecache"], dict(delay=True)) | {
    "window": dict(window=None, active=None), "entropy": dict(window=None, recent=None)}
# of those, what freezes masks if logits are shifted; and then these have no closed form
FREEZE, UNCOUNTED = ("decode", "pd"), ("greedy", "local", "dual", "window")

def nans(self, *args, make=KVCache.__init__):
    """A KVCache in which what was never written is not a number, the spare column included."""
    make(self, *args)
    self.k.fill_(torch.nan)
    self.v.fill_(torch.nan)

@dataclass
class Scenario:
    model: object
    prompts: list
    seeds: list  # one per prompt
    how: dict    # generate's settings, cache, gen_length, steps and block_length always among them

    def __str__(self):
        how = {k: getattr(v, "config", v) for k, v in self.how.items()}
        return f"{self.model.config} prompts={self.prompts} seeds={self.seeds} {how}"

    @property
    def block(self):
        G, L = self.how["gen_length"], self.how["block_length"]
        return L or (1 if self.how["cache"] == "autoregressive" else G)

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
    """What remasking can be, beside None."""
    can = dict(autoregressive=(), guided=(), greedy=AHEAD).get(cache, REMASKING)
    return [order for order in can if order != "random" or cache not in ("window", "entropy")]

def scenario(lengths=(5, 2), model=None, seeds=None, **how):
    """Prompts of these lengths, in blocks of 8 of 16 tokens unless how says otherwise."""
    how = dict(cache="none", gen_length=16, block_length=8) | how
    how.setdefault("steps", None if "threshold" in how else how["gen_length"])
    if how["cache"] == "greedy":
        how.setdefault("remasking", "random")
    if how["cache"] == "guided":
        how.setdefault("guider", random_model(n_layer=1, shift=True, causal=True))
    causal = how["cache"] == "autoregressive"
    if causal or how["cache"] == "guided":  # they have no steps
        how |= dict(steps=None, block_length=None)
    seeds = list(range(len(lengths))) if seeds is None else seeds
    model = model or random_model(shift=causal, causal=causal)
    return Scenario(model, random_prompts(lengths), seeds, how)

def draw_scenario(rng):
    """A random model, with random prompts and settings."""
    L, vocab = rng.choice([1, 2, 3, 4, 6, 8]), rng.randint(8, 60)
    blocks, n_vocab = rng.randint(1, max(2, 12 // L)), rng.randint(6, vocab)
    G, (eos, eot) = L * blocks, rng.sample(range(n_vocab), 2)
    mask = rng.choice([t for t in range(vocab) if t not in (eos, eot)])
    ids, sizes = [t for t in range(vocab) if t != mask], [1, 2, rng.randint(3, 12)]
    prompts = [rng.choices(ids, k=rng.choice(sizes)) for _ in range(rng.randint(1, 4))]
    family = rng.choice(["llada", "llada", "dream", "dream", "gpt"])

    def draw_model(**network):
        head = rng.choice([1, 2, 4])
        return random_model(rng.getrandbits(32), n_head=head, n_embd=head * rng.choice([2, 4, 8]),
                            n_kv_head=rng.choice([k for k in (1, 2, 4) if head % k == 0]),
                            n_ff=rng.randint(1, 40), n_vocab=n_vocab, mask_id=mask, eos_id=eos,
                            tied=rng.random() < 0.3, qkv_bias=rng.random() < 0.3, **network)
    model = draw_model(
        n_layer=rng.choice([1, 1, 2, 3]), shift=family != "llada", causal=family == "gpt",
        vocab_size=vocab, eot_id=rng.choice([None, eot]),
        max_len=max(map(len, prompts)) + G + rng.choice([0, 7]))
    model.head.weight.data[eos] *= rng.choice([1, 1, 2])  # some end early
    cache = rng.choice([name for name in CACHES if name != "autoregressive"])
    if family == "gpt":
        cache = rng.choice(["none", "autoregressive"])
    how = dict(
        cache=cache, gen_length=G, block_length=L, delay=rng.random() < 0.75, steps=None,
        refresh=rng.choice([None, 1, 2, 3, 5, 10**9]), window=rng.choice([0, 1, 2, 4, 10**9]),
        recent=rng.choice([None, 0, 1, 2, 5]),
        tau=rng.choice([None, -1, 0.3, 1, 2.0, 3.0, float("inf")]),
        cfg_scale=rng.choice([0.0, 0.0, 0.5, 1.5]), stop_at_eos=rng.random() < 0.4)
    seeds = [rng.getrandbits(32) for _ in prompts]
    if cache == "guided":
        accept = rng.choice(ACCEPT)
        guider = accept != "self" and draw_model(n_layer=1, shift=True, causal=True,
                                                 vocab_size=vocab + rng.choice([0, 5]))
        how |= dict(
            block_length=None, accept=accept, guider=guider or None, ratio=rng.choice([0.01, 0.5]),
            accept_threshold=rng.choice([None, 0.01, 0.2]), accept_top_k=rng.choice([1, 3, 10, 99]),
            speculative=bool(guider and rng.random() < 0.4),
            window=rng.choice([None, None, (0, 2), (0, G + 2), (3, 4), (10**3, 3)]))
        return Scenario(model, prompts, seeds, how)
    how |= dict(temperature=rng.choice([0.0, 0.0, 0, 0.5, 1.0, 1e-30, 50.0]),
                top_p=rng.choice([None, None, 0.5, 0.9, 1.0]),
                top_k=rng.choice([None, None, 1, 3, 99]),
                suppress_eos=rng.choice([None, None, None, "logits", "confidence"]))
    least = 1  # the masks that have to be run
    if cache == "autoregressive":
        how["block_length"] = None
    elif family == "gpt":
        how["steps"] = rng.randint(1, L) * blocks
    elif cache != "greedy" and rng.random() < 0.4:
        how |= dict(threshold=rng.choice([1e-9, 0.05, 0.1, 0.2, 0.4, 0.9, 1, 1.0]),
                    remasking=rng.choice([None, "low_confidence"]))
    else:
        dream = cache != "greedy" and rng.random() < 0.4
        how |= dict(remasking=rng.choice([None, *orders(cache)]),
                    schedule="dream" if dream else "llada",
                    steps=rng.randint(1, 2 * L if dream else L) * blocks)
        schedules = block_schedules(G, L, how["steps"], how["schedule"])
        least = max(k for block in schedules for _, k in block)
        if "random" in orders(cache) and rng.random() < 0.25:
            how |= dict(remasking=None, order=[
                [len(p) + q for lo in range(0, G, L) for q in rng.sample(range(lo, lo + L), L)]
                for p in prompts])
    how["active"] = least + rng.choice([0, 1, 3, 10**9])
    if cache == "entropy":
        how["window"] = rng.choice([None, least, least + 1, 10**9])
    return Scenario(model, prompts, seeds, how)

class Watch:
    """As on_step, checks every step while the loop runs."""
    def __init__(self, s):
        self.s, self.before = s, None
        self.seen, self.counted = [[] for _ in s.prompts], [0] * len(s.prompts)
        self.steps = collections.Counter()  # of every block and prompt

    def __call__(self, step, tokens, run, revealed):
        G, L, config = self.s.how["gen_length"], self.s.block, self.s.model.config
        mask, block, order = config.mask_id, 0, self.s.how.get("order")
        left_to_right = config.causal or self.s.how["cache"] == "guided"
        if left_to_right or self.s.how.get("remasking") == "left_to_right":
            order = [range(len(p), len(p) + G) for p in self.s.prompts]
        if self.before is not None:  # no block is begun while an earlier one holds a mask
            masks = (self.before == mask).nonzero().tolist()
            block = min([(q - len(self.s.prompts[j])) // L for j, q in masks], default=G // L)
        for j, (p, x) in enumerate(zip(self.s.prompts, tokens)):
            where, P = f"step {step}, prompt {j}", len(p)
            at = revealed[j].nonzero().flatten().tolist()
            if self.s.how.get("schedule") != "dream":  # which has steps that reveal nothing
                same(f"{where}: reveals {at}, runs", bool(run[j].any()), bool(at))
            same(f"{where}: the prompt", x[:P].tolist(), p)
            same(f"{where}: past its end", ({*x[P + G:].tolist()} - {-1}, run[j, P + G:].any()),
                 (set(), False))
            same(f"{where}: blocks of {at}", {(q - P) // L for q in at} | {block}, {block})
            same(f"{where}: of {at}, proposed by what runs",
                 [q for q in at if run[j, q - config.shift]], at)
            if self.before is not None:
                other = (x != self.before[j]) & ~revealed[j]
                if self.s.how.get("stop_at_eos"):  # the rest of an answer becomes EOS
                    other &= x != config.eos_id
                same(f"{where}: reveals {at}, changes too", other.nonzero().tolist(), [])
            if order:
                n = len(self.seen[j])
                same(f"{where}: in this order", at, sorted(order[j][n:n + len(at)]))
            self.seen[j] += at
            self.counted[j] += int(run[j].sum())
            self.steps[block, j] += bool(run[j].any())
        self.before = tokens

def check_answer(s, r, watch, j):
    """One prompt of the result r -> how much of it was decoded."""
    G, cache, L = s.how["gen_length"], s.how["cache"], s.block
    fixed = s.how.get("threshold") is None and cache != "guided"  # the number of steps
    p, config, where = s.prompts[j], s.model.config, f"prompt {j}"
    L = 1 if cache == "guided" else L  # it ends with EOS, wherever that is
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
    least, most = (1 if cache == "guided" else n), n * L
    if fixed:
        least = most = (s.how["steps"] or G) * L // G * n
    same(f"{where}: {least} to {most} steps, {steps}", least <= steps <= most, True)
    same(f"{where}: steps", steps, sum(k for (_, row), k in watch.steps.items() if row == j))
    same(f"{where}: positions_run", run, watch.counted[j])
    same(f"{where}: positions_full", r.positions_full[j], (len(p) + G) * steps)
    if cache in COSTS and fixed and not (config.shift and cache in UNCOUNTED):
        counts = {"gen_length", "steps", "block_length", "cache", "schedule", *OWN}
        cost = cache_cost(len(p), shift=config.shift,
                          **{k: v for k, v in s.settings().items() if k in counts})
        same(f"{where}: cache_cost {cost}, run", run, cost if n == G // L else min(run, cost - 1))
    return len(p) + n * L

def check_invariants(s):
    """Runs the scenario, and others that have to agree with it -> its Result."""
    try:
        watch, how = Watch(s), s.how
        r, every = s.run(on_step=watch), list(range(len(s.prompts)))
        ends = [check_answer(s, r, watch, j) for j in every]
        if how.get("stop_at_eos"):  # up to there it is the answer of a whole run
            whole = s.run(stop_at_eos=False).tokens
            same("the end", [x[:n] for x, n in zip(r.tokens, ends)],
                 [x[:n] for x, n in zip(whole, ends)])
        blocks = {block for block, _ in watch.steps}
        same("forwards", r.forwards, sum(max(watch.steps[b, j] for j in every) for b in blocks))
        for rows in [every, *([j] for j in every if len(every) > 1)]:  # again, and each alone
            with mock.patch.object(KVCache, "__init__", nans):
                again = s.run(rows)
            for name in ("tokens", "steps", "positions_run", "positions_full", "guider_positions"):
                same(f"{name} of {rows}", getattr(again, name), [getattr(r, name)[j] for j in rows])
        check_agreement(s, r)
        return r
    except AssertionError as e:
        raise AssertionError(f"{e}; {s}") from None

def check_agreement(s, r):
    """Other settings that give the same answers."""
    how, config = s.how, s.model.config
    if how["cache"] == "guided":
        if how["speculative"] and how["accept"] == "deterministic" and not how["stop_at_eos"]:
            guider = Scenario(how["guider"], s.prompts, s.seeds, dict(
                cache="autoregressive", gen_length=how["gen_length"]))
            same("the guider alone", guider.run().tokens, r.tokens)
        return
    if config.causal:
        alone = dict(steps=None, remasking=None)
        a = s.run(cache="autoregressive", block_length=None, **alone)
        b = s.run(cache="none", block_length=1, **alone)
        same("autoregressive, none", (a.tokens, a.steps), (b.tokens, b.steps))
        return
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
        ahead = how.get("threshold") or how.get("schedule") == "dream"
        if remasking not in orders(cache) or cache == "greedy" and ahead:
            continue
        if cache in WHOLE:
            whole = agree(cache, WHOLE[cache], plain)
            same(cache, (whole.positions_run, whole.positions_full), (plain.positions_run,) * 2)
        if cache == "pd":
            prefill = s.run(cache="prefill", remasking=remasking)
            whole = agree(cache, dict(refresh=1), prefill)
            same("pd, refresh 1", whole.positions_run, prefill.positions_run)
        if config.n_layer == 1 and not (config.shift and cache in FREEZE):
            agree(cache, ONE_LAYER[cache], plain)
