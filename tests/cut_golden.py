"""Cuts tests/golden.npz out of traces of published code on tiny models. These are not part of this
repository. Needs safetensors.

python tests/cut_golden.py ../shared

    golden, golden_dream  horseee/dKV-Cache @ 49a76fc
    golden_neighbours     vhicrgit/Window-Diffusion @ d8bb349, NVlabs/Fast-dLLM @ 24cc59e; and, in a
                          file of its own, EntropyCache as we read it, which has no published code
    golden_flash          ZhanqiuHu/flash-dlm-experimental @ 387beab: FreeCache, Guided Diffusion

Kept: the weights, plain forwards, every case whose tokens do not depend on torch's random stream
and that shows no quirk of that code, and the logits of a few steps of each kind of case. README.md
says what is left out."""
import json
import pathlib
import sys

import numpy as np

# whose files, which models, and our names of caches, settings and orders
TRACES = json.loads(pathlib.Path(__file__).with_name("texts.json").read_text())["traces"]
SETS, MODELS, CACHES, NAMES, ORDERS = TRACES.values()

def settings(c):
    """generate's settings"""
    a = c["args"]
    how = {NAMES[k]: v for k, v in a.items() if k in NAMES and v is not None}
    cache = c["algorithm"].removeprefix("fastdllm_")
    how["cache"] = CACHES.get(cache, cache)
    if how["cache"] == "guided":
        rule, G, speculative = a["sampling_strategy"], a["gen_length"], cache == "speculative"
        window = (0, G) if a["aggressive_caching"] else a["window"] and [a["window"]] * 2
        return dict(cache="guided", gen_length=G, accept=rule, accept_top_k=a["acceptance_top_k"],
                    ratio=a["top_p"], accept_threshold=a["confidence_threshold"], window=window,
                    speculative=speculative, stop_at_eos=not speculative)
    if "alg" in a:
        how |= dict(schedule="dream", remasking=ORDERS[a["alg"]])
        if c["algorithm"] == "none":  # Dream's own sampler has no blocks
            how.pop("block_length", None)
    if k := a.get("k"):
        how["steps"] = how["gen_length"] // k
    if "threshold" in how:
        how.pop("steps", None)
    return how

def common(c, prefix, models):
    """A case of any set: `how` are generate's settings, and the order that of generate. Columns are
    those of the prompts without padding."""
    how, steps, P = settings(c), [], len(c["prompt"][0])
    pads = [row.count(0) for row in c.get("attention_mask") or [[1]] * len(c["prompt"])]
    for s in c["steps"]:
        if not any(s["transfers"]) and how.get("schedule") != "dream":
            continue
        s = {name: s[name] for name in ("fed", "unseen", "filled", "transfers") if s.get(name)}
        if isinstance(s.get("fed", [[]])[0], int):  # [lo, hi], and what comes after is not attended
            s |= {"fed": [list(range(*s["fed"]))],
                  "unseen": [list(range(s["fed"][1], P + how["gen_length"]))]}
        for row, pad in enumerate(pads):
            s["transfers"][row] = [[q - pad, token] for q, token in s["transfers"][row]]
            if "fed" in s:
                s["fed"][row] = [q - pad for q in s["fed"][row] if q >= pad]
        steps.append(s)
    logits = {} if any(pads) or how["cache"] == "guided" else c["step_logits_keys"]
    return dict(name=prefix + c["name"], how=how, steps=steps, logits=logits, **models,
                prompt=[p[pad:] for p, pad in zip(c["prompt"], pads)],
                final=[x[pad:] for x, pad in zip(c["final"], pads)],
                order=c.get("order") and [sum(blocks, []) for blocks in zip(*c["order"])])

def wanted(c):
    a = c["args"]
    if {"quirk", "informational"} & set(c["tags"]) or a.get("early_stop"):
        return False
    if "alg" in a:  # Dream
        return (a["alg"] in ORDERS and not a["temperature"] and a["eps"] == 1e-3
                and a.get("shift_type") != "un_right")
    return a.get("steps", 0) <= a["gen_length"] and not (
        c.get("layout") == "llada" and c["algorithm"] == "none")  # as in golden

def main(source, target=pathlib.Path(__file__).parent / "golden.npz"):
    from safetensors.numpy import load_file
    source, target = pathlib.Path(source), pathlib.Path(target)
    cases, forwards, logits, arrays, seen = [], [], {}, {}, set()
    for set_name, file in SETS.items():
        folder = source / ("golden_neighbours" if set_name == "our_reading" else set_name)
        doc = json.loads((folder / file).read_text())
        usual, prefix = "dream" if set_name == "golden_dream" else "llada", f"{set_name}."
        logits |= {prefix + k: v for k, v in load_file(folder / "logits.safetensors").items()}

        def model(name):
            return usual if name in (None, "llada-tiny") else name
        for f in doc.get("forward_cases", []):
            if usual == "dream" or "model" in f or f["name"] in ("b1_t24", "b2_t32"):
                forwards.append(dict(
                    model=model(f.get("model")), causal=f.get("causal", False),
                    input_ids=f["input_ids"], logits=prefix + f["logits_key"],
                    pad=[row.count(0) for row in f.get("attention_mask") or []]))
        for c in filter(wanted, doc["cases"]):
            c["step_logits_keys"] = {i: prefix + k for i, k in c["step_logits_keys"].items()}
            cases.append(common(c, "our_reading_of_" * (set_name == "our_reading"), dict(
                model=model(c.get("model")), guider=c.get("guider"))))
    for c in cases:  # logits of the first case of each kind, of its first two recorded steps
        kind = (c["model"], c["how"]["cache"], c["how"].get("cfg_scale", 0) > 0, len(c["prompt"]))
        c["logits"] = dict(list(c["logits"].items())[:2]) if kind not in seen else {}
        seen |= {kind} if c["logits"] else set()
    arrays |= {f"logits.{k}": logits[k] for c in cases for k in c["logits"].values()}
    arrays |= {f"logits.{f['logits']}": logits[f["logits"]] for f in forwards}
    for name, folder in MODELS.items():
        arrays[f"config.{name}"] = (source / folder / "config.json").read_text()
        for shard in sorted((source / folder).glob("*.safetensors")):
            arrays |= {f"weight.{name}.{k}": v for k, v in load_file(shard).items()}
    arrays["cases"] = json.dumps({"cases": cases, "forwards": forwards}, separators=(",", ":"))
    np.savez_compressed(target, **{k: np.frombuffer(v.encode(), np.uint8) if isinstance(v, str)
                                   else v for k, v in arrays.items()})
    print(f"{target}: {len(cases)} cases, {target.stat().st_size / 1e6:.2f} MB")

if __name__ == "__main__":
    main(*sys.argv[1:])
