"""Cuts tests/golden.npz out of traces of published code on a tiny LLaDA with random weights. These
are not part of this repository. Needs safetensors.

python tests/cut_golden.py ../shared

    golden             horseee/dKV-Cache @ 49a76fc: no cache, Decode, Greedy
    golden_neighbours  vhicrgit/Window-Diffusion @ d8bb349, NVlabs/Fast-dLLM @ 24cc59e; and, in a
                       file of its own, EntropyCache as we read it, which has no published code
    golden_flash       ZhanqiuHu/flash-dlm-experimental @ 387beab: FreeCache

Kept: the weights, two plain forwards, every case whose tokens do not depend on torch's random
stream and that shows no quirk of that code, and the logits of a few steps of each kind of case.
Steps that reveal nothing are left out, and so are runs with more steps than tokens, and FreeCache's
own rule for the end of a text."""
import json
import pathlib
import sys

import numpy as np

SETS = {"golden": "cases.json", "golden_neighbours": "cases.json", "golden_flash": "cases.json",
        "our_reading": "cases_entropy_reading.json"}
CACHES = {"baseline": "none", "window_diffusion": "window", "entropy_cache": "entropy"}
SAME = ("gen_length", "block_length", "steps", "threshold", "cfg_scale", "tau", "recent", "window")
NAMES = {"cache_reloading_step": "refresh", "refresh_cycle": "refresh", "window_size": "window",
         "window_tokens": "window", "active_tokens": "active"} | {name: name for name in SAME}

def common(c, prefix):
    """A case of any set: `how` are generate's settings, and the order that of generate."""
    how = {NAMES[k]: v for k, v in c["args"].items() if k in NAMES and v is not None}
    if k := c["args"].get("k"):
        how["steps"] = how["gen_length"] // k
    if "threshold" in how:
        how.pop("steps", None)
    cache = c["algorithm"].removeprefix("fastdllm_")
    steps = [{name: s[name] for name in ("fed", "unseen", "transfers") if s.get(name)}
             for s in c["steps"] if any(s["transfers"])]
    for s in steps:
        if "fed" in s and isinstance(s["fed"][0], int):  # [lo, hi]
            s["fed"] = [list(range(*s["fed"]))]
    return dict(name=prefix + c["name"], how=dict(how, cache=CACHES.get(cache, cache)),
                prompt=c["prompt"], steps=steps, final=c["final"], logits=c["step_logits_keys"],
                order=c["order"] and [sum(blocks, []) for blocks in zip(*c["order"])])

def wanted(c):
    a = c["args"]
    return not ({"quirk", "informational"} & set(c["tags"]) or a.get("early_stop")
                or a.get("steps", 0) > a["gen_length"] or c.get("layout") == "dream"
                or c.get("layout") == "llada" and c["algorithm"] == "none")  # as in golden

def main(source, target=pathlib.Path(__file__).parent / "golden.npz"):
    from safetensors.numpy import load_file
    source, target = pathlib.Path(source), pathlib.Path(target)
    golden, docs, logits = source / "golden", {}, {}
    for name, file in SETS.items():
        folder = source / ("golden_neighbours" if name == "our_reading" else name)
        docs[name] = json.loads((folder / file).read_text())
        logits |= load_file(folder / "logits.safetensors")
    cases = [common(c, "our_reading_of_" * (name == "our_reading"))
             for name, doc in docs.items() for c in doc["cases"] if wanted(c)]
    arrays, seen = {"config": (golden / "llada-tiny" / "config.json").read_text()}, set()
    for c in cases:  # logits of the first case of each kind, of its first two recorded steps
        kind = (c["how"]["cache"], c["how"].get("cfg_scale", 0) > 0, len(c["prompt"]))
        c["logits"] = dict(list(c["logits"].items())[:2]) if kind not in seen else {}
        seen |= {kind} if c["logits"] else set()
        arrays |= {f"logits.{k}": logits[k] for k in c["logits"].values()}
    forwards = [{"input_ids": f["input_ids"], "logits": f["logits_key"]}
                for f in docs["golden"]["forward_cases"] if f["name"] in ("b1_t24", "b2_t32")]
    arrays |= {f"logits.{f['logits']}": logits[f["logits"]] for f in forwards}
    arrays["cases"] = json.dumps({"cases": cases, "forwards": forwards}, separators=(",", ":"))
    for shard in sorted((golden / "llada-tiny").glob("*.safetensors")):
        arrays |= {f"weight.{k}": v for k, v in load_file(shard).items()}
    np.savez_compressed(target, **{k: np.frombuffer(v.encode(), np.uint8) if isinstance(v, str)
                                   else v for k, v in arrays.items()})
    print(f"{target}: {len(cases)} cases, {target.stat().st_size / 1e6:.2f} MB")

if __name__ == "__main__":
    main(*sys.argv[1:])
