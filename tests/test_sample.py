"""The command line of sample.py, with good and with bad input."""
import codecs
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import REFUSED, ROOT, answers, byte_model, forked, random_model
from filelock import FileLock

import sample as s
from caches import CACHES, LOOPS
from dkv_min import generate
from model import load, save
from support.cli import fetch, launch
from support.evaluate import encode
from support.prompts import N_DEMO, draws
from support.settings import loop_settings
from support.tokenizer import build_tokenizer

QUESTION = "Anna has 3 boxes of 4 pens. Monday she loses 5. How many pens are left?"
TINY = ROOT / "checkpoints" / "tiny.pt"
DIFFUSION = [cache for cache in CACHES if cache not in ("guided", "autoregressive")]
ALL = [cache for cache in DIFFUSION for _ in range(1 + (cache == "freecache"))]  # and delayed

def sample(*flags, code=0, **how):
    [found], [out], [err] = forked(1, "sample.py", *flags, **how)
    assert found == code, out + err
    return SimpleNamespace(out=out, err=err)

def launched(flags, capsys):
    """-> the exit code of a command line in this process, its stdout and stderr"""
    with pytest.raises(SystemExit) as e:
        launch(lambda: s.main([*map(str, flags)]))
    return e.value.code, *capsys.readouterr()

def objects(*flags):
    return [json.loads(line) for line in sample(*flags, "--json").out.splitlines()]

@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A checkpoint with neither problems nor tokenizer."""
    path = tmp_path_factory.mktemp("bare") / "bare.pt"
    save(path, random_model(dtype=torch.float32))
    return path

def test_no_flags(tmp_path):
    """One held-out question in full, and a table over four with counts and the fair rivals."""
    p, problems = sample(cwd=tmp_path, patch="sample.REPEATS = 1"), load(TINY)[0].extra["problems"]
    assert len(p.out.splitlines()) <= 20 and TINY.stat().st_size <= 8e6
    assert p.out.startswith(problems[0][0] + "\n") and problems[1][0] not in p.out
    rows = [re.split(r" {2,}", line.strip()) for line in p.out.split("\n\n")[-1].splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["none", "low_confidence", "-"], ["decode", "low_confidence", "8"],
        ["local", "low_confidence", "never"], ["none", "left_to_right", "-"],
        ["greedy", "left_to_right", "2"], ["none", "low_confidence", "-"],
        ["none", "threshold 0.99", "-"], ["local", "threshold 0.99", "never"]]
    for cache, order, _, steps, *_ in rows:
        steps = "" if "threshold" in order else f", {steps} steps"
        [(mark, said)] = re.findall(f"^  {cache}, {order}{steps} +(right|wrong)  (.*)$", p.out,
                                    re.M)
        assert (mark == "right") == (said == problems[0][1])
    whole = int(rows[0][5].replace(",", ""))
    for row, flags in (rows[2], ""), (rows[7], "--threshold 0.99"):
        runs = objects("--cache", row[0], *flags.split())  # the table adds up
        right = sum(o["text"].strip() == problems[o["index"]][1] for o in runs)
        ran, steps = (sum(o[key] for o in runs) for key in ("positions_run", "steps"))
        assert float(row[3]) == round(steps / N_DEMO, 1)
        assert right >= 3 and row[4:7] == [f"{right}/{N_DEMO}", f"{ran:,}", f"{whole / ran:.2f}x"]

@pytest.mark.parametrize("rule", ["--temperature 0.7 --steps 8", "--threshold 0.3"])
def test_json_agrees_with_the_library(rule):
    found = objects("--prompt", QUESTION, "--prompt", "Short?", "--cache", "all", "--seed", 3,
                    "--gen-length", 16, "--dtype", "float32", *rule.split())
    caches = [cache for cache in ALL if cache != "greedy" or "steps" in rule]
    assert [(o["index"], o["cache"]) for o in found] == [(i, c) for i in (0, 1) for c in caches]
    assert [o["settings"]["delay"] for o in found if o["cache"] == "freecache"] == [False, True] * 2
    model, tokenizer = load(TINY, dtype=torch.float32)
    for pair in zip(found[:len(caches)], found[len(caches):]):
        how = dict(pair[0]["settings"])
        assert [how.pop(key) for key in ("ckpt", "dtype", "seed")] == ["tiny", "float32", 3]
        result = generate(model, [o["prompt_ids"] for o in pair],
                          generator=[draws(3, i) for i in (0, 1)], **how)
        for row, o in enumerate(pair):
            assert " ".join(o) == ("index prompt cache settings prompt_ids ids text forwards steps "
                                   "positions_run positions_full seconds")
            assert o["prompt_ids"] == encode([o["prompt"]], tokenizer, model.extra)
            assert o["prompt_ids"] + o["ids"] == result.tokens[row] and o["seconds"] > 0
            end = [*o["ids"], model.config.eos_id].index(model.config.eos_id)
            assert o["text"] == tokenizer.decode(o["ids"][:end])
            assert [o["forwards"]] + [o[key] for key in ("steps", "positions_run")] == [
                result.forwards, result.steps[row], result.positions_run[row]]
            assert o["positions_full"] == o["steps"] * (len(o["prompt_ids"]) + 16)

@pytest.mark.parametrize("flags, left, rows", [
    ("--threshold 0.9", "greedy", 1 + len(ALL) - 1), ("--remasking random", "window", None),
    ("--steps 1", "window", 1 + len(ALL) - 1), ("--delay --set active=4", "", 1 + len(ALL))])
def test_caches_that_the_rule_excludes_are_named(wordy, flags, left, rows):
    """Each other one is in the table, beside none under the same rule."""
    p = sample("--ckpt", wordy, "--prompt", "hi", "--gen-length", 32, "--cache", "all",
               *flags.split())
    assert p.err.count("\n") == bool(left) and f"{left} (the {left} cache" in p.err or not left
    table = [line.split("  ")[0] for line in p.out.split("\n\n")[-1].splitlines()[2:]]
    assert left not in table and rows in (None, len(table))
    assert ("freecache, delay" in table) and ("freecache" in table) == ("--delay" not in flags)

def test_prompts_from_everywhere(tmp_path):
    text, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    rows.write_bytes('{"prompt": "one\\ntwo", "other": 1}\n\n{"prompt": "é\u2028è"}\n'.encode())
    text.write_text(f"{QUESTION}\n\nBen has 2 bags of 9 cups.\nHow many?\n")
    piped = sample("--prompts", "-", "--steps", 2, "--json", stdin=b"\xef\xbb\xbfa\r\n\nb\n").out
    found = [*objects("--prompts", rows, "--steps", 2), *map(json.loads, piped.splitlines())]
    assert [o["prompt"] for o in found] == ["one\ntwo", "é\u2028è", "a", "b"]
    assert objects("--ids", "5, 6,7", "--steps", 2)[0]["prompt_ids"] == [5, 6, 7]
    assert "<|mask|>" in objects("--prompt", "<|mask|>", "--steps", 2)[0]["prompt"]  # not the mask
    # what is answered does not depend on the batch
    how = ["--prompts", text, *"--temperature 1 --remasking random --cache greedy".split()]
    one, three, other = ([o["ids"] for o in objects(*how, *more)]
                         for more in (["--batch-size", 1], ["--batch-size", 3], ["--seed", 1]))
    assert one == three != other and len(one) == 3

def test_flags_reach_the_library(bare, tmp_path):
    def run(*flags):
        return objects("--ckpt", bare, "--ids", "3,4", "--gen-length", 16, *flags)[0]
    none, decode, greedy = (run("--cache", cache) for cache in ("none", "decode", "greedy"))
    never, late, always = (run("--refresh", r) for r in ("never", 16, 1))
    assert none["prompt"] is None is none["text"]  # it has no tokenizer
    assert never["positions_run"] == late["positions_run"] and always["ids"] == none["ids"]
    assert run("--no-delay")["positions_run"] < decode["positions_run"]
    assert run("--cache", "greedy", "--window", 0)["positions_run"] < greedy["positions_run"]
    assert run("--cache", "none", "--cfg-scale", 2)["ids"] != none["ids"]
    assert run("--set", "refresh=never")["positions_run"] == never["positions_run"]
    entropy = run("--cache", "entropy", "--set", "tau=inf", "--set", "recent=2")["settings"]
    assert [entropy[s] for s in ("tau", "recent", "window")] == ["inf", 2, None]  # JSON has no inf
    assert run("--steps", 4, "--block-length", 8)["forwards"] == 4
    assert run("--dtype", "bfloat16", "--device", "cpu")["forwards"] == 16
    # with --cache all a setting goes to the runs that have it
    runs = objects("--ckpt", bare, "--ids", "3,4", "--gen-length", 16, "--cache", "all", "--set",
                   "window=8", "--refresh", 4, "--no-delay")
    given = dict(window=8, refresh=4, delay=False)
    assert [o["settings"].items() & given.items() for o in runs] == [
        given.items() & {s: given.get(s) for s in loop_settings(LOOPS[cache], {})}.items()
        for cache in DIFFUSION]
    # about the end of the text
    model = random_model(dtype=torch.float32)
    model.head.weight.data[1] *= 3  # EOS often
    save(tmp_path / "a.pt", model)
    ask = ("--ckpt", tmp_path / "a.pt", "--ids", "3,4", "--gen-length", 16, "--block-length")
    usual, logits, stop, one, late = (objects(*ask, *more)[0] for more in (
        [4], [4, "--suppress-eos", "logits"], [4, "--stop-at-eos"], [16],
        [16, "--suppress-eos", "confidence"]))
    assert 1 in usual["ids"] and usual["forwards"] == 16 and 1 not in logits["ids"]
    assert stop["forwards"] < 16 and late["ids"] != one["ids"]

def test_other_lengths_than_the_model_s_are_noted():
    """They cost quality, and a length that is not a multiple of the blocks makes one block."""
    for length, note in (20, "note: the model was trained on answers of 64 tokens in blocks of 32; "
                             "expect more errors with 20 in blocks of 20\n"), (64, ""):
        p = sample("--prompt", QUESTION, "--gen-length", length, "--steps", 2, "--json")
        assert p.err == note and f'"block_length": {min(length, 32)},' in p.out

@pytest.mark.slow
def test_in_a_shell(tmp_path):
    """Closed and full output are not faults of ours, and bytes that are not UTF-8 are an error."""
    (tmp_path / "p.txt").write_text("hello\n" * 10)
    for command, words in [
            (f"--prompts {tmp_path / 'p.txt'} --steps 4 --cache all --json | head -n 1", ""),
            ("--watch --steps 2 >&-", ""), ("--prompt $(printf 'caf\\351')", "UTF-8"),
            ("--chat </dev/null >&-", "open stdin"),
            ("--prompt hi --steps 2 --json >/dev/full", "cannot write")]:
        if "/dev/full" in command and not os.path.exists("/dev/full"):
            continue
        p = subprocess.run(f"{sys.executable} {ROOT / 'sample.py'} {command}", shell=True,
                           text=True, capture_output=True, timeout=200)
        assert p.returncode == 2 * bool(words) and words in p.stderr, (command, p.stderr)
        assert p.stderr.count("\n") == bool(words) and p.stdout.count("\n") == ("head" in command)
        assert not p.stdout or json.loads(p.stdout)["index"] == 0

@pytest.mark.parametrize("line", [
    line for line in (ROOT / "tests/errors_sample.txt").read_text().splitlines()[1:]
    if not line.startswith("--device") or not torch.cuda.is_available()])
def test_user_errors_are_one_sentence(line, bare, tmp_path, capsys, monkeypatch):
    for name, content in (REFUSED["files"] | {"deep.jsonl": '{"prompt": ' + "[" * 100000}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode("latin1"))
    torch.save({"args": {}, "step": 3, "weights": {}}, tmp_path / "x.pt.train")
    places = dict(root=ROOT, tmp=tmp_path, bare=bare, long="x" * 400_001, words="word " * 2000,
                  surrogates="\udce9" * 5000)
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    flags, words = line.split(" | ")
    flags = shlex.split(codecs.decode(flags, "unicode_escape"))
    code, out, err = launched([flag.format(**places) for flag in flags], capsys)
    assert code == 2 and re.search(words, err) and err.count("\n") == 1 and out == "", err
    assert len(err) < 400, "what a user typed is quoted in short"

def test_llada_is_not_fetched_unasked(tmp_path, monkeypatch):
    """Without a terminal to ask on; if the packages for it are missing, they are named instead."""
    p = sample("--ckpt", "llada-1.5", "--prompt", "Hello", code=2,
               patch=f"import os; os.environ['HF_HOME'] = {str(tmp_path)!r}")
    assert p.out == "" and not (ROOT / "checkpoints" / "llada-1.5.pt").exists()
    last = p.err.splitlines()[-1]  # the converter's sentence, and none of ours after it
    assert last.startswith("convert.py: ") and "sample.py: " not in p.err
    assert "requirements-llada.txt" in last or "--yes" in last and "GSAI-ML/LLaDA-1.5" in p.err
    monkeypatch.setattr("support.cli.fetch", lambda *_: pytest.fail("fetched before the check"))
    for wrong in ("--prompts /nothing", "--prompt x --ids a", "--out /nowhere/x --prompt x",
                  "--cache none --window 2"):
        with pytest.raises(ValueError):
            s.main(["--ckpt", "llada-1.5", *wrong.split()])

def test_the_converter_s_exit_code_is_ours(monkeypatch, tmp_path):
    (tmp_path / "scripts").mkdir()
    monkeypatch.setattr("support.cli.ROOT", str(tmp_path))
    for code, raised, words in (("sys.exit(3)", SystemExit, "3"),
                                ("os.kill(os.getpid(), 9)", ValueError, "killed")):
        (tmp_path / "scripts" / "convert.py").write_text(f"import os, sys\n{code}\n")
        with pytest.raises(raised, match=words):
            fetch("llada", yes=True)

def test_answers_go_to_a_file_and_resume_where_they_stopped(tmp_path):
    prompts, out, whole = tmp_path / "p.txt", tmp_path / "o.jsonl", tmp_path / "whole.jsonl"
    prompts.write_text("".join(f"Ben has {n} bags of 4 cups. How many?\n" for n in range(2, 7)))
    flags = ("--prompts", prompts, "--cache", "all", "--gen-length", 8, "--block-length", 8,
             "--temperature", 0.5, "--batch-size", 2, "--steps", 2)
    assert sample(*flags, "--out", whole).out == f"{whole}: 5 prompts answered\n"
    expected = answers(whole)
    assert [(o["index"], o["cache"]) for o in expected] == [
        (i, c) for i in range(5) for c in ALL]
    out.write_text(sample(*flags, "--json").out)
    assert answers(out) == expected
    text = whole.read_bytes()
    ends = [i + 1 for i, b in enumerate(text) if b == 10]
    n = len(ALL)
    for cut in (0, 5, ends[0], ends[n - 1], ends[n + 1] + 40, ends[4 * n], len(text)):  # killed
        out.write_bytes(text[:cut])
        there = sum(e <= cut for e in ends) // n
        said = sample(*flags, "--out", out).out
        assert out.read_bytes().startswith(text[:ends[n * there - 1] if there else 0])
        assert answers(out) == expected
        assert said.endswith(f"{there} of them before\n" if there else "5 prompts answered\n")

def test_a_file_of_other_answers_is_left_alone(tmp_path):
    out = tmp_path / "o.jsonl"
    ask = ["--prompt", QUESTION, "--gen-length", 8, "--block-length", 8, "--out", out]
    sample(*ask)
    ours = out.read_text()
    cases = [(ours, flags) for flags in ("--raw", "--seed 1", "--cache none", "--refresh 4")]
    cases += [(content, "") for content in (
        "hello", "hello\n", '{"index": 7, "prompt": "precious"}', '{"index": 0}\n', "[1]\n",
        "\x00\n", ours[:-5].replace("Anna", "Emma"))]
    for content, flags in cases:
        out.write_text(content)
        assert "line 1" in sample(*ask, *flags.split(), code=2).err
        assert out.read_text() == content

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_run_writes_a_file(tmp_path, bare, monkeypatch, capsys, number):
    """A second one is refused before it loads; a lock of a killed run blocks nobody. Interrupted,
    it ends with exit code 130 and one sentence, and leaves no lock."""
    out, lock = tmp_path / "o.jsonl", tmp_path / ".o.jsonl.lock"
    flags = ["--ckpt", bare, "--ids", "3,4", "--cache", "all", "--gen-length", 8, "--out", out]
    with FileLock(lock), monkeypatch.context() as m:
        m.setattr(s, "load_checkpoint", lambda *_: pytest.fail("loaded before the lock"))
        assert "another run is writing" in launched(flags, capsys)[2]
    lock.write_text("")
    with monkeypatch.context() as m:
        m.setattr(s, "generate", lambda *a, **how: os.kill(os.getpid(), number) or time.sleep(9))
        code, _, err = launched(flags, capsys)
    said = f"stopped; the same command resumes after the answers in --out {out}\n"
    assert code == 130 and err == said and not out.read_text()
    assert sample(*flags).out == f"{out}: 1 prompts answered\n" and [*tmp_path.iterdir()] == [out]

def test_chat(wordy):
    """Through a pipe: messages in, answers out, with the earlier turns as long as they fit."""
    messages = [QUESTION, QUESTION, QUESTION, "/reset", "", QUESTION, "x " * 200, "/quit", "never"]
    p = sample("--chat", stdin="\n".join(messages).encode())
    alone = objects("--prompt", QUESTION)[0]
    said = [line for line in p.out.splitlines() if "tokens before" not in line]
    assert said.count(alone["text"]) >= 2, "the first, and the one after /reset"
    before = [int(n) for n in re.findall(r"\((\d+) tokens before", p.out)]
    assert before[0] == before[-1] == len(alone["prompt_ids"]) and before[1] > 2 * before[0]
    assert "is forgotten" in p.out and "more than the model's" in p.out and p.err == ""
    p = sample("--chat", "--ckpt", wordy, "--gen-length", 16, stdin=b"one " * 5 + b"\ntwo\nthree")
    assert "(questions that no longer fit and are left out: 1)" in p.out

def test_out_of_memory_is_one_sentence(bare, monkeypatch, capsys):
    faults = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
              RuntimeError("[enforce fail at alloc_cpu.cpp:124] . can't allocate memory"),
              IndexError()]  # a fault of ours, which shows itself
    def generate(*a, **how):
        raise faults.pop(0)
    monkeypatch.setattr(s, "generate", generate)
    ask = ["--ckpt", bare, "--ids", "3,4", "--gen-length", 8]
    for _ in range(3):
        code, _, err = launched(ask, capsys)
        assert code == 2 and err.endswith(
            ": there is not enough memory for this: lower --batch-size, or the lengths\n")
    with pytest.raises(IndexError):
        launch(lambda: s.main([*map(str, ask)]))

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The bundled model, and a causal one of its vocabulary that knows nothing."""
    model, tokenizer = load(TINY)
    guider = random_model(dtype=torch.float32, vocab_size=512, n_vocab=512, mask_id=511, eos_id=510,
                          eot_id=None, max_len=256, n_layer=1, causal=True, shift=True)
    path = tmp_path_factory.mktemp("pair") / "guider.pt"
    save(path, guider, tokenizer)
    return path

def test_a_guider(pair, tmp_path):
    """It changes how many tokens a step keeps, and nothing else: see tests/test_generate.py."""
    flags = ("--prompt", QUESTION, "--gen-length", 16, "--guider", pair)
    guided, more = objects(*flags)[0], objects(*flags, "--set", "window=0,16", "--set",
                                               "accept=topk", "--set", "accept_top_k=500")[0]
    assert guided["cache"] == "guided" and guided["settings"]["guider"] == str(pair)
    assert guided["guider_forwards"] == guided["forwards"] == guided["steps"] > more["forwards"]
    assert guided["guider_positions"] >= len(guided["prompt_ids"]) + 15
    assert more["settings"]["window"] == [0, 16]
    # a file resumes; the table has a column for the guider; the view has no total of steps
    out = tmp_path / "o.jsonl"
    said = [sample(*flags, "--out", out).out for _ in range(2)]
    assert said[1].endswith("1 of them before\n") and answers(out)[0]["ids"] == guided["ids"]
    assert re.search(r"guided +left_to_right +\d+ .*\d+\n$", sample(*flags).out)
    assert "guided, left_to_right" in sample(*flags, "--watch", 0).out
    # another vocabulary
    other = tmp_path / "other.pt"
    save(other, load(pair)[0], build_tokenizer("some other text " * 9, 270))
    assert "--guider" in sample(*flags[:4], "--guider", other, code=2).err

def test_a_causal_model(pair):
    flags = ("--ckpt", pair, "--prompt", QUESTION, "--gen-length", 16)
    found = objects(*flags)[0]
    assert found["cache"] == "autoregressive"
    assert found["positions_run"] == len(found["prompt_ids"]) + 15
    none, again = objects(*flags, "--cache", "all")
    assert none["ids"] == again["ids"] == found["ids"] and none["cache"] == "none"
    assert "a causal model writes from left to right" in sample(
        *flags, "--cache", "decode", code=2).err

def test_the_checkpoint_s_own_defaults(tmp_path):
    """Of a converted Dream. generate never reads them."""
    model, tokenizer = byte_model()
    model.extra = {"schedule": "dream", "remasking": "entropy"}
    save(tmp_path / "d.pt", model, tokenizer)
    flags = ("--ckpt", tmp_path / "d.pt", "--prompt", "Hi", "--gen-length", 8)
    own, given, thr = (objects(*flags, *more.split())[0]["settings"] for more in (
        "", "--schedule llada --remasking margin --top-p 0.9 --top-k 5", "--threshold 0.5"))
    names = ("schedule", "remasking", "top_p", "top_k")
    assert [own[s] for s in names] == ["dream", "entropy", None, None]
    assert [given[s] for s in names] == ["llada", "margin", 0.9, 5]
    assert [thr[s] for s in names[:2]] == ["llada", "low_confidence"]
