"""Which runs sample.py makes, from its flags and from what the checkpoint says of itself."""
import sys

from caches import LOOPS
from support.processes import ranks
from support.settings import check, loop_settings
from support.watch import name

def lengths(args, extra):
    """-> tokens of an answer and of a block: the flags', else the checkpoint's where they fit."""
    G = extra.get("gen_length", 128) if args.gen_length is None else args.gen_length
    L = extra.get("block_length", G) if args.block_length is None else args.block_length
    fits = args.block_length is not None or L and G % L == 0
    return G, L if fits else G

def plan(args, config, extra, guider=None):
    """-> [(settings for generate, number of the run it is compared with)]. Of several caches each
    is compared with none under the same rule. Those that cannot follow the rule are named."""
    G, L = lengths(args, extra)
    by_steps = args.threshold is None
    steps = G if by_steps and args.steps is None else args.steps
    # greedy has to know ahead what comes next, so it follows the order that suits the model
    known = extra.get("known_order", "random")
    shared = {s: getattr(args, s) for s in ("threshold", "temperature", "top_p", "top_k",
                                            "cfg_scale", "stop_at_eos", "suppress_eos")}
    schedule = args.schedule or (extra.get("schedule", "llada") if by_steps else "llada")
    usual = "left_to_right" if config.causal else (
        extra.get("remasking", "low_confidence") if by_steps else "low_confidence")
    # a refresh that no block reaches never happens
    given = {s: G if (s, v) == ("refresh", "never") else v for s, v in args.own.items()}
    given |= {"guider": guider} if guider else {}
    caches = args.caches
    if config.causal and (args.unnamed or len(caches) > 1):
        caches = ["none", "autoregressive"][-len(caches):]

    def settings(cache, order=None, **more):
        order = args.remasking or order or (known if cache == "greedy" else usual)
        blocks = dict(steps=steps, block_length=L, remasking=order, schedule=schedule)
        if cache in ("autoregressive", "guided"):  # they take what the user gives, to refuse it
            blocks = {s: getattr(args, s) for s in blocks if getattr(args, s) is not None}
        # a loop refuses settings that it lacks
        own = {s: v for s, v in given.items() if s in loop_settings(LOOPS[cache], {})}
        return check(config, LOOPS, cache=cache, gen_length=G, **shared | blocks | own | more)

    if len(caches) == 1:
        return [(settings(*caches), None)]
    runs, left = [], []

    def add(cache, order=None, base=None, **more):
        try:
            how = settings(cache, order, **more)
        except ValueError as e:
            # wrong for all, or a value that the user gave
            if cache == "none" or str(e).split()[0] in given:
                raise
            return left.append(f"{cache} ({str(e).partition(':')[0]})")
        names, same = [name(how) for how, _ in runs], name(how | {"cache": "none"})
        runs.append((how, names.index(same) if same in names else base))

    table = not (args.json or args.out)  # files are for machines, which can compare what they like
    if table and not by_steps:
        add("none", threshold=None, steps=G)
    add("none", base=0 if runs else None)
    for cache in caches[1:]:
        if (cache, schedule) == ("greedy", "llada") and table and by_steps and not args.remasking:
            add("none", known)
        add(cache, base=0)
        if cache == "freecache" and "delay" not in given:  # as published, and with the delay
            add(cache, base=0, delay=True)
    # the rival: half the steps save as much without any cache. They have to fit the blocks
    by_steps = by_steps and not config.causal
    if table and by_steps and steps % 2 == 0 and steps // 2 % (G // L) == 0:
        add("none", base=0, steps=steps // 2)
    plain = (args.remasking or usual, schedule) == ("low_confidence", "llada")
    if args.cache == "demo" and by_steps and plain:  # a threshold takes no other order
        for cache in "none", "local":
            add(cache, base=0, threshold=0.99, steps=None)
    if left and ranks()[0] == 0:
        print(f"note: left out: {'; '.join(left)}", file=sys.stderr)
    return runs

def note_lengths(how, extra):
    """Says on stderr that the model was trained on answers of another length."""
    G, L = how["gen_length"], how["block_length"] or how["gen_length"]
    trained, usual = extra.get("gen_length", G), extra.get("block_length", L)
    if G != trained and ranks()[0] == 0:
        print(f"note: the model was trained on answers of {trained} tokens in blocks of {usual}; "
              f"expect more errors with {G} in blocks of {L}", file=sys.stderr)
