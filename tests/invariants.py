"""What has to hold for every loop and every setting: for test_generate.py and the campaign
`generate` of campaigns/fuzz.py."""
from dataclasses import dataclass

import torch
from conftest import random_model, random_prompts

from dkv_min import CACHES, LOOPS, REMASKING, cache_cost, generate
from support.settings import loop_settings

OWN = {name for loop in LOOPS.values() for name in loop_settings(loop, {})}

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
    return [o for o in REMASKING if (cache, o) != ("greedy", "low_confidence")]

def scenario(lengths=(5, 2), model=None, seeds=None, **how):
    """Prompts of these lengths, in blocks of 8 of 16 tokens unless how says otherwise."""
    how = dict(cache="none", gen_length=16, block_length=8) | how
    how.setdefault("steps", how["gen_length"])
    if how["cache"] == "greedy":
        how.setdefault("remasking", "random")
    seeds = list(range(len(lengths))) if seeds is None else seeds
    return Scenario(model or random_model(), random_prompts(lengths), seeds, how)

def draw_scenario(rng):
    """A random model, with random prompts and settings."""
    L, head, vocab = rng.choice([1, 2, 3, 4, 6, 8]), rng.choice([1, 2, 4]), rng.randint(8, 60)
    blocks, n_vocab = rng.randint(1, max(1, 12 // L)), rng.randint(6, vocab)
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
    cache, order = rng.choice(CACHES), None
    if rng.random() < 0.25:
        order = [[len(p) + q for lo in range(0, G, L) for q in rng.sample(range(lo, lo + L), L)]
                 for p in prompts]
    how = dict(
        cache=cache, gen_length=G, block_length=L, steps=rng.randint(1, L) * blocks, order=order,
        remasking=None if order else rng.choice([None, *orders(cache)]), delay=rng.random() < 0.75,
        refresh=rng.choice([None, 1, 2, 3, 5, 10**9]), window=rng.choice([0, 1, 2, 4, 10**9]),
        temperature=rng.choice([0.0, 0.0, 0, 0.5, 1.0, 1e-30, 50.0]),
        cfg_scale=rng.choice([0.0, 0.0, 0.5, 1.5]), stop_at_eos=rng.random() < 0.4,
        suppress_eos=rng.choice([None, None, None, "logits", "confidence"]))
    return Scenario(model, prompts, [rng.getrandbits(32) for _ in prompts], how)

class Watch:
    """As on_step, checks every step while the loop runs."""
    def __init__(self, s):
        self.s, self.before = s, None
        self.seen, self.counted = [[] for _ in s.prompts], [0] * len(s.prompts)

    def __call__(self, step, tokens, run, revealed):
        G, L, steps = (self.s.how[name] for name in ("gen_length", "block_length", "steps"))
        for j, (p, x) in enumerate(zip(self.s.prompts, tokens)):
            where, P, block = f"step {step}, prompt {j}", len(p), step // (steps * L // G)
            at = revealed[j].nonzero().flatten().tolist()
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
        self.before = tokens

def check_answer(s, r, watch, j):
    """One prompt of the result r -> the blocks that were decoded."""
    G, L, steps = (s.how[name] for name in ("gen_length", "block_length", "steps"))
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
    counts = {"gen_length", "steps", "block_length", "cache", *OWN}
    cost = cache_cost(len(p), **{k: v for k, v in s.settings().items() if k in counts})
    run = r.positions_run[j]
    same(f"{where}: positions_run", run, watch.counted[j])
    same(f"{where}: cache_cost {cost}, run", run, cost if n == G // L else min(run, cost - 1))
    same(f"{where}: positions_full", r.positions_full[j], (len(p) + G) * steps // (G // L) * n)
    return n

def check_invariants(s):
    """Runs the scenario, and others that have to agree with it -> its Result."""
    try:
        watch, how = Watch(s), s.how
        r = s.run(on_step=watch)
        blocks = [check_answer(s, r, watch, j) for j in range(len(s.prompts))]
        steps = how["steps"] * how["block_length"] // how["gen_length"]
        same("forwards", r.forwards, max(blocks) * steps)
        every = list(range(len(s.prompts)))
        for rows in [every, *([j] for j in every if len(every) > 1)]:  # again, and each alone
            again = s.run(rows)
            for name in ("tokens", "positions_run", "positions_full"):
                same(f"{name} of {rows}", getattr(again, name), [getattr(r, name)[j] for j in rows])
        # greedy's own default is an order known ahead; no cache has to be compared in the same one
        known = how["cache"] == "greedy" or how.get("order") is not None
        remasking = how.get("remasking") or ("random" if known else "low_confidence")
        plain = s.run(cache="none", remasking=remasking)
        for cache in list(LOOPS)[1:] if how["cache"] == "none" else [how["cache"]]:
            if (cache, remasking) == ("greedy", "low_confidence"):
                continue
            whole = s.run(cache=cache, remasking=remasking, refresh=1)
            same(f"{cache} with refresh 1", whole.tokens, plain.tokens)
            same(cache, (whole.positions_run, whole.positions_full), (plain.positions_run,) * 2)
            if s.model.config.n_layer == 1:
                delayed = s.run(cache=cache, remasking=remasking, delay=True)
                same(f"{cache} with the delay, one layer", delayed.tokens, plain.tokens)
        return r
    except AssertionError as e:
        raise AssertionError(f"{e}; {s}") from None
