"""Random settings and broken input by the hundred, each of which has to work or to be refused in one sentence.

python tests/fuzz.py generate              1,000 settings of generate, each held against what has to be true of all
python tests/fuzz.py checkpoints           300 broken checkpoint files for sample.py, 30 of them in a process of their own
python tests/fuzz.py converter             100 broken config.json and tokenizer.json for scripts/convert.py
python tests/fuzz.py commands              200 command lines for sample.py and train_tiny.py, 10 of them in a process of their own
python tests/fuzz.py prompts               1,000 strings of bytes as prompts, and what the terminal gets to see

Case i is drawn from (--seed, i) alone: a failure is printed with the line that repeats it, and --first and --n cut a campaign
into pieces. All but `generate` run in a fork with limits: 10 s of processor time, 1 GB of memory. --show prints every answer.
"""
import argparse
import base64
import collections
import copy
import functools
import importlib.util
import json
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile

import torch
from conftest import ROOT, random_model
from tqdm import tqdm

import sample
import train_tiny
from dkv_min import CACHES, REMASKING, cache_cost, generate
from model import load, save
from scripts.watch import printable

tqdm.monitor_interval = 0  # its thread would not survive a fork

# ---------------------------------------------------------------------------------------------------------------------
# generate: what has to hold for every setting

def generators(seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def generate_case(rng, i, box):
    L = rng.choice([1, 2, 3, 4, 6, 8])
    blocks = rng.randint(1, max(1, 12 // L))
    G, per_block, vocab, head = L * blocks, rng.randint(1, L), rng.randint(8, 60), rng.choice([1, 2, 4])
    n_vocab = rng.randint(6, vocab)
    mask, eos, eot = rng.randrange(vocab), *rng.sample(range(n_vocab), 2)
    mask = vocab - 1 if mask in (eos, eot) else mask
    if mask in (eos, eot):
        mask = next(t for t in range(vocab) if t not in (eos, eot))
    prompts = [[rng.choice([t for t in range(vocab) if t != mask]) for _ in range(rng.choice([1, 2, rng.randint(3, 12)]))] for _ in range(rng.randint(1, 4))]
    model = random_model(rng.getrandbits(32), n_layer=rng.choice([1, 1, 2, 3]), n_head=head, n_kv_head=rng.choice([k for k in (1, 2, 4) if head % k == 0]), n_embd=head * rng.choice([2, 4, 8]),
                         n_ff=rng.randint(1, 40), vocab_size=vocab, n_vocab=n_vocab, mask_id=mask, eos_id=eos, eot_id=rng.choice([None, eot]), qkv_bias=rng.random() < 0.3,
                         max_len=max(map(len, prompts)) + G + rng.choice([0, 7]))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    model.head.weight.data[eos] *= rng.choice([1, 1, 2])  # some end early
    cache, order = rng.choice(CACHES), None
    if rng.random() < 0.25:
        order = [[len(p) + q for lo in range(0, G, L) for q in rng.sample(range(lo, lo + L), L)] for p in prompts]
    remasking = None if order else rng.choice([None, *[r for r in REMASKING if (cache, r) != ("greedy", "low_confidence")]])
    how = dict(cache=cache, gen_length=G, block_length=L, steps=per_block * blocks, refresh=rng.choice([None, 1, 2, 3, 5, 10**9]), window=rng.choice([0, 1, 2, 4, 10**9]),
               remasking=remasking, delay=rng.random() < 0.75, temperature=rng.choice([0.0, 0.0, 0, 0.5, 1.0, 1e-30, 50.0]), cfg_scale=rng.choice([0.0, 0.0, 0.5, 1.5]),
               stop_at_eos=rng.random() < 0.4, suppress_eos=rng.choice([None, None, None, "logits", "confidence"]))
    seeds = [rng.getrandbits(32) for _ in prompts]
    what = f"{model.config} prompts={prompts} order={order} {how}"

    def run(rows=range(len(prompts)), on_step=None, **change):
        return generate(model, [prompts[j] for j in rows], order=order and [order[j] for j in rows], generator=generators([seeds[j] for j in rows]), on_step=on_step, **{**how, **change})

    seen, counted, before = [[] for _ in prompts], [0] * len(prompts), [None]

    def on_step(step, tokens, ran, decoded):
        for j, p in enumerate(prompts):
            assert tokens[j, :len(p)].tolist() == p, f"step {step} changes prompt {j}; {what}"
            at = decoded[j].nonzero().flatten().tolist()
            assert all(len(p) <= q and (q - len(p)) // L == step // per_block for q in at), f"step {step} decodes {at} of prompt {j}, outside its block; {what}"
            assert ran[j][at].all(), f"step {step} decodes of prompt {j} what it does not run; {what}"
            if before[0] is not None:
                other = (tokens[j] != before[0][j]) & ~decoded[j]
                assert not other.any() or (stopped(tokens[j]) and (tokens[j][other] == eos).all()), f"step {step} changes prompt {j} beside what it decodes; {what}"
            seen[j] += at
            counted[j] += int(ran[j].sum())
        before[0] = tokens

    def stopped(row):
        return how["stop_at_eos"] and eos in row.tolist()

    r = run(on_step=on_step)
    most = 0
    for j, (p, t) in enumerate(zip(prompts, r.tokens)):
        answer, n = t[len(p):], blocks
        if how["stop_at_eos"]:
            n = next((b + 1 for b in range(blocks) if eos in answer[b * L:b * L + L]), blocks)
            assert answer[n * L:] == [eos] * (G - n * L), f"no EOS behind the end of prompt {j}: {answer}; {what}"
        most = max(most, n)
        assert t[:len(p)] == p and len(answer) == G, f"prompt {j} comes back as {t}; {what}"
        assert mask not in answer and 0 <= min(answer) <= max(answer) < n_vocab, f"a mask or an unknown id in the answer to prompt {j}: {answer}; {what}"
        assert how["suppress_eos"] != "logits" or eos not in answer, f"EOS was suppressed, and is in {answer}; {what}"
        assert sorted(seen[j]) == list(range(len(p), len(p) + n * L)), f"positions decoded of prompt {j}: {seen[j]}; {what}"
        cost = cache_cost(len(p), G, how["steps"], L, cache, how["refresh"], how["window"], how["delay"])
        assert r.positions_run[j] == counted[j] and (counted[j] == cost if n == blocks else counted[j] < cost), f"prompt {j} ran {r.positions_run[j]}, on_step saw {counted[j]}, the closed form is {cost}; {what}"
        assert r.positions_full[j] == (len(p) + G) * per_block * n, f"positions_full of prompt {j} is {r.positions_full[j]}; {what}"
        alone = run([j])
        assert (alone.tokens[0], alone.positions_run[0]) == (t, r.positions_run[j]), f"prompt {j} alone: {alone.tokens[0]}, in the batch {t}; {what}"
    assert r.forwards == most * per_block, f"{r.forwards} forwards; {what}"
    again = run()
    assert (again.tokens, again.positions_run) == (r.tokens, r.positions_run), f"twice the same call: {r.tokens} and {again.tokens}; {what}"
    known = order is not None or remasking in ("random", "left_to_right") or cache == "greedy"
    other = cache if cache != "none" else rng.choice(["decode", "greedy"] if known else ["decode"])
    order_of = {"remasking": remasking or "random"} if known else {}
    plain, every = run(cache="none", **order_of), run(cache=other, refresh=1, **order_of)
    assert every.tokens == plain.tokens, f"{other} with refresh 1 gives {every.tokens}, no cache {plain.tokens}; {what}"
    if model.config.n_layer == 1:
        delayed = run(cache=other, delay=True, **order_of)
        assert delayed.tokens == plain.tokens, f"one layer, {other} with the delay: {delayed.tokens}, no cache {plain.tokens}; {what}"
    return f"{cache}{', 1 layer' if model.config.n_layer == 1 else ''}"

# ---------------------------------------------------------------------------------------------------------------------
# a fork with limits, and what it may say

SECONDS, MEMORY = 10, 2**30


def contained(box, job, stdin=b"", seconds=SECONDS):
    """job() in a fork with files as stdin, stdout and stderr -> exit code (or what went wrong, in words), stdout, stderr"""
    (box.path / "stdin").write_bytes(stdin)
    with open("/proc/self/statm") as f:
        here = int(f.read().split()[1]) * resource.getpagesize()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for fd, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
                os.dup2(os.open(box.path / name, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
            sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False, encoding="utf-8")
            sys.stderr = open(2, "w", closefd=False, encoding="utf-8", errors="backslashreplace")
            os.chdir(box.work)
            for what, limit in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, 8 * MEMORY), (resource.RLIMIT_CORE, 0)):
                resource.setrlimit(what, (limit, limit))
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                job()
                code = 0
            except SystemExit as e:
                code = e.code or 0
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    waits = 0
    while not (done := os.wait4(pid, os.WNOHANG))[0]:
        time.sleep(0.002)
        waits += 1
        if waits == 100_000:  # 200 s for what waits and does not compute; counted, as a machine may stop for a while
            os.kill(pid, signal.SIGKILL)
    code, peak = os.waitstatus_to_exitcode(done[1]), done[2].ru_maxrss * 1024
    if code < 0:
        code = f"killed by {signal.Signals(-code).name}" + (f", after {seconds} s of processor time or minutes of waiting" if -code in (signal.SIGXCPU, signal.SIGKILL) else "")
    elif peak > max(MEMORY, here + MEMORY // 2):
        code = f"took {peak / 2**30:.1f} GB"
    return code, *((box.path / name).read_bytes().decode(errors="surrogateescape") for name in ("stdout", "stderr"))


def call(main, script, argv, own=False):
    """A job for contained(): the script with these flags, in the fork or (own) in a new interpreter."""
    def job():
        if own:
            os.execv(sys.executable, [sys.executable, str(ROOT / script), *map(os.fsencode, argv)])
        sys.argv = [script, *argv]
        sample.launch(lambda: main(argv))
    return job


def verdict(code, out, err, script, bar=False, longest=600):
    """-> the sentence with which input was refused, or None if it worked. Anything else is a fault."""
    err = re.sub(r"(?s)^thread '.*?' \(\d+\) panicked.*?(?=^(sample|convert)\.py: )", "", err, flags=re.M)  # what tiktoken's Rust prints cannot be helped from here
    words = err.split("\r")[-1] if bar else err
    assert code in (0, 2) and "Traceback" not in err, f"{code}: {err[-3000:]}"
    if code == 0:
        assert bar or not err, f"it worked, and stderr has {err[-3000:]!r}"
        return None
    lines = [line for line in re.split(r"[\r\n]", err) if line.startswith(f"{os.path.basename(script)}: ")]
    assert len(lines) == 1 and words.endswith("\n") and (bar or words.count("\n") == 1), f"not one sentence: {err[-3000:]!r}"
    sentence = lines[0].split(": ", 1)[1]
    assert sentence and sentence == printable(sentence) and len(sentence) < longest, f"no sentence for a terminal: {sentence[:3000]!r}"
    assert script == "train_tiny.py" or not re.search("MemoryError|alloc|enough memory", sentence), f"only a limit has stopped it: {sentence}"
    known = re.search("does not fit together|cannot load|is damaged", sentence)
    assert known or not re.search(r"object has no|unhashable|NoneType|unpack|takes \d|iterable|not subscriptable|int_max", sentence), f"no sentence for a user: {sentence}"
    return sentence

# ---------------------------------------------------------------------------------------------------------------------
# what is broken, and how

LAUGHS = functools.reduce(lambda x, _: [x, x], range(40), ["ha"])  # 2**40 of them, in 40 lists
DEEP = functools.reduce(lambda x, _: [x], range(200), [])
JSON_JUNK = [None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 10**30, 1.5, -0.0, float("nan"), float("inf"), "", "x", "0", "\x1b[2J", "a\nb", "\ud800", "x" * 5000, [], {}, [[]], [1, 2], {"a": 1}, {"": None}]
JUNK = JSON_JUNK + [b"x", (), LAUGHS, DEEP, torch.zeros(0), torch.ones(2), torch.tensor(3)]
PATTERNS = [r"(a+)+!", r"(?:\w+\s?)+!", r"(.|\n)*(.|\n)*(.|\n)*!", r"(?:a|aa)+!|\s", r"(?:.*)*x", "(" * 500, "(" * 500 + "x" + ")" * 500, "[", "(?=", "\\", "(?P<a>", ".{99999}", "((a{99}){99}){99}", r"\p{Nope}", "(?<=a)b", r"(\s|\S)+?x", "a|",
            "x", r"\s", r"[\s\S]{1,3}", "(?i)x", r"(?:(?=a)a+)+!|.", r"(?=(x+)+!)x|.", r"(x+x+)+y|[\s\S]"]


def break_tree(tree, rng, junk):
    """Replaces, drops, adds or renames something somewhere in nested dicts and lists, in place."""
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return
        key = rng.choice(list(keys))
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.75:
            node = node[key]
        else:
            break
    action = rng.choice(["junk"] * 5 + ["drop", "add", "rename", "number"])
    if action == "junk":
        node[key] = rng.choice(junk)
    elif action == "number":
        node[key] = rng.choice([-1, 0, 1, 3, 5, 255, 2**16, 2**31 - 1, 2**31, 2**64]) if not isinstance(node[key], str) else rng.choice(PATTERNS)
    elif action == "drop":
        del node[key]
    elif isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), rng.choice([rng.choice(junk), copy.copy(node[key])]))
    else:
        odd = rng.choice(["x", "", "\x1b[31m", "a\nb", "wte.weight", "\ud800"])
        node[odd] = node.pop(key) if action == "rename" else rng.choice(junk)


def break_bytes(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if not raw:
            break
        at, n = rng.randrange(len(raw)), rng.choice([1, 4, 64, 1000])
        action = rng.randrange(7)
        if action < 3:
            raw[at] ^= 1 << rng.randrange(8)
        elif action == 3:
            raw[at:at + n] = bytes(len(raw[at:at + n]))
        elif action == 4:
            raw[at:at] = rng.randbytes(n)
        elif action == 5:
            del raw[at:at + n]
        else:
            raw[at:at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
    return bytes(raw)


class Code:
    """Pickled, it is a call."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(canary):
    """Pickles that would write the file canary, and others that call what they should not."""
    import subprocess
    touch = f"open({canary!r}, 'w').close()"
    return [Code(os.system, f"touch {canary}"), Code(exec, touch), Code(eval, touch), Code(open, canary, "w"), Code(subprocess.call, ["touch", canary]), Code(getattr, os, "system"),
            Code(os.mkdir, canary), Code(torch.save, 1, canary), Code(torch.load, canary), Code(torch.hub.load, "a/b", "c"), Code(functools.partial, os.system), Code(type, "A", (), {}),
            Code(pickle.loads, pickle.dumps(Code(os.system, f"touch {canary}"))), Code(compile, touch, "x", "exec"), Code(__import__, "os"), Code(copy.copy, 1)]


class Box:
    """A folder for one campaign, and what its cases break: made when first asked for."""
    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.work = self.path / "work"
        self.work.mkdir()
        self.canary = self.path / "canary"

    def clean(self):
        shutil.rmtree(self.work)
        self.work.mkdir()

    @functools.cached_property
    def checkpoint(self):
        """A small one with tokenizer, problems and defaults."""
        path = self.path / "good.pt"
        tokenizer = train_tiny.build_tokenizer("some text ", 258)
        model = random_model(dtype=torch.float32, n_layer=2, n_embd=16, n_ff=24, vocab_size=260, n_vocab=258, mask_id=257, eos_id=256, eot_id=None, max_len=200)
        model.extra = {"gen_length": 8, "block_length": 4, "known_order": "left_to_right", "template": "{}\n", "problems": [("one?", "1"), ("two?", "2")]}
        save(path, model, tokenizer)
        return path

    @functools.cached_property
    def loaded(self):
        return load(self.checkpoint)

    @functools.cached_property
    def bare(self):
        path = self.path / "bare.pt"
        save(path, random_model(dtype=torch.float32, n_layer=1))
        return path

    @functools.cached_property
    def data(self):
        return torch.load(self.checkpoint, weights_only=True)

    @functools.cached_property
    def folder(self):
        """One of the Hugging Face kind, cut to 400 rows."""
        from test_convert import shrink

        from scripts.fake_llada import main as fake
        with open(os.devnull, "w") as null:
            out, err, sys.stdout, sys.stderr = sys.stdout, sys.stderr, null, null
            try:
                fake([str(self.path / "hf"), "--width", "16", "--heads", "2", "--layers", "1"])
            finally:
                sys.stdout, sys.stderr = out, err
        shrink(self.path / "hf")
        return self.path / "hf"

    @functools.cached_property
    def trained(self):
        """What train_tiny.py leaves after two steps."""
        argv = ["--out", str(self.path / "t.pt"), *SMALL]
        code, _, err = contained(self, call(train_tiny.main, "train_tiny.py", argv), seconds=60)
        assert code == 0, err
        return self.path / "t.pt.train"

# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

def zipped(records, path, **how):
    with zipfile.ZipFile(path, "w", **how) as z:
        for name, content in records.items():
            z.writestr(name, content)


def records_of(path):
    with zipfile.ZipFile(path) as z:
        return {name: z.read(name) for name in z.namelist()}


def index_of(records):
    return next(name for name in records if name.endswith("data.pkl"))


def broken_pickle(rng):
    """Indexes written by hand, with lengths and counts that are not true, and calls that take memory."""
    text = b"X\x01\x00\x00\x00a"
    return b"\x80\x02" + rng.choice([
        b"\x8d" + struct.pack("<Q", rng.choice([2**62, 2**40, 2**33])) + b"ab.", b"X\xff\xff\xff\x7fab.", b"T\xff\xff\xff\x7fab.", b"\x8b\xff\xff\xff\x7fab.", b"\x96" + struct.pack("<Q", 2**40) + b"ab.",
        b"\x95" + struct.pack("<Q", 2**62) + b"N.", b"r\xff\xff\xff\xffN.", b"N" + b"\x85" * 200_000 + b".", b"]" * 3_000_000 + b".", b"}" * 8_000_000 + b".", b"(" * 5_000_000 + b".",
        b"ccollections\nOrderedDict\nq\x00)R" + b"h\x00)R" * 3_000_000 + b".", b"c__builtin__\nbytearray\n\x8a\x05" + struct.pack("<Q", 2**32)[:5] + b"\x85R.", b"cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R.",
        text + b"q\x000" + b"".join(b"]q" + bytes([k + 1]) + b"(" + (b"h" + bytes([k])) * 100 + b"e0" for k in range(20)) + b"h\x14.", b"ctorch\nempty\nJ\x00\x00\x00\x7f\x85R.", b"ctorch.nn.modules.linear\nLinear\nK\x01K\x01\x86R.",
        b"c__builtin__\nset\n" + b"]" + (b"K\x01" * 9) + b"\x85R.", b"", b".", b"N", b"\x80\x63."])


def foreign(box, rng, path):
    """Files that other people make."""
    weights, kind = {"a.weight": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.int8)}, rng.randrange(20)
    if kind < 6:
        torch.save([weights, torch.ones(3), {"state_dict": weights, "epoch": 3}, list(weights.values()), 7, {"format": "dkv-min 2", **box.data}][kind], path)
    elif kind == 6:
        torch.save(torch.nn.Linear(3, 4), path)
    elif kind == 7:
        torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 4), torch.ones(1, 3)), path)
    elif kind == 8:
        torch.save(box.data, path, _use_new_zipfile_serialization=False)
    elif kind == 9:
        header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        path.write_bytes(struct.pack("<Q", rng.choice([len(header), 2**62])) + header + bytes(8))
    elif kind == 10:
        import numpy
        numpy.savez(path.with_suffix(".npz"), a=numpy.ones(3))
        os.replace(path.with_suffix(".npz"), path)
    elif kind == 11:
        with tarfile.open(path, "w") as t:
            t.add(box.checkpoint, "data.pkl")
    elif kind == 12:
        path.mkdir()
    elif kind == 13:
        zipped({"a/data.pkl": b"", "a/version": b"3\n"}, path)
    elif kind == 14:
        path.symlink_to(path)
    elif kind == 15:
        zipped({"mimetype": b"application/epub+zip", "x/data.pkl": b"hello"}, path)
    else:
        path.write_bytes([b"", b"GGUF" + bytes(100), (ROOT / "tests" / "golden.npz").read_bytes(), pickle.dumps({"a": 1})][kind - 16])


def write_broken_checkpoint(box, kind, rng, path):
    raw = box.checkpoint.read_bytes()
    data = copy.deepcopy(box.data)
    records = records_of(box.checkpoint)
    index = index_of(records)
    if kind == "truncated":
        path.write_bytes(raw[:rng.randrange(len(raw))])
    elif kind == "bytes":
        path.write_bytes(break_bytes(raw, rng))
    elif kind == "directory":  # the end of the file, where the zip has its lengths
        at = raw.rindex(b"PK\x01\x02", 0, len(raw) - rng.randrange(22, 1200))
        path.write_bytes(raw[:at] + break_bytes(raw[at:], rng))
    elif kind == "index":  # the pickle, in a zip that is right
        zipped(records | {index: break_bytes(records[index], rng)}, path)
    elif kind == "records":
        name = rng.choice(list(records))
        content = rng.choice([b"", b"x", records[name][:-1], records[name] + b"x", records[rng.choice(list(records))]])
        zipped({k: content if k == name else v for k, v in records.items() if k != name or rng.random() < 0.7}, path)
    elif kind == "values":
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            break_tree(data[rng.choice(["config", "tokenizer", "extra"])] if rng.random() < 0.8 else data, rng, JUNK)
        torch.save(data, path)
    elif kind == "weights":
        names = rng.sample(list(data["weights"]), rng.choice([1, 2, len(data["weights"])]))
        change = rng.choice([lambda w: w.T.clone() if w.dim() == 2 else w[:-1].clone(), lambda w: w[None], lambda w: w[:0].clone(), lambda w: torch.ones(1).expand(w.shape), lambda w: w.t() if w.dim() == 2 else w,
                             lambda w: w.int(), lambda w: w.bool(), lambda w: w.to(torch.complex64), lambda w: w.half(), lambda w: w.double(), lambda w: w.bfloat16(), lambda w: w.to(torch.float8_e4m3fn), lambda w: w.to_sparse(),
                             lambda w: w.to("meta"), lambda w: torch.nn.Parameter(w), lambda w: w.tolist(), lambda w: None, lambda w: w.sum()])
        for name in names:
            data["weights"][name] = change(data["weights"][name])
        torch.save(data, path)
    elif kind == "keys":
        for _ in range(rng.choice([1, 1, 3])):
            part = rng.choice([data, data["config"], data["weights"], data["tokenizer"], data["extra"]])
            odd = rng.choice(["x", 3, None, "\x1b]0;owned\x07", "a\nb", "blocks.2.attn.q.weight", ("a",), b"a"])
            if rng.random() < 0.5 and part:
                part[odd] = part.pop(rng.choice(list(part)))
            else:
                part[odd] = rng.choice(JUNK)
        torch.save(data, path)
    elif kind == "numbers":  # a weight with other numbers is a weight
        for name in rng.sample(list(data["weights"]), rng.choice([1, 3, len(data["weights"])])):
            w = data["weights"][name]
            flat = w.view(torch.uint8).flatten() if w.dtype == torch.float32 else w
            if rng.random() < 0.5:
                w.flatten()[:] = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, 0.0, 1e-45])
            for _ in range(20):
                flat[rng.randrange(len(flat))] ^= 1 << rng.randrange(8)
        torch.save(data, path)
    elif kind == "code":
        payload, where = rng.choice(attacks(str(box.canary))), rng.randrange(5)
        if where == 0:
            path.write_bytes(pickle.dumps(payload, protocol=rng.randrange(6)))
        elif where == 1:
            zipped(records | {index: pickle.dumps(payload, protocol=rng.randrange(6))}, path)
        elif where == 2:
            torch.save({**data, "extra": payload}, path)
        elif where == 3:
            torch.save({**data, "x": payload}, path, _use_new_zipfile_serialization=False)
        else:
            torch.save({**data, "tokenizer": payload}, path, pickle_protocol=rng.choice([2, 3, 4, 5]))
    elif kind == "bombs":
        how = rng.randrange(8)
        if how == 0:
            zipped(records | {index.replace("data.pkl", "data/0"): bytes(2**28)}, path, compression=zipfile.ZIP_DEFLATED)
        elif how == 1:
            zipped(records | {index: b"\x80\x02" + b"]" * 2**26 + b"."}, path, compression=zipfile.ZIP_DEFLATED)
        elif how == 2:
            zipped(records | {index.replace("data.pkl", str(k)): b"" for k in range(60_000)}, path)
        elif how == 3:
            torch.save({**data, rng.choice(list(data)): rng.choice([LAUGHS, DEEP])}, path)
        elif how == 4:  # as many tokens as fit
            data["tokenizer"]["ranks"] += "".join(f"{base64.b64encode(k.to_bytes(3, 'big')).decode()} {k}\n" for k in range(10**6, 10**6 + rng.choice([500_000, 1_200_000])))
            torch.save(data, path)
        elif how == 5:  # a name that only torch reads as the index's
            zipped({name.replace("data.pkl", "DATA.PKL") if name == index else name: broken_pickle(rng) if name == index else content for name, content in records.items()}, path)
        else:
            part = rng.choice(["config", "extra"])
            data[part][rng.choice(list(data[part]))] = rng.choice([LAUGHS, {"a": LAUGHS}, (LAUGHS,)])
            torch.save(data, path)
    elif kind == "lengths":
        zipped(records | {index: broken_pickle(rng)}, path)
    elif kind == "tokenizer":
        t = data["tokenizer"]
        t |= rng.choice([{"pattern": rng.choice(PATTERNS)}, {"pattern": rng.choice(PATTERNS)}, {"ranks": break_bytes(t["ranks"].encode(), rng).decode("latin1")}, {"ranks": t["ranks"].replace(" 7\n", f" {'9' * 5000}\n")},
                         {"ranks": t["ranks"] + "QUJD 99999\n"}, {"special": {"<|eos|>": 2**70, "<|mask|>": 257}}, {"special": {"": 256}}, {"unmerged": "QUJD 70000\n"}, {"ranks": "".join(reversed(t["ranks"].splitlines(True)))}])
        torch.save(data, path)
    else:
        foreign(box, rng, path)


KINDS = ["truncated", "bytes", "directory", "index", "records", "values", "weights", "keys", "numbers", "code", "bombs", "lengths", "tokenizer", "foreign", "values", "index", "foreign"]


def checkpoints_case(rng, i, box):
    kind, path = KINDS[i % len(KINDS)], box.work / "broken.pt"
    write_broken_checkpoint(box, kind, rng, path)
    short = ["--gen-length", "8", "--block-length", "4"]
    flags = rng.choice([[], [], ["--prompt", "a" * 60, *short], ["--prompt", "hello", "--temperature", "1", *short], ["--ids", "1,2,3", "--cache", "greedy", *short], ["--ids", "65", "--temperature", "0.5", "--cfg-scale", "2", *short],
                        ["--chat", *short], ["--json"], ["--watch", "0"]])
    own = i % 10 == 9
    result = contained(box, call(sample.main, "sample.py", ["--ckpt", str(path), *flags], own), b"hello\n/quit\n")
    assert not box.canary.exists(), "code from the file was run"
    sentence = verdict(*result, "sample.py")
    assert set(os.listdir(box.work)) == {"broken.pt"}, f"files appeared: {os.listdir(box.work)}"
    assert kind != "numbers" or sentence is None, f"other numbers in a weight: {sentence}"
    return f"{kind}{', own process' if own else ''}", sentence

# ---------------------------------------------------------------------------------------------------------------------
# the converter

def converter_case(rng, i, box):
    from scripts.convert import main as convert
    folder = pathlib.Path(shutil.copytree(box.folder, box.work / "hf"))
    path = folder / ("tokenizer.json", "config.json")[i % 2]
    raw = path.read_bytes()
    how = rng.choice(["tree"] * 5 + ["bytes", "text"] + ["pattern"] * 2 * (path.name == "tokenizer.json"))
    if how == "tree":
        doc = json.loads(raw)
        for _ in range(rng.choice([1, 1, 1, 3])):
            break_tree(doc, rng, JSON_JUNK)
        path.write_text(json.dumps(doc))
    elif how == "pattern":
        doc = json.loads(raw)
        doc["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = rng.choice(PATTERNS)
        path.write_text(json.dumps(doc))
    elif how == "bytes":
        path.write_bytes(break_bytes(raw, rng))
    else:
        path.write_bytes(rng.choice([b"", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xef\xbb\xbf" + raw, raw.decode().encode("utf-16"), b"\x00" * 100, b"1" * 5000, b'{"d_model": ' + b"1" * 5000 + b"}", raw + b"}",
                                     raw[:rng.randrange(len(raw))], raw.replace(b"true", b"NaN"), b"\xff\xfe", b'"' + b"x" * 10_000 + b'"']))
    out = box.work / "out.pt"

    def job():
        convert([str(folder), "--out", str(out)])
        sample.main(["--ckpt", str(out), "--ids", "5,6", "--gen-length", "4", "--block-length", "4"])
        if load(out)[1]:
            sample.main(["--ckpt", str(out), "--prompt", "a" * 60, "--gen-length", "4", "--block-length", "4", "--raw"])

    def whole():
        sys.argv = ["convert.py"]
        sample.launch(job)
    sentence = verdict(*contained(box, whole), "convert.py", bar=True)
    left = set(os.listdir(box.work)) - {"hf"}
    assert left == (set() if sentence else {"out.pt"}), f"files: {left}, after {sentence}"
    return f"{path.name}, {how}", sentence

# ---------------------------------------------------------------------------------------------------------------------
# command lines

WORDS = ["", "x", "-1", "0", "1", "2", "3", "4", "8", "-0", "1e3", "0.5", "nan", "inf", "-inf", "1e-320", "1e400", "9" * 20, "9" * 5000, "1_0", " 4", "\u0664", "\u00b2", "0x10", "never", "all", "none", "caf\udce9", "\x1b[2J", "a\nb", "--", "-", "%s", "../x",
         "x" * 5000, "true", "[1]", "\u202e", "\U0001f600"]
SMALL = "--n-layer 1 --n-head 2 --n-embd 16 --batch-size 8 --threads 1 --steps 2 --val-every 1 --eval 0 --vocab 260 --prompt-len 100 --gen-length 40 --block-length 20 --ops 1 1 --device cpu --amp off".split()


def some(rng, good, bad):
    return rng.choice(good) if rng.random() < 0.75 else rng.choice(bad)


def sample_line(rng, box):
    (box.work / "p.txt").write_text("one\ntwo\n")
    (box.work / "p.jsonl").write_text('{"prompt": "one"}\n')
    (box.work / "bad.jsonl").write_bytes(rng.choice([b"{", b"\xff\n", b'{"prompt": 3}\n', b'{"prompt": ' + b"1" * 5000 + b"}\n", b'{"prompt": "\\ud800"}\n', b"[1]\n", b'"x"\n', b'{"a": ' * 99999]))
    values = {"--ckpt": [str(box.checkpoint), str(box.bare), "tiny", "README.md", ".", "/dev/null", "/proc/self/mem", "/dev/zero"], "--cache": ["none", "decode", "greedy", "all"], "--prompt": ["hello", "a\x1b[31mb", "x" * 100, "  \n", "<|mask|>", "\x07"],
              "--prompts": ["p.txt", "p.jsonl", "bad.jsonl", "-", ".", "no"], "--ids": ["1,2,3", "5", "1,,2", "257", "256,255", "-1", "1, 2", "99999999999999999999"], "--gen-length": ["4", "8", "16", "24"], "--steps": ["1", "2", "4", "8"],
              "--block-length": ["1", "2", "4", "8"], "--refresh": ["1", "2", "never", "1000"], "--window": ["0", "2", "1000"], "--temperature": ["0", "0.7", "1e-9", "100"], "--remasking": ["low_confidence", "random", "left_to_right"],
              "--cfg-scale": ["0", "1.5"], "--suppress-eos": ["logits", "confidence"], "--seed": ["0", "7", "-3"], "--device": ["cpu", "auto"], "--dtype": ["float32", "bfloat16", "auto"], "--batch-size": ["1", "2", "100"],
              "--out": ["o.jsonl", "p.txt", ".", "no/x", "/dev/full", "/dev/null"], "--watch": ["0", "0.0"]}
    switches = ["--raw", "--chat", "--stop-at-eos", "--no-delay", "--json", "--yes", "--watch"] + rng.choice([[], [], ["--help", "--pro", "--frobnicate"]])
    argv = ["--ckpt", str(box.checkpoint), "--gen-length", "8"]
    for _ in range(rng.choice([0, 1, 2, 3, 4, 6])):
        flag = rng.choice([*values, *switches])
        argv += [flag] if flag in switches else [flag, some(rng, values[flag], WORDS)] if rng.random() < 0.95 else [rng.choice(WORDS)]
    return argv


def train_line(rng, box):
    (box.work / "my.txt").write_text("".join(f"{i} little ducks went out to play. " for i in range(200)))
    (box.work / "bad.txt").write_bytes(rng.choice([b"", b"\xff", b"a" * 5000, b"\x00" * 5000, "é".encode() * 3000, b" " * 3000, b"\n" * 3000, b"x"]))
    argv = ["--out", "t.pt", *SMALL]
    if rng.random() < 0.25:  # what a run has left, broken
        state = torch.load(box.trained, weights_only=True)
        part = rng.choice([state, state["args"], state["args"]])
        break_tree(part, rng, [j for j in JUNK if not isinstance(j, int) or abs(j) > 3])
        if rng.random() < 0.2:
            (box.work / "t.pt.train").write_bytes(break_bytes(box.trained.read_bytes(), rng))
        else:
            torch.save(state, box.work / "t.pt.train")
        return ["--resume", "--out", "t.pt", "--eval", "0", "--device", "cpu", "--threads", "1", "--amp", "off"]
    small = {"--preset": ["quick", "bundled"], "--data": ["my.txt", "bad.txt", "no", ".", "/dev/null"], "--out": ["t.pt", ".", "no/x", ""], "--eval": ["0", "1"], "--n-layer": ["1", "2"], "--n-head": ["1", "2"], "--n-embd": ["8", "16", "6"],
             "--prompt-len": ["1", "100", "120"], "--gen-length": ["2", "40", "60"], "--block-length": ["1", "10", "20"], "--vocab": ["258", "280"], "--steps": ["1", "2"], "--batch-size": ["1", "2", "8"], "--lr": ["0", "0.01", "1e30"], "--lr-adam": ["0", "1e30"],
             "--sums": ["0", "1", "0.5", "1e9"], "--val-every": ["1", "5"], "--seed": ["0", "5"], "--device": ["cpu", "cuda", "auto"], "--threads": ["1", "2", "1000000000"], "--amp": ["on", "off", "auto"]}
    flags = rng.choice([["--resume"], ["--ops", "1", "7"], ["--ops", "0", "1"], ["--ops", "1"], [], [], [], []])
    for _ in range(rng.choice([1, 1, 2, 3])):
        flag = rng.choice(list(small))
        word = some(rng, small[flag], [w for w in WORDS if w not in ("1_0", "8")] if flag != "--steps" else ["0", "-1", "x", "", "nan", "9" * 20])
        flags += [flag, word]
    return argv + flags


def commands_case(rng, i, box):
    script, main = [("sample.py", sample.main), ("train_tiny.py", train_tiny.main)][i % 4 == 0]
    argv = (sample_line if script == "sample.py" else train_line)(rng, box)
    own = i % 20 in (9, 12) and i % 40 < 20
    result = contained(box, call(main, script, argv, own), rng.choice([b"", b"hello\n", b"/reset\n\xff\n/quit\n", rng.randbytes(30)]), seconds=60)
    try:
        sentence = verdict(*result, script, script == "train_tiny.py", 11_000)  # it may quote the user
    except AssertionError as e:
        raise AssertionError(f"{script} {argv}: {e}") from None
    return f"{script}{', own process' if own else ''}", sentence and f"{argv}: {sentence}"

# ---------------------------------------------------------------------------------------------------------------------
# prompts

PIECES = [b"\x1b[2J", b"\x1b]0;owned\x07", b"\x9b31m", b"\xc2\x9b31m", b"\r", b"\n", b"\t", b"\x00", b"\x7f", b"\x08", "\u202e".encode(), "\u2028".encode(), "\ufeff".encode(), "e\u0301".encode(), "\U0001f600".encode(), b"\xff", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
          b" " * 50, b"<|mask|>", b"<|eos|>", b"{}", b"hello", b"/quit", b"/reset", b'{"prompt": "x"}', b'{"prompt": "\\u001b[2J"}', b"\\ud800", b"\xc3\xa9", b"a"]


def prompts_case(rng, i, box):
    raw = b"".join(rng.choice(PIECES) if rng.random() < 0.5 else rng.randbytes(rng.choice([1, 3, 20])) for _ in range(rng.choice([0, 1, 2, 5, 10])))
    if rng.random() < 0.4:  # more of what is text
        raw = raw.decode(errors="ignore").encode()
    how = ["--prompt", "--prompts", "jsonl", "object", "stdin", "chat"][i % 6]
    flags, stdin = ["--ckpt", str(box.checkpoint), "--gen-length", "12", "--block-length", "12", "--steps", "6", "--seed", str(i), "--temperature", "1", "--cache", "decode"], b""
    if how == "--prompt":
        flags += ["--prompt=" + os.fsdecode(raw.replace(b"\x00", b""))]
    elif how == "chat":
        flags, stdin = [*flags, "--chat"], raw
    elif how == "stdin":
        flags, stdin = [*flags, "--prompts", "-"], raw
    else:
        name = "p.txt" if how == "--prompts" else "p.jsonl"
        (box.work / name).write_bytes(json.dumps({"prompt": raw.decode("latin1")}).encode() + b"\n" if how == "object" else raw)
        flags += ["--prompts", name]
    shown = rng.choice([["--json"], [], [], ["--watch", "0"], ["--out", "o.jsonl"]]) if how != "chat" else []
    code, out, err = contained(box, call(sample.main, "sample.py", flags + shown), stdin)
    sentence = verdict(code, out, err, "sample.py")
    assert all(c == "\n" or c.isprintable() for c in out), f"the terminal gets {out!r}"
    text = (box.work / "o.jsonl").read_text() if (box.work / "o.jsonl").exists() else out if "--json" in shown else ""
    model, tokenizer = box.loaded
    for o in map(json.loads, text.splitlines()):
        assert tokenizer.decode(o["prompt_ids"]) == o["prompt"] + "\n", f"the prompt {o['prompt']!r} was given to the model as {tokenizer.decode(o['prompt_ids'])!r}"
        assert len(o["ids"]) == 12 and max(o["ids"]) < model.config.n_vocab and model.config.mask_id not in o["ids"], o["ids"]
    return f"{how}", sentence

# ---------------------------------------------------------------------------------------------------------------------
# the campaigns

CAMPAIGNS = {"generate": (1000, generate_case), "checkpoints": (300, checkpoints_case), "converter": (100, converter_case), "commands": (200, commands_case), "prompts": (1000, prompts_case)}


def processor_seconds():
    return sum(getattr(resource.getrusage(who), part) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN) for part in ("ru_utime", "ru_stime"))


def campaign(name, n=None, seed=0, first=0, show=False):
    """Runs cases first..first+n-1 -> number of faults, which are printed as they are found."""
    count, case = CAMPAIGNS[name]
    n, began, faults, refused, kinds = n or count, processor_seconds(), 0, 0, collections.Counter()
    if name == "converter" and not importlib.util.find_spec("safetensors"):
        print("converter: skipped, it needs the packages of requirements-llada.txt")
        return 0
    with tempfile.TemporaryDirectory(prefix="dkv-fuzz-") as folder, tqdm(range(first, first + n), name, unit="case", disable=None) as bar:
        box = Box(folder)
        for i in bar:
            try:
                kind = case(random.Random(f"{name} {seed} {i}"), i, box)
                kind, sentence = kind if isinstance(kind, tuple) else (kind, None)
                kinds[kind] += 1
                refused += sentence is not None
                if show:
                    bar.write(f"{i} {kind}: {sentence or 'works'}")
            except Exception as e:
                faults += 1
                bar.write(f"FAULT in {name} {i}: {type(e).__name__}: {e}" if isinstance(e, AssertionError) else f"FAULT in {name} {i}: {''.join(traceback.format_exception(e))}")
                bar.write(f"    python tests/fuzz.py {name} --seed {seed} --first {i} --n 1")
            box.clean()
            bar.set_postfix_str(f"{refused} refused, {faults} faults", refresh=False)
    print(f"{name}: {n} cases ({first} to {first + n - 1}, seed {seed}), {n - refused - faults} worked, {refused} refused in one sentence, {faults} faults, {processor_seconds() - began:.0f} s of processor time; " + ", ".join(f"{k} {kind}" for kind, k in sorted(kinds.items())))
    return faults


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("campaign", choices=CAMPAIGNS)
    p.add_argument("--n", type=int, help="how many cases (all of the campaign)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    p.add_argument("--show", action="store_true", help="print what every case was answered with")
    args = p.parse_args(argv)
    return 1 if campaign(args.campaign, args.n, args.seed, args.first, args.show) else 0


if __name__ == "__main__":
    sys.exit(main())
