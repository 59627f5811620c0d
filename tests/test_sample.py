"""The command line, as a user types it: in a process of its own, with good and with bad input.

python -m pytest tests/test_sample.py"""
import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, forked, random_model

from dkv_min import generate
from model import Tokenizer, load, save
from sample import N_DEMO, encode, launch, load_checkpoint, main
from train_tiny import PATTERN, build_tokenizer, side

QUESTION = "Anna has 3 boxes of 4 pens. Monday she loses 5. How many pens are left?"


def sample(*flags, code=0, **how):
    [found], [out], [err] = forked(1, "sample.py", *flags, **how)
    assert found == code, out + err
    return SimpleNamespace(out=out, err=err)


def objects(*flags):
    """The lines of --json; in this process, to save the seconds of starting one."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*map(str, flags), "--json"]) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A checkpoint with neither problems nor tokenizer."""
    path = tmp_path_factory.mktemp("bare") / "bare.pt"
    save(path, random_model(dtype=torch.float32))
    return path


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """Random weights with a tokenizer: its text is anything, control characters included."""
    path = tmp_path_factory.mktemp("wordy") / "wordy.pt"
    tokenizer = build_tokenizer("some text ", 258)
    save(path, random_model(dtype=torch.float32, vocab_size=260, n_vocab=258, mask_id=257, eos_id=256, eot_id=None), tokenizer)
    return path


def test_no_flags(tmp_path):
    """The main job: questions that were held out, every cache, right or wrong, a table with counts and the fair rival."""
    p = sample(cwd=tmp_path, patch="sample.REPEATS = 1")
    questions = re.findall(r"^(\S.*)\n  none, low_confidence", p.out, re.M)
    model, _ = load(ROOT / "checkpoints" / "tiny.pt")
    assert len(questions) == N_DEMO and [q for q, _ in model.extra["problems"][:N_DEMO]] == questions
    for question, answer in model.extra["problems"]:
        assert side([int(n) for n in re.findall(r"(\d)\*(\d)=", answer)[0]] + [int(a + b) for a, b in re.findall(r"\d([+-])(\d)=", answer)]) == "test"
    table = [re.split(r" {2,}", line.strip()) for line in p.out.split("\n\n")[-1].splitlines()[1:]]
    assert [row[:2] for row in table[1:]] == [["none", "low_confidence"], ["decode", "low_confidence"], ["none", "left_to_right"],
                                              ["greedy", "left_to_right"], ["none", "low_confidence"]]
    for row in table[1:]:  # the table counts what stands above it
        name = f"{row[0]}, {row[1]}, {row[3]} steps"
        marks = re.findall(rf"^  {name} +(right|wrong)  (.*)$", p.out, re.M)
        answers = [answer for _, answer in model.extra["problems"][:N_DEMO]]
        assert [mark == "right" for mark, _ in marks] == [said == answer for (_, said), answer in zip(marks, answers)]
        assert row[4] == f"{sum(mark == 'right' for mark, _ in marks)}/{N_DEMO}", (row, marks)
    ran = [int(row[5].replace(",", "")) for row in table[1:]]
    assert ran[1] < ran[0] and ran[3] < ran[2] == ran[0] == 2 * ran[4]


@pytest.mark.parametrize("name", ["tiny.pt", "long.pt"])
def test_the_bundled_models_answer(name):
    model, tokenizer = load(ROOT / "checkpoints" / name, dtype=torch.float32)
    assert (ROOT / "checkpoints" / name).stat().st_size <= 8e6
    extra, right = model.extra, 0
    pairs = extra["problems"][:6]
    r = generate(model, [tokenizer.encode(extra["template"].replace("{}", q)) for q, _ in pairs], gen_length=extra["gen_length"], block_length=extra["block_length"])
    for (_, answer), tokens in zip(pairs, r.tokens):
        right += tokenizer.decode(tokens[-extra["gen_length"]:]).split("<|eos|>")[0] == answer
    assert right >= 5, f"{right} of 6 worked answers right"


def test_json_agrees_with_the_library():
    fields = ["index", "prompt", "cache", "settings", "prompt_ids", "ids", "text", "forwards", "positions_run", "positions_full", "seconds"]
    found = objects("--prompt", QUESTION, "--prompt", "Short?", "--cache", "all", "--temperature", 0.7, "--seed", 3)
    assert [list(o) for o in found] == [fields] * 6
    assert [(o["index"], o["cache"]) for o in found] == [(i, c) for i in (0, 1) for c in ("none", "decode", "greedy")]
    model, tokenizer = load(ROOT / "checkpoints" / "tiny.pt")
    for o in found:
        assert o["prompt_ids"] == tokenizer.encode(model.extra["template"].replace("{}", o["prompt"]))
        assert len(o["ids"]) == model.extra["gen_length"] == o["forwards"] and o["seconds"] > 0
        ids = o["ids"][:o["ids"].index(model.config.eos_id)] if model.config.eos_id in o["ids"] else o["ids"]
        assert o["text"] == tokenizer.decode(ids)
        assert o["positions_full"] == o["forwards"] * (len(o["prompt_ids"]) + len(o["ids"]))
        assert (o["positions_run"] < o["positions_full"]) == (o["cache"] != "none")


def test_answers_depend_neither_on_the_batch_nor_on_the_rest(tmp_path):
    (tmp_path / "p.txt").write_text(f"{QUESTION}\n\nBen has 2 bags of 9 cups.\nHow many?\n")
    how = ("--prompts", tmp_path / "p.txt", "--temperature", 1, "--remasking", "random", "--cache", "greedy")
    alone, together = ([o["ids"] for o in objects(*how, "--batch-size", n)] for n in (1, 3))
    assert alone == together and len(alone) == 3
    assert alone != [o["ids"] for o in objects(*how, "--seed", 1)]


def test_prompts_from_everywhere(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "one\ntwo", "other": 1}) + "\n\n" + json.dumps({"prompt": "é\u2028è"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [o["prompt"] for o in objects("--prompts", tmp_path / "p.jsonl", "--steps", 2)] == ["one\ntwo", "é\u2028è"]
    piped = sample("--prompts", "-", "--steps", 2, "--json", stdin=b"a\r\n\nb\n")
    assert [json.loads(line)["prompt"] for line in piped.out.splitlines()] == ["a", "b"]
    assert [(o["prompt"], o["prompt_ids"]) for o in objects("--ids", "5, 6,7", "--steps", 2)] == [(None, [5, 6, 7])]
    assert "<|mask|>" in objects("--prompt", "<|mask|>", "--steps", 2)[0]["prompt"]  # text, not the mask


def test_a_checkpoint_without_tokenizer_or_problems(bare, wordy):
    o = objects("--ckpt", bare, "--ids", "3,4", "--gen-length", 8)[0]
    assert o["text"] is None and len(o["ids"]) == 8
    assert "--ids" in sample("--ckpt", bare, "--prompt", "hi", code=2).err
    assert "gen_length is 0" in sample("--ckpt", bare, "--ids", "3", "--gen-length", 0, code=2).err
    out = sample("--ckpt", wordy, "--prompt", "hi", "--gen-length", 32, "--cache", "all").out
    assert "right" not in out and "exact" not in out and "half" not in out and "16 steps" in out
    assert all(c == "\n" or c.isprintable() for c in out)  # the model cannot drive the terminal


def test_flags_reach_the_library(bare):
    def run(*flags):
        return objects("--ckpt", bare, "--ids", "3,4", "--gen-length", 16, *flags)[0]
    assert run("--cache", "decode", "--refresh", "never")["positions_run"] == run("--cache", "decode", "--refresh", 16)["positions_run"]
    assert run("--cache", "decode", "--refresh", 1)["ids"] == run("--cache", "none")["ids"]
    assert run("--cache", "decode", "--no-delay")["positions_run"] < run("--cache", "decode")["positions_run"]
    assert run("--cache", "greedy", "--window", 0)["positions_run"] < run("--cache", "greedy")["positions_run"]
    assert run("--cache", "none", "--cfg-scale", 2)["ids"] != run("--cache", "none")["ids"]
    assert run("--steps", 4, "--block-length", 8)["forwards"] == 4
    assert run("--dtype", "bfloat16", "--device", "cpu")["forwards"] == 16


def test_flags_about_the_end_of_the_text(tmp_path):
    model = random_model(dtype=torch.float32)
    model.head.weight.data[1] *= 3  # EOS often
    save(tmp_path / "a.pt", model)
    ask = ("--ckpt", tmp_path / "a.pt", "--ids", "3,4", "--gen-length", 16, "--block-length", 4)
    assert 1 in objects(*ask)[0]["ids"] and objects(*ask)[0]["forwards"] == 16
    assert 1 not in objects(*ask, "--suppress-eos", "logits")[0]["ids"]
    assert objects(*ask, "--stop-at-eos")[0]["forwards"] < 16
    assert objects(*ask, "--suppress-eos", "confidence", "--block-length", 16)[0]["ids"] != objects(*ask, "--block-length", 16)[0]["ids"]


def test_a_closed_pipe_is_no_fault(tmp_path):
    (tmp_path / "p.txt").write_text("hello\n" * 40)
    p = subprocess.run(f"{sys.executable} {ROOT / 'sample.py'} --prompts {tmp_path / 'p.txt'} --steps 2 --cache all --json | head -n 1", shell=True,
                       capture_output=True, text=True, timeout=200)
    assert p.stderr == "" and json.loads(p.stdout)["index"] == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_one_sentence():
    p = subprocess.run(f"{sys.executable} {ROOT / 'sample.py'} --prompt hi --steps 2 --json > /dev/full", shell=True, capture_output=True, text=True, timeout=200)
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and "cannot write" in p.stderr, p.stderr


WRONG = [
    (["--ckpt", "nothing"], "nothing"), (["--ckpt", str(ROOT / "README.md")], "README.md"), (["--ckpt", str(ROOT)], "directory"), (["--ckpt", "/dev/zero"], "device"), (["--chat", "--json"], "--chat"), (["--json", "--out", "x"], "--out"), (["--out", "/nowhere/x"], "--out"), (["--out", "/dev/full"], "device"), (["--out", ""], "--out"), (["--prompts", __file__, "--out", __file__], "--out"),
    (["--prompts", "/no/such"], "/no/such"), (["--prompts", str(ROOT)], "directory"), (["--ids", "1,x"], "1,x"), (["--ids", "999999"], "999999"), (["--ids", ""], "--ids"),
    (["--prompt", ""], "empty"), (["--prompt", "caf\udce9"], "UTF-8"), (["--prompt", "\udce9" * 5000], "UTF-8"), (["--ids", "x" * 5000], "--ids"), (["--cache", "fast"], "fast"), (["--refresh", "0"], "--refresh"), (["--refresh", "often"], "often"),
    (["--gen-length", "0"], "gen_length is 0"), (["--gen-length", "10", "--block-length", "4"], "no multiple"), (["--steps", "7", "--block-length", "8"], "steps"),
    (["--window", "-1", "--cache", "greedy"], "window"), (["--temperature", "-1"], "temperature"), (["--temperature", "nan"], "temperature"), (["--cfg-scale", "-1"], "cfg_scale"),
    (["--cache", "greedy", "--remasking", "low_confidence"], "greedy"), (["--batch-size", "0"], "--batch-size"), (["--prompt", "word " * 2000], "more than the model"),
    (["--frobnicate"], "--frobnicate"), (["--f\x1b[2J\nx"], "--f\\x1b[2J\\nx"), (["--seed", "x"], "x"), (["--block-length", "0"], "block_length is 0"), (["--gen-length", "-8"], "gen_length"),
]


@pytest.mark.parametrize("flags, words", WRONG, ids=lambda w: str(w)[:40])
def test_user_errors_are_one_sentence(flags, words, capsys, monkeypatch):
    """In this process, to save the seconds of starting one; the next test has the whole way."""
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(SystemExit) as e:
        launch(lambda: main(flags))
    out, err = capsys.readouterr()
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and out == "", err
    assert len(err) < 400, "what a user typed is quoted in short"


@pytest.mark.parametrize("flags, words", [(["--prompt", b"caf\xe9"], "UTF-8"), (["--ckpt", "nothing"], "nothing"), (["--frobnicate"], "--frobnicate"),
                                          (["--steps", "7", "--block-length", "8"], "steps")])
def test_user_errors_in_a_process_of_their_own(flags, words):
    p = subprocess.run([sys.executable, str(ROOT / "sample.py"), *flags], capture_output=True, text=True, timeout=200)
    assert p.returncode == 2 and words in p.stderr and p.stderr.count("\n") == 1 and p.stdout == "", p.stderr


def test_llada_is_not_fetched_unasked(tmp_path):
    """Without a terminal to ask on; where the packages for it are missing, they are named instead."""
    p = sample("--ckpt", "llada-1.5", "--prompt", "Hello", code=2, patch=f"import os; os.environ['HF_HOME'] = {str(tmp_path)!r}")
    assert p.out == "" and not (ROOT / "checkpoints" / "llada-1.5.pt").exists()
    last = p.err.splitlines()[-1]
    if importlib.util.find_spec("huggingface_hub") and importlib.util.find_spec("safetensors"):
        assert "--yes" in last and "GSAI-ML/LLaDA-1.5 will be fetched: 16 GB" in p.err
    else:
        assert "requirements-llada.txt" in last
    for wrong in (["--prompts", tmp_path / "nothing"], ["--prompt", "x", "--ids", "a"]):  # found before anything is announced
        with pytest.raises(ValueError) as e:
            main(["--ckpt", "llada-1.5", *map(str, wrong)])
        assert str(e.value).split()[0] in ("cannot", "--ids")


def said_by(*flags):
    """What main prints, in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*map(str, flags)]) == 0
    return out.getvalue()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_go_to_a_file_and_on_where_they_stopped(tmp_path):
    prompts, out, whole = tmp_path / "p.txt", tmp_path / "o.jsonl", tmp_path / "whole.jsonl"
    prompts.write_text("".join(f"Ben has {n} bags of 4 cups. Monday he finds 3. How many cups are left?\n" for n in range(2, 7)))
    flags = "--prompts", prompts, "--cache", "all", "--gen-length", 8, "--block-length", 8, "--temperature", 0.5, "--batch-size", 2
    assert said_by(*flags, "--out", whole) == f"{whole}: 5 prompts answered\n"
    expected = [{k: v for k, v in o.items() if k != "seconds"} for o in lines(whole)]
    assert [(o["index"], o["cache"]) for o in expected] == [(i, c) for i in range(5) for c in ("none", "decode", "greedy")]
    assert expected == [{k: v for k, v in o.items() if k != "seconds"} for o in objects(*flags)]
    text = whole.read_bytes()
    ends = [i + 1 for i, b in enumerate(text) if b == 10]
    for cut in (0, 5, ends[0], ends[2], ends[4] + 40, ends[13], len(text)):  # a run killed anywhere
        out.write_bytes(text[:cut])
        there = sum(e <= cut for e in ends) // 3
        kept = lines(whole)[:3 * there]
        said = said_by(*flags, "--out", out)
        assert lines(out)[:3 * there] == kept, "an answer was given twice"
        assert [{k: v for k, v in o.items() if k != "seconds"} for o in lines(out)] == expected
        assert said.endswith(f"{there} of them before\n" if there else "5 prompts answered\n")


def test_a_file_of_other_answers_is_left_alone(tmp_path):
    out = tmp_path / "o.jsonl"
    flags = "--gen-length", 8, "--block-length", 8
    said_by("--prompt", QUESTION, *flags, "--out", out)

    def refused(words, *flags):
        before = out.read_bytes()
        with pytest.raises(ValueError, match=words):
            said_by(*flags, "--out", out)
        assert out.read_bytes() == before

    for other in (["--prompt", "Something else?", *flags], ["--prompt", QUESTION, *flags, "--seed", 1], ["--prompt", QUESTION, *flags, "--cache", "none"], ["--prompt", QUESTION, "--gen-length", 4, "--block-length", 4]):
        refused("line 1", *other)
    for content in ("hello", "hello\n", '{"index": 7, "prompt": "precious"}', out.read_text()[:-5].replace("Anna", "Emma"), '{"index": 0}\n', "[1]\n", "\x00\n"):
        out.write_text(content)
        refused("line 1", "--prompt", QUESTION, *flags)
    import fcntl
    out.write_text("")
    with open(out, "ab") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        refused("another run", "--prompt", QUESTION, *flags)


def test_chat(bare):
    """Through a pipe: messages in, answers out, with what was said before as long as there is room."""
    p = sample("--chat", stdin="\n".join([QUESTION, QUESTION, QUESTION, "/reset", "", QUESTION, "x " * 200, "/quit", "never read"]).encode())
    alone = objects("--prompt", QUESTION)[0]
    said = [line for line in p.out.splitlines() if "tokens before" not in line]
    assert said.count(alone["text"]) >= 2, "the first, and the one after /reset"
    before = [int(n) for n in re.findall(r"\((\d+) tokens before", p.out)]
    assert before[0] == before[-1] == len(alone["prompt_ids"]) and before[1] > 2 * before[0]
    assert "what was said is forgotten" in p.out and "more than the model's" in p.out and p.err == ""
    with pytest.raises(ValueError, match="no tokenizer"):
        main(["--chat", "--ckpt", str(bare)])
    p = subprocess.run(f"{sys.executable} {ROOT / 'sample.py'} --chat </dev/null >&-", shell=True, capture_output=True, text=True)
    assert p.returncode == 2 and "open stdin" in p.stderr and p.stderr.count("\n") == 1, p.stderr


def test_the_raw_prompt_and_llada_s_template():
    model, tokenizer = load(ROOT / "checkpoints" / "tiny.pt")
    plain, raw = objects("--prompt", "How many?")[0], objects("--prompt", "How many?", "--raw")[0]
    assert tokenizer.decode(plain["prompt_ids"]) == "How many?\n" and tokenizer.decode(raw["prompt_ids"]) == "How many?"
    special = {"<|startoftext|>": 300, "<|start_header_id|>": 301, "<|end_header_id|>": 302, "<|eot_id|>": 303, "<|endoftext|>": 304}
    t = Tokenizer({bytes([b]): b for b in range(256)}, PATTERN, special)
    found = encode([" Hi <|eot_id|>", "Yes. ", "So?"], t, {"chat": "llada"})
    spelled = ("<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi @<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\nSo?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    before, after = (t.encode(part, special=True) for part in spelled.split("@"))
    assert found == before + list(b"<|eot_id|>") + after, "what a user types is text, not a special token"
    assert encode(["a", "b", "c"], t, {"chat": "llada"}, raw=True) == list(b"ab\nc")


def test_prompt_files_that_cannot_be_read(tmp_path):
    for name, content, words in (("latin.txt", b"caf\xe9\n", "not UTF-8"), ("empty.txt", b"\n\n", "no prompt"), ("key.jsonl", b'{"question": "x"}\n', "`prompt`"),
                                 ("none.jsonl", b'{"prompt": ""}\n', "empty"), ("number.jsonl", b'{"prompt": 3}\n', "text"), ("cut.jsonl", b'{"prompt": ', "JSON"),
                                 ("digits.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", "JSON"), ("deep.jsonl", b'{"prompt": ' + b"[" * 100000, "JSON")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            main(["--prompts", str(tmp_path / name)])
    assert "not UTF-8" in sample("--prompts", "-", code=2, stdin=b"\xff\xfe").err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent():
    assert "CUDA" in sample("--device", "cuda", code=2).err


def test_sigterm_while_a_file_is_answered(tmp_path, bare, monkeypatch, capsys):
    """As Ctrl-C: exit code 130, one sentence, and the same command goes on."""
    import signal

    import sample as s
    out, real = tmp_path / "o.jsonl", s.generate
    flags = ["--ckpt", str(bare), "--ids", "3,4", "--cache", "all", "--gen-length", "8", "--out", str(out)]
    for number in (signal.SIGTERM, signal.SIGINT):
        monkeypatch.setattr(s, "generate", lambda *a, **how: os.kill(os.getpid(), number) or real(*a, **how))
        with pytest.raises(SystemExit) as e:
            launch(lambda: main(flags))
        assert e.value.code == 130 and capsys.readouterr().err == f"stopped; the same command goes on behind what --out {out} holds\n" and not out.read_text()
    monkeypatch.setattr(s, "generate", real)
    assert said_by(*flags) == f"{out}: 1 prompts answered\n"


def test_out_of_memory_is_one_sentence(bare, monkeypatch, capsys):
    import sample as s
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    for e in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")):
        def generate(*a, **how):
            raise e
        monkeypatch.setattr(s, "generate", generate)
        with pytest.raises(SystemExit) as exit:
            launch(lambda: main(["--ckpt", str(bare), "--ids", "3,4", "--gen-length", "8"]))
        assert exit.value.code == 2 and capsys.readouterr().err == "sample.py: there is not enough memory for this: lower --batch-size, or the lengths\n"
    monkeypatch.setattr(s, "generate", lambda *a, **how: [][0])  # anything else is a fault of ours, and shows itself
    with pytest.raises(IndexError):
        launch(lambda: main(["--ckpt", str(bare), "--ids", "3,4", "--gen-length", "8"]))


@pytest.mark.parametrize("amx, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_a_cpu_multiplies_in_it(tmp_path, monkeypatch, amx, dtype):
    """From ten million parameters on: below, small operations take the time, and answers should be the same everywhere."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    save(tmp_path / "a.pt", random_model(dtype=torch.float32, vocab_size=160_000, n_vocab=160_000))
    assert load_checkpoint(str(tmp_path / "a.pt"), "cpu", "auto")[0].wte.weight.dtype == dtype
    save(tmp_path / "b.pt", random_model(dtype=torch.bfloat16))
    assert load_checkpoint(str(tmp_path / "b.pt"), "cpu", "auto")[0].wte.weight.dtype == torch.float32
