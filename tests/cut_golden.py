"""Cuts tests/golden.npz out of traces of the authors' code (horseee/dKV-Cache @ 49a76fc) on a tiny
LLaDA with random weights. These are not part of this repository. Needs safetensors.

python tests/cut_golden.py ../shared/golden

Kept: the weights, two plain forwards, every case whose tokens do not depend on torch's random
stream and that shows no quirk of that code, and the logits of a few steps of each kind of case."""
import json
import pathlib
import sys

import numpy as np

KEPT = ("name", "algorithm", "args", "prompt", "order", "steps", "final", "step_logits_keys")

def main(source, target=pathlib.Path(__file__).parent / "golden.npz"):
    from safetensors.numpy import load_file
    source, target = pathlib.Path(source), pathlib.Path(target)
    doc = json.loads((source / "cases.json").read_text())
    logits = load_file(source / "logits.safetensors")
    cases = [{k: c[k] for k in KEPT} for c in doc["cases"]
             if not {"quirk", "informational"} & set(c["tags"])]
    arrays, seen = {"config": (source / "llada-tiny" / "config.json").read_text()}, set()
    for c in cases:  # logits of the first case of each kind, of its first two recorded steps
        kind = (c["algorithm"], c["args"]["cfg_scale"] > 0, len(c["prompt"]))
        keys = dict(list(c["step_logits_keys"].items())[:2]) if kind not in seen else {}
        seen |= {kind} if keys else set()
        c["step_logits_keys"] = keys
        arrays |= {f"logits.{k}": logits[k] for k in keys.values()}
    forwards = [{"input_ids": f["input_ids"], "logits": f["logits_key"]}
                for f in doc["forward_cases"] if f["name"] in ("b1_t24", "b2_t32")]
    arrays |= {f"logits.{f['logits']}": logits[f["logits"]] for f in forwards}
    arrays["cases"] = json.dumps({"cases": cases, "forwards": forwards}, separators=(",", ":"))
    for shard in sorted((source / "llada-tiny").glob("*.safetensors")):
        arrays |= {f"weight.{k}": v for k, v in load_file(shard).items()}
    np.savez_compressed(target, **{k: np.frombuffer(v.encode(), np.uint8) if isinstance(v, str)
                                   else v for k, v in arrays.items()})
    print(f"{target}: {len(cases)} cases, {target.stat().st_size / 1e6:.2f} MB")

if __name__ == "__main__":
    main(*sys.argv[1:])
