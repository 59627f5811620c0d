"""Checks the arguments of generate: what a user got wrong is a ValueError of one sentence."""
import inspect
import operator

import torch

from support.decoding import block_schedules

REMASKING = ("low_confidence", "margin", "entropy", "random", "left_to_right")
ACCEPT = ("deterministic", "topk", "topk_relative", "dynamic_threshold", "self")
AHEAD = ("random", "left_to_right")  # orders that are known ahead
LOWEST = dict.fromkeys(("gen_length", "steps", "block_length", "top_k", "refresh", "active",
                        "accept_top_k"), 1) | {"window": 0, "recent": 0}

def need(good, sentence):
    if not good:
        raise ValueError(sentence)

def loop_settings(loop, given):
    """-> {name: value} of all settings of a loop: the given ones, and the defaults of its signature
    for those that are absent or None."""
    _, _, *parameters = inspect.signature(loop).parameters.values()  # after model and s
    found = {p.name: p.default for p in parameters}
    name = loop.__name__.removeprefix("generate_")
    for key, value in given.items():
        if value is None:
            continue
        need(key in found, f"cache {name!r} has no setting {key!r}: it has "
                           f"{', '.join(found) or 'none'}")
        found[key] = value
    return found

def check_lengths(gen_length, steps, block_length, schedule="llada", **settings):
    given = {name: value for name, value in settings.items() if value is not None}
    numbers = dict(gen_length=gen_length, steps=steps, block_length=block_length, **given)
    for name, value in numbers.items():
        low = LOWEST.get(name)
        need(low is None or type(value) is int and value >= low,
             f"{name} is {value!r}, and has to be a whole number of at least {low}")
    need(gen_length % block_length == 0,
         f"gen_length {gen_length} is not a multiple of block_length {block_length}")
    blocks = gen_length // block_length
    need(blocks <= steps and (steps <= gen_length or schedule == "dream"),
         f"steps is {steps}, and has to be between {blocks}, the number of blocks, and "
         f"{gen_length}, the tokens to generate: more only with schedule dream")
    need(steps % blocks == 0, f"steps {steps} is not a multiple of the number of blocks, "
                              f"{gen_length} / {block_length} = {blocks}")

def check(config, loops, /, *, cache, gen_length, steps=None, block_length=None, schedule="llada",
          threshold=None, temperature=0.0, top_p=None, top_k=None, remasking=None, cfg_scale=0.0,
          stop_at_eos=False, suppress_eos=None, order=None, **settings):
    """-> all settings of generate and of the loop, defaults filled in; those that the cache or the
    threshold makes pointless stay None. Raises ValueError at the first one that cannot work.
    loops: {name of a cache: its loop}"""
    names = dict(cache=tuple(loops), schedule=("llada", "dream"), remasking=(None, *REMASKING),
                 suppress_eos=(None, "logits", "confidence"))
    values = dict(cache=cache, schedule=schedule, remasking=remasking, suppress_eos=suppress_eos)
    for name, known in names.items():
        need(values[name] in known, f"{name} is {values[name]!r}, and has to be one of "
                                    f"{', '.join(map(str, known)).removeprefix('None, ')}")
    settings = loop_settings(loops[cache], settings)
    for name, value in (("temperature", temperature), ("cfg_scale", cfg_scale)):
        need(isinstance(value, (int, float)) and 0 <= value <= 1e6,
             f"{name} is {value!r}, and has to be a number from 0 to 1e6")
    for name, value in (("threshold", threshold), ("top_p", top_p)):
        good = isinstance(value, (int, float)) and value is not True and 0 < value <= 1
        need(value is None or good,
             f"{name} is {value!r}, and has to be a probability above 0 and at most 1")
    tau = settings.get("tau", 0)
    need(isinstance(tau, (int, float)) and tau == tau,
         f"tau is {tau!r}, and has to be a number, of nats")
    for name, value in (("stop_at_eos", stop_at_eos), ("delay", settings.get("delay", True))):
        need(isinstance(value, bool), f"{name} is {value!r}, and has to be True or False")
    need(config.eos_id is not None or not (stop_at_eos or suppress_eos),
         "this model has no eos_id, so stop_at_eos and suppress_eos cannot work")
    how = dict(cache=cache, gen_length=gen_length, steps=steps, block_length=block_length,
               schedule=schedule, threshold=threshold, temperature=temperature, top_p=top_p,
               top_k=top_k, remasking=remasking, cfg_scale=cfg_scale, stop_at_eos=stop_at_eos,
               suppress_eos=suppress_eos, **settings)
    if cache == "autoregressive":
        given = [n for n in ("steps", "block_length", "remasking") if how[n] is not None]
        given += ["an order"] * (order is not None) + ["threshold"] * (threshold is not None)
        need(not given and schedule == "llada", "the autoregressive cache writes one token after "
             f"the other: leave out {', '.join(given) or 'schedule'}")
        need(config.causal, "the autoregressive cache needs a causal model, and this one attends "
                            "to all positions: use another cache")
        check_lengths(gen_length, gen_length, gen_length, **settings)
        return how
    if cache == "guided":
        check_guided(config, how, order)
        return how
    L = how["block_length"] = gen_length if block_length is None else block_length
    if remasking is None:
        remasking = how["remasking"] = (
            "random" if cache == "greedy" or order is not None else
            "left_to_right" if config.causal else "low_confidence")
    n = gen_length if steps is None else steps
    check_lengths(gen_length, n, L, schedule, top_k=top_k, **settings)
    if threshold is None:
        how["steps"] = n
    most = max(k for block in block_schedules(gen_length, L, n, schedule) for _, k in block)
    check_together(config, how, order, 0 if threshold else most)
    return how

def check_guided(config, how, order):
    given = [n for n in ("steps", "block_length", "remasking", "threshold", "top_p", "top_k")
             if how[n] is not None] + ["an order"] * (order is not None)
    given += [n for n, value in (("temperature", 0), ("schedule", "llada")) if how[n] != value]
    guider, accept, window = how["guider"], how["accept"], how["window"]
    need(not given, "guided decoding goes from left to right, as far as the guider agrees: leave "
                    f"out {', '.join(given)}")
    need(not config.causal, "guided decoding is for a diffusion model, and this one is causal: use "
                            "cache autoregressive")
    need(accept in ACCEPT, f"accept is {accept!r}, and has to be one of {', '.join(ACCEPT)}")
    need(guider is None or hasattr(guider, "config"),
         f"guider is {guider!r:.60}, and has to be a causal model")
    need((guider is None) == (accept == "self"), "accept self takes no guider, and the other rules "
                                                 "need one: give guider, or accept self")
    need(guider is None or guider.config.causal, "the guider has to be a causal model")
    for name in ("ratio", "accept_threshold"):
        value = how[name]
        good = isinstance(value, (int, float)) and value is not True and 0 <= value <= 1
        need(value is None or good,
             f"{name} is {value!r}, and has to be a probability, 0 to 1")
    need(type(how["speculative"]) is bool, f"speculative is {how['speculative']!r}, and has to be "
                                           "True or False")
    need(not how["speculative"] or guider is not None,
         "speculative takes the guider's tokens, so it needs a guider")
    need(window is None or isinstance(window, (tuple, list)) and len(window) == 2
         and all(type(n) is int for n in window) and window[0] >= 0 and window[1] >= 2,
         f"window is {window!r}, and has to be None, or two whole numbers: columns before the last "
         "revealed one, 0 or more, and from it on, 2 or more")
    check_lengths(how["gen_length"], how["gen_length"], how["gen_length"],
                  accept_top_k=how["accept_top_k"])

def check_together(config, how, order, most):
    """most: the tokens that a step reveals."""
    cache, remasking, threshold = how["cache"], how["remasking"], how["threshold"]
    need(not config.causal or cache == "none" and remasking == "left_to_right" and order is None,
         "a causal model writes from left to right: use cache none or autoregressive, and leave "
         "out remasking and order")
    need(threshold is None or how["steps"] is None and how["schedule"] == "llada",
         "steps and schedule have no effect with a threshold: leave them out")
    need(threshold is None or cache != "greedy",
         "the greedy cache has to know ahead what is revealed next, which under a threshold nobody "
         "knows: use another cache, or leave out the threshold")
    need(threshold is None or remasking == "low_confidence" and order is None,
         "a threshold reveals the most confident tokens first: leave out the order, and any "
         "remasking but low_confidence")
    need(cache != "greedy" or remasking in AHEAD,
         "the greedy cache has to know ahead what is revealed next: use remasking random or "
         "left_to_right, or give an order")
    need(cache != "greedy" or how["schedule"] == "llada",
         "the greedy cache runs what a step reveals, and some steps of schedule dream reveal "
         "nothing: use schedule llada")
    # caches that run only the first masks of the block can reveal only those
    name = {"window": "active", "entropy": "window"}.get(cache)
    first = how.get(name)
    need(first is None or first >= max(1, most),
         f"the {cache} cache runs the first {first} masks ({name}), and a step reveals {most or 1} "
         f"tokens: give more steps, or a larger {name}")
    need(first is None or remasking != "random",
         f"the {cache} cache runs the first {first} masks ({name}), and an order may start "
         "anywhere: use another remasking, and no order")
    need(order is None or remasking == "random",
         f"an order is given, so remasking {remasking!r} cannot decide: leave it out")

def int_lists(name, lists):
    try:
        return [[operator.index(i) for i in row] for row in lists]
    except (TypeError, ValueError):
        raise ValueError(f"{name} has to be a list of lists of whole numbers, one list per "
                         "prompt") from None

def check_prompts(config, prompts, gen_length):
    """-> prompts as lists of ints."""
    prompts = int_lists("prompts", prompts)
    need(prompts, "there is no prompt: give at least one, of at least one token")
    for j, p in enumerate(prompts):
        need(p, f"prompt {j} is empty: it needs at least one token")
        need(config.mask_id not in p,
             f"prompt {j} holds the mask id {config.mask_id}: masks are what is generated")
        need(0 <= min(p) and max(p) < config.vocab_size,
             f"prompt {j} holds an id outside 0..{config.vocab_size - 1}: "
             f"{min(p) if min(p) < 0 else max(p)}")
        need(len(p) + gen_length <= config.max_len,
             f"prompt {j} has {len(p)} tokens, which with gen_length {gen_length} is more than the "
             f"model's {config.max_len}")
    return prompts

def check_order(order, prompts, gen_length, L):
    """-> order as lists of ints."""
    order = int_lists("order", order)
    need(len(order) == len(prompts), f"order has {len(order)} lists, and has to have one for each "
                                     f"of the {len(prompts)} prompts")
    for j, (row, p) in enumerate(zip(order, prompts)):
        P = len(p)
        for lo in range(0, gen_length, L):
            block = list(range(P + lo, P + lo + L))
            need(len(row) == gen_length and sorted(row[lo:lo + L]) == block,
                 f"order {j} has to hold each of the positions {P}..{P + gen_length - 1} once, "
                 f"block after block: its entries {lo}..{lo + L - 1} are not the positions "
                 f"{block[0]}..{block[-1]}")
    return order

def check_generators(generator, B):
    """-> the generator (or None) of each prompt."""
    given = list(generator) if isinstance(generator, (list, tuple)) else [generator] * B
    need(len(given) == B and all(g is None or isinstance(g, torch.Generator) for g in given),
         f"generator has to be a torch.Generator, or a list of them for the {B} prompts")
    return given
