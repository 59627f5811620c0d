"""Random settings and broken input. Each case has to work or to be refused in one sentence.

python tests/campaigns/fuzz.py generate      1,000 settings of generate, see tests/invariants.py
python tests/campaigns/fuzz.py checkpoints   300 broken checkpoint files for sample.py
python tests/campaigns/fuzz.py converter     100 broken config.json and tokenizer.json
python tests/campaigns/fuzz.py commands      200 command lines for sample.py and train_tiny.py
python tests/campaigns/fuzz.py prompts       1,000 strings of bytes as prompts

--first 7 --n 1 runs case 7 only. Case i is drawn from (--seed, i) alone: a failure is printed with
the line that repeats it. All but `generate` run in a fork with limits: 10 s of processor time, 1 GB
of memory; some run in a process of their own. Converter needs requirements-llada.txt. Linux only.
"""
import argparse
import collections
import copy
import functools
import json
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import zipfile

import torch
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # tests/
from conftest import ENDLESS, ROOT, byte_model, fork, random_model, scripts  # noqa: E402
from invariants import check_invariants, draw_scenario  # noqa: E402

from model import load, save  # noqa: E402
from support.checkpoint import read  # noqa: E402
from support.cli import launch, printable  # noqa: E402

tqdm.monitor_interval = 0  # its thread would not survive a fork
SECONDS, MEMORY = 10, 2**30

def attempt(box, script, argv=(), stdin=b"", own=False, seconds=SECONDS, job=None):
    """The script with these flags (or a job that replaces its main), in a fork with limits or (own)
    in a new interpreter -> the sentence that refuses the input or None, and what it prints."""
    box.line, job = [script, *argv], job or (lambda: main(argv))
    main, files = scripts()[script].main, [box.path / name for name in ("out", "err", "in")]
    files[2].write_bytes(stdin)
    here = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def limited():
        for what, limit in (("CPU", seconds), ("AS", 8 * MEMORY), ("CORE", 0)):
            resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (limit, limit))
        signal.alarm(200)  # for a job that waits
        if own:
            os.execv(sys.executable, [sys.executable, ROOT / script, *map(os.fsencode, argv)])
        sys.argv = box.line
        launch(job)
    _, status, usage = os.wait4(fork(limited, *files, box.work), 0)
    code, peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
    if code < 0:
        code = f"killed by {signal.Signals(-code).name}, limit {seconds} s of processor time"
    elif peak > max(MEMORY, here + MEMORY // 2):
        code = f"took {peak / 2**30:.1f} GB"
    out, err = (path.read_bytes().decode(errors="surrogateescape") for path in files[:2])
    return verdict(script, code, err, longest=600 + 2 * len("".join(argv))), out

def verdict(script, code, err, longest):
    """-> the sentence that refuses the input, None if it works. Everything else is a fault."""
    bar = script != "sample.py"  # the others have a progress bar
    # the lines that tiktoken's Rust prints cannot be avoided from here
    err = re.sub(r"(?ms)^thread '.*?' \(\d+\) panicked.*?(?=^(sample|convert)\.py: )", "", err)
    err = re.sub(r"(?m)^note: .*\n", "", err)
    assert code in (0, 2) and "Traceback" not in err, f"{code}: {err[-3000:]}"
    if code == 0:
        assert bar or not err, f"it worked, and stderr has {err[-3000:]!r}"
        return None
    lines = [line for line in re.split(r"[\r\n]", err) if line.startswith(f"{script}: ")]
    one = len(lines) == 1 and err.endswith("\n") and (bar or err.count("\n") == 1)
    assert one, f"not one sentence: {err[-3000:]!r}"
    sentence = lines[0].split(": ", 1)[1]
    assert sentence and sentence == printable(sentence) and len(sentence) < longest, \
        f"not a sentence for a terminal: {sentence[:3000]!r}"
    limit = script != "train_tiny.py" and re.search("MemoryError|alloc|enough memory", sentence)
    assert not limit, f"only a limit has stopped it: {sentence}"
    known = re.search("does not fit together|cannot load|is damaged", sentence)
    internal = "object has no|hashable|NoneType|unpack|takes \\d|iterable|subscriptable|int_max"
    assert known or not re.search(internal, sentence), f"not a sentence for a user: {sentence}"
    return sentence

TABLES = json.loads(pathlib.Path(__file__).with_name("junk.json").read_text(encoding="utf-8"))

def texts(name):
    """A table of junk.json. Long texts are there in parts: [["ab", 1], ["c", 5000]]."""
    table = TABLES[name].values() if isinstance(TABLES[name], dict) else TABLES[name]
    return [t if isinstance(t, str) else "".join(part * n for part, n in t) for t in table]

def content(name, rng):
    """One of the table, as bytes."""
    return rng.choice(texts(name)).encode("latin1")

JSON_JUNK = [*TABLES["values"], "x" * 5000]
JUNK = [*JSON_JUNK, b"x", (), ENDLESS, torch.zeros(0), torch.ones(2), torch.tensor(3)]
METHODS = "int bool cfloat half double bfloat16 to_sparse tolist sum".split()
TENSORS = [*(getattr(torch.Tensor, name) for name in METHODS), torch.nn.Parameter,
           lambda w: w.mT.clone() if w.dim() == 2 else w[None], lambda w: w[:0].clone(),
           lambda w: w.mT if w.dim() == 2 else w, lambda w: torch.ones(1).expand(w.shape),
           lambda w: w.to("meta"), lambda w: w.to(torch.float8_e4m3fn)]
PATTERNS, WORDS = texts("patterns"), texts("words")

def altered(value, rng):
    if isinstance(value, str):
        broken = break_bytes(value.encode(errors="replace"), rng).decode("latin1")
        return rng.choice([rng.choice(PATTERNS), broken, value.replace("7", "9" * 5000),
                           value + "QUJD 99999\n"])
    return rng.choice(TENSORS)(value) if isinstance(value, torch.Tensor) \
        else rng.choice(TABLES["numbers"])

def break_tree(node, rng, junk):
    """Replaces, alters, drops, adds or renames something in nested dicts and lists, in place."""
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    old = node[key]
    if isinstance(old, (dict, list)) and old and rng.random() < 0.75:
        return break_tree(old, rng, junk)
    if rng.random() < 0.9:
        del node[key]
    new = rng.choice([*2 * [copy.deepcopy(rng.choice(junk))], altered(old, rng), copy.copy(old)])
    odd = rng.choice([*node, *(j for j in junk if isinstance(j, (str, bytes, int, tuple)))])
    where = key if isinstance(node, list) or rng.random() < 0.8 else odd
    if rng.random() < 0.9:
        node.insert(key, new) if isinstance(node, list) else node.update({where: new})
    if node and rng.random() < 0.25:
        break_tree(node, rng, junk)

def break_bytes(raw, rng):
    """Flips, zeroes, inserts or cuts bytes, or writes a length."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, n = rng.randrange(max(1, len(raw))), rng.choice([1, 4, 64, 1000])
        flipped = bytes(b ^ 1 << rng.randrange(8) for b in raw[at:at + 1])
        length = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1]).to_bytes(4, "little")
        old, new = rng.choice([*[(1, flipped)] * 3, (n, bytes(n)), (0, rng.randbytes(n)), (n, b""),
                               (4, length)])
        raw[at:at + old] = new
    return bytes(raw)

def call(*call):
    """-> an object whose pickle is a call."""
    return type("Call", (), {"__reduce__": lambda self: (call[0], call[1:])})()

def attacks(canary):
    """Pickles that would write the file canary, and others that call what they should not."""
    touch = f"open({canary!r}, 'w').close()"
    return [call(*attack) for attack in [
        (os.system, f"touch {canary}"), (exec, touch), (eval, touch), (open, canary, "w"),
        (os.popen, f"touch {canary}"), (os.mkdir, canary), (torch.save, 1, canary),
        (torch.load, canary), (torch.hub.load, "a/b", "c"), (__import__, "os"), (copy.copy, 1),
        (functools.partial, os.system), (type, "A", (), {}), (compile, touch, "x", "exec"),
        (getattr, "x", "upper"), (pickle.loads, pickle.dumps(call(exec, touch)))]]

class Box:
    """A folder for one campaign, and the sound files that its cases break."""
    def __init__(self, path):
        self.path, self.line = pathlib.Path(path), ""  # line: the last one that was run
        self.work, self.canary = self.path / "work", self.path / "canary"
        self.broken, self.good = self.work / "broken.pt", self.path / "good.pt"
        self.work.mkdir()
        model, tokenizer = byte_model()
        model.extra |= {"gen_length": 8, "block_length": 4, "known_order": "left_to_right",
                        "problems": [("one?", "1"), ("two?", "2")]}
        save(self.good, model, tokenizer)
        save(self.path / "bare.pt", random_model(dtype=torch.float32, n_layer=1))
        self.raw = self.good.read_bytes()
        with zipfile.ZipFile(self.good) as z:
            self.records = {name: z.read(name) for name in z.namelist()}
        self.index = next(name for name in self.records if name.endswith("data.pkl"))

    def clean(self):
        shutil.rmtree(self.work)
        self.work.mkdir()

def zipped(box, new):
    """The checkpoint with other records, without those that are None; huge ones are packed."""
    with zipfile.ZipFile(box.broken, "w") as z:
        for name, raw in (box.records | new).items():
            if raw is not None:  # ZipInfo: no time of day
                z.writestr(zipfile.ZipInfo(name), raw, zipfile.ZIP_DEFLATED * (len(raw) > 2**25))

def record(box, rng):
    (name, old), (_, other) = rng.choices(list(box.records.items()), k=2)
    zipped(box, {name: rng.choice([None, None, b"", b"x", old[:-1], old + b"x", other])})

def tree(box, rng, *parts):
    """Breaks what was saved, or one of its parts."""
    data = read(box.good)
    break_tree(data[rng.choice(parts)] if parts else data, rng, JUNK)
    torch.save(data, box.broken)

def numbers(box, rng):
    """A weight with other numbers is a weight."""
    weights = rng.sample([(k, len(raw)) for k, raw in box.records.items() if "/data/" in k], 3)
    zipped(box, {k: rng.choice([rng.randbytes(n), content("floats", rng) * (n // 4)])
                 for k, n in weights})

def tokens(box, rng):
    """As many as fit. Their eight digits are base64."""
    data, last = read(box.good), 10**6 + rng.choice([500_000, 1_200_000])
    data["tokenizer"]["ranks"] += "".join(f"{k:08} {k}\n" for k in range(10**6, last))
    torch.save(data, box.broken)

def code(box, rng):
    attack, protocol = rng.choice(attacks(str(box.canary))), rng.randrange(6)
    pickled = pickle.dumps(attack, protocol)
    where = rng.choice(["", box.index, "extra", "x", "tokenizer"])
    if where == "":
        box.broken.write_bytes(pickled)
    elif where == box.index:
        zipped(box, {where: pickled})
    else:  # torch saves with protocol 2 or later
        torch.save(read(box.good) | {where: attack}, box.broken, pickle_protocol=max(2, protocol),
                   _use_new_zipfile_serialization=where != "x")

def bomb(box, rng):
    """A file that unpacks to gigabytes, or names the index as only torch reads it."""
    more = rng.choice([
        {"data/0": bytes(2**28)}, {"data.pkl": b"\x80\x02" + b"]" * 2**26 + b"."},
        {"data.pkl": None, "DATA.PKL": content("pickles", rng)}, dict.fromkeys(range(60_000), b"")])
    zipped(box, {box.index.replace("data.pkl", str(k)): raw for k, raw in more.items()})

def foreign(box, rng):
    """Files that other programs make, a folder, a link to itself."""
    some, linear, path = {"a.weight": torch.ones(3, 4)}, torch.nn.Linear(3, 4), box.broken
    objects = [some, torch.ones(3), {"state_dict": some, "epoch": 3}, list(some.values()), 7,
               read(box.good) | {"format": "dkv-min 2"}, linear]
    raw = [(ROOT / "tests" / "golden.npz").read_bytes(), *(content("files", rng) for _ in range(6))]
    rng.choice([
        *(functools.partial(torch.save, o, path) for o in objects),
        *(functools.partial(path.write_bytes, r) for r in raw),
        lambda: torch.jit.save(torch.jit.trace(linear, torch.ones(1, 3)), path),
        lambda: torch.save(objects[0], path, _use_new_zipfile_serialization=False),
        path.mkdir, lambda: path.symlink_to(path)])()

KINDS = {  # index: the pickle of the zip. directory: the end of the file, with the zip's lengths
    "truncated": lambda box, rng: box.broken.write_bytes(box.raw[:rng.randrange(len(box.raw))]),
    "bytes": lambda box, rng: box.broken.write_bytes(break_bytes(box.raw, rng)),
    "directory": lambda box, rng: box.broken.write_bytes(
        box.raw[:-1200] + break_bytes(box.raw[-1200:], rng)),
    "index": lambda box, rng: zipped(box, {box.index: break_bytes(box.records[box.index], rng)}),
    "lengths": lambda box, rng: zipped(box, {box.index: content("pickles", rng)}),
    "values": lambda box, rng: tree(box, rng, "config", "tokenizer", "extra"),
    "tree": lambda box, rng: tree(box, rng, *rng.choice([[], ["weights"]])), "foreign": foreign,
    "records": record, "numbers": numbers, "tokens": tokens, "code": code, "bombs": bomb}

def checkpoints_case(rng, i, box):
    kind, own = list(KINDS)[i % len(KINDS)], i % 10 == 9
    KINDS[kind](box, rng)
    argv = ["--ckpt", str(box.broken), *rng.choice(TABLES["runs"]).split()]
    sentence, _ = attempt(box, "sample.py", argv, b"hello\n/quit\n", own)
    assert not box.canary.exists(), "code from the file was run"
    assert os.listdir(box.work) == ["broken.pt"], f"files appeared: {os.listdir(box.work)}"
    assert kind != "numbers" or sentence is None, f"other numbers in a weight: {sentence}"
    return f"{kind}{', own process' * own}", sentence

def converter_case(rng, i, box):
    hub, folder, out = box.path / "hub", box.work / "hf", box.work / "out.pt"
    if not hub.exists():
        from scripts.fake_hub import main as fake
        small = [str(hub), *"--width 16 --heads 2 --layers 1 --vocab 300".split()]
        attempt(box, "convert.py", job=lambda: fake(small))
        whole = attempt(box, "convert.py", [str(hub), "--out", str(box.path / "hub.pt")])
        assert whole[0] is None, whole
    path = shutil.copytree(hub, folder) / ("tokenizer.json", "config.json")[i % 2]
    raw, doc = path.read_bytes(), json.loads(path.read_bytes())
    how = rng.choice(["tree"] * 5 + ["bytes", "text"] + ["pattern"] * 2 * (i % 2 == 0))
    if how == "tree":
        break_tree(doc, rng, JSON_JUNK)
    elif how == "pattern":
        doc["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = rng.choice(PATTERNS)
    other = [*[content("documents", rng)] * 2, b"\xef\xbb\xbf" + raw, raw[:rng.randrange(len(raw))],
             raw.decode().encode("utf-16"), raw + b"}", raw.replace(b"true", b"NaN")]
    new = {"bytes": break_bytes(raw, rng), "text": rng.choice(other)}
    path.write_bytes(new.get(how, json.dumps(doc).encode()))
    sentence, _ = attempt(box, "convert.py", [str(folder), "--out", str(out)])
    left = set(os.listdir(box.work)) - {"hf"}
    assert left == (set() if sentence else {"out.pt"}), f"files: {left}, after {sentence}"
    for prompt in () if sentence else (["--ids", "5,6"], ["--prompt", "a" * 60, "--raw"]):
        argv = ["--ckpt", str(out), "--gen-length", "4", *prompt]
        assert attempt(box, "sample.py", argv)[0] is None, "it is converted, and does not answer"
    return f"{path.name}, {how}", sentence

def resumed(rng, box):
    """-> the flags that resume from a broken FILE.train of two steps."""
    whole = box.path / "t.pt.train"
    if not whole.exists():
        argv = [*TABLES["training"].split(), "--out", str(box.path / "t.pt")]
        assert attempt(box, "train_tiny.py", argv, seconds=60)[0] is None
    state = read(whole)
    break_tree(rng.choice([state, state["args"], state["args"]]), rng,
               [j for j in JUNK if not isinstance(j, int) or abs(j) > 3])
    torch.save(state, box.work / whole.name)
    if rng.random() < 0.2:
        (box.work / whole.name).write_bytes(break_bytes(whole.read_bytes(), rng))
    return "--resume --out t.pt --eval 0 --device cpu --threads 1 --amp off".split()

def commands_case(rng, i, box):
    inputs = {"p.txt": b"one\ntwo\n", "p.jsonl": b'{"prompt": "one"}\n',
              "my.txt": b"Five little ducks went out to play. " * 200,
              "bad.jsonl": content("prompt files", rng), "bad.txt": content("texts", rng)}
    for name, raw in inputs.items():
        (box.work / name).write_bytes(raw)
    for name in ("good.pt", "bare.pt"):
        (box.work / name).symlink_to(box.path / name)
    script, own = ("sample.py", "train_tiny.py")[i % 4 == 0], i % 20 in (4, 9)
    argv = TABLES["training" if i % 4 == 0 else "answering"].split()
    # any flags of the script, with good values or any words; switches have none
    known = re.findall(r'add_argument\("(--[a-z-]+)"', (ROOT / script).read_text())
    for flag in rng.choices([*known, "--help", "--pro"], k=rng.choice([0, 1, 1, 2, 3, 5])):
        good = TABLES["flags"].get(flag, [])
        values = good if rng.random() < 0.75 else WORDS
        argv += [flag, *map(str, rng.sample(values, k=min(1, len(good))))]
    argv += rng.sample(WORDS, k=rng.choice([0, 0, 0, 0, 0, 1]))
    argv = resumed(rng, box) if i % 16 == 0 else argv
    stdin = rng.choice([b"", b"hello\n", b"/reset\n\xff\n/quit\n", rng.randbytes(30)])
    return f"{script}{', own process' * own}", attempt(box, script, argv, stdin, own, 60)[0]

def prompts_case(rng, i, box):
    """No control character may reach the terminal."""
    raw = b"".join(rng.choice([content("pieces", rng), rng.randbytes(rng.choice([1, 3, 20]))])
                   for _ in range(rng.choice([0, 1, 2, 4, 8])))
    if rng.random() < 0.4:  # more text than bytes
        raw = raw.decode(errors="ignore").encode()
    how = ["--prompt", "p.txt", "p.jsonl", "object.jsonl", "stdin", "chat"][i % 6]
    argv = {"--prompt": ["--prompt=" + os.fsdecode(raw.replace(b"\x00", b""))], "chat": ["--chat"],
            "stdin": ["--prompts", "-"]}.get(how, ["--prompts", how])
    line = json.dumps({"prompt": raw.decode("latin1")}).encode() + b"\n"
    (box.work / how).write_bytes(line if how == "object.jsonl" else raw)
    if how != "chat":
        argv += rng.choice([["--json"], [], [], ["--watch", "0"], ["--out", "o.jsonl"]])
    argv += [*TABLES["prompting"].split(), "--seed", str(i)]
    sentence, out = attempt(box, "sample.py", argv, raw)
    assert all(c == "\n" or c.isprintable() for c in out), f"the terminal gets {out!r}"
    file, (model, tokenizer) = box.work / "o.jsonl", load(box.good)
    answers = file.read_text() if file.exists() else out if "--json" in argv else ""
    for o in map(json.loads, answers.splitlines()):
        given = tokenizer.decode(o["prompt_ids"])
        assert given == o["prompt"] + "\n", f"the model got {given!r} for {o['prompt']!r}"
        assert len(o["ids"]) == 12 and max(o["ids"]) < model.config.n_vocab, o["ids"]
        assert model.config.mask_id not in o["ids"], o["ids"]
    return how, sentence

def generate_case(rng, i, box):
    s = draw_scenario(rng)
    check_invariants(s)
    return f"{s.how['cache']}{', 1 layer' * (s.model.config.n_layer == 1)}", None

CAMPAIGNS = {"generate": (1000, generate_case), "checkpoints": (300, checkpoints_case),
             "converter": (100, converter_case), "commands": (200, commands_case),
             "prompts": (1000, prompts_case)}

def campaign(name, n=0, seed=0, first=0):
    """Runs cases first..first+n-1 -> the number of faults, which are printed as they are found."""
    count, case = CAMPAIGNS[name]
    n, began, faults, refused, kinds = n or count, sum(os.times()[:4]), 0, 0, collections.Counter()
    with tempfile.TemporaryDirectory(prefix="dkv-fuzz-") as folder:
        box = Box(folder)
        for i in tqdm(range(first, first + n), name, unit="case", disable=None):
            try:
                kind, sentence = case(random.Random(f"{name} {seed} {i}"), i, box)
                kinds[kind] += 1
                refused += sentence is not None
            except Exception:
                faults += 1
                tqdm.write(f"FAULT in {name} {i}: {box.line} {traceback.format_exc()}\n    python "
                           f"tests/campaigns/fuzz.py {name} --seed {seed} --first {i} --n 1")
            box.clean()
    print(f"{name}: {n} cases ({first} to {first + n - 1}, seed {seed}), "
          f"{n - refused - faults} worked, {refused} refused in one sentence, {faults} faults, "
          f"{sum(os.times()[:4]) - began:.0f} s of processor time; "
          + ", ".join(f"{k} {kind}" for kind, k in sorted(kinds.items())))
    return faults

if __name__ == "__main__":
    p = argparse.ArgumentParser(usage=__doc__)
    p.add_argument("name", choices=CAMPAIGNS, metavar="campaign")
    for flag in ("--n", "--seed", "--first"):
        p.add_argument(flag, type=int, default=0)
    sys.exit(campaign(**vars(p.parse_args())) > 0)
