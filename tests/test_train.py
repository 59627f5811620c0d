"""The toy corpus, its tokenizer, and training runs of a few seconds through the real script."""
import functools
import itertools
import os
import random
import re
import shlex
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
import regex
import torch
from conftest import ENDLESS, REFUSED, ROOT, byte_model, scripts

from model import load, save
from support import checkpoint
from support.cli import launch
from support.evaluate import answer_problems, text_of
from support.problems import problems, side
from support.tokenizer import PATTERN, build_tokenizer, train_bpe

t = scripts()["train_tiny.py"]  # which builds a tokenizer once and not in every run
RESUME, TERMINATE = "--resume --out a.pt ", lambda model: signal.raise_signal(signal.SIGTERM)
SMALL = ("--n-layer 1 --n-head 2 --n-embd 32 --batch-size 16 --threads 1 --device cpu --eval 0 "
         "--out a.pt ")
STEPS = SMALL + "--amp off --steps 20 --val-every 6 "
DATA = t.Problems(t.parse_args([])[0])
DUCKS = "".join(f"{i} little ducks went out to play. Été, naïve! " for i in range(400))

@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    """Trains in this process, in tmp_path; do(model) happens while the loss of step `at` is
    computed -> stdout, stderr"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_tiny.py"])
    both = {name: getattr(t, name) for name in ("diffusion_loss", "causal_loss")}

    def run(flags, code=0, at=-1, do=None):
        steps = itertools.count()
        def loss(real, model, *batch):  # a validation has no gradients
            found = do(model) if torch.is_grad_enabled() and next(steps) == at else None
            return found if torch.is_tensor(found) else real(model, *batch)
        for name, real in both.items():
            monkeypatch.setattr(t, name, functools.partial(loss, real))
        with pytest.raises(SystemExit) as e:
            launch(lambda: t.main(shlex.split(flags)))
        out, err = capsys.readouterr()
        assert e.value.code == code and "Traceback" not in err, out + err
        return out, err
    return run

def files():
    return {path.name: path.read_bytes() for path in Path().iterdir()}

def numbers(answer):
    """The numbers of a worked answer with their signs: 7, 8, -9 of 7*8-9. All its sums are right"""
    steps = re.findall(r"(\d+)([*+-])(\d+)=(\d+)\.", answer)
    after = [*(first for first, *_ in steps[1:]), answer.split("#### ")[1]]
    for (a, op, b, result), following in zip(steps, after, strict=True):
        assert eval(a + op + b) == int(result) and result == following
    return [int(steps[0][0]), *(int(op.strip("*") + b) for _, op, b, _ in steps)]

def test_answers_are_right_and_sides_are_disjoint():
    sides = {"train": set(), "validation": set(), "test": set()}
    for which, found in sides.items():
        for question, answer in problems(random.Random(5), 3000, (1, 4), which):
            a, b, *rest = given = numbers(answer)
            assert re.findall(r"\d+", question) == [str(abs(n)) for n in given]
            found.add((min(a, b), max(a, b), *rest))  # 3*4 is 4*3
    train, validation, test = sides.values()
    assert min(map(len, sides.values())) > 500
    assert not train & test and not train & validation and not validation & test

def slow_bpe(text, n):
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(PATTERN, text)]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < n:
        count = Counter(pair for word in words for pair in zip(word, word[1:]))
        pair = max(count, key=lambda p: (count[p], p), default=None)
        if count[pair] < 2:
            break
        ranks.setdefault(b"".join(pair), len(ranks))
        for word in words:
            for j in range(len(word)):
                if tuple(word[j:j + 2]) == pair:
                    word[j:j + 2] = [b"".join(pair)]
    return ranks

def test_bpe():
    rng, low = random.Random(0), "low lower lowest newer newest 2024 2024 2024 " * 30
    texts = [low, "aaaa aaaaa aaaaaaa bababab abab " * 9, "", "a", "\0\0a\0\0\0b" * 9, DUCKS[:2000],
             "".join(rng.choices("ACGT", k=2000)), "".join(rng.choices("一二三四五", k=900))]
    for text, n in itertools.product(texts, (256, 258, 330)):
        assert [*train_bpe(text, n).items()] == [*slow_bpe(text, n).items()], text[:40]
    # one endless word took 40 seconds: every merge went through all of it. Now it takes one
    began, dna = time.process_time(), "".join(rng.choices("ACGT", k=300_000))
    assert len(build_tokenizer(dna, 512).encode(dna)) < 110_000
    assert time.process_time() - began < 15
    # tiny.pt's corpus still gives tiny.pt's tokenizer
    bundled = checkpoint.read(ROOT / "checkpoints" / "tiny.pt")
    d = t.Problems(t.parse_args(["--preset", "bundled"])[0])
    assert d.tokenizer.state() == d.tokenizer.state() | bundled["tokenizer"]
    assert d.extra["problems"] == bundled["extra"]["problems"]

def test_batches_of_sums():
    tokens, masked, weight, pad = DATA.batch(199)  # the last step of the first tenth
    assert tokens.shape == (64, 72) and not pad.any()
    assert torch.allclose((weight * masked).sum(1), torch.ones(64))
    (equal, dot), shown, results = DATA.tokenizer.encode("=."), [], set()
    for row, m, w in zip(tokens.tolist(), masked.tolist(), (weight > 0).tolist()):
        assert "left?" not in DATA.tokenizer.decode(row)
        for i in range(1, 72):  # what counts follows an = that is seen, at most one digit later
            assert not w[i] or equal in [x for x, h in zip(row[i - 2:i], m[i - 2:i]) if not h]
        after = row.index(dot, max(i for i in range(72) if w[i]))
        assert all(m[after:]) and not any(w[after:])
        equals = [i for i in range(after) if row[i] == equal]
        shown += [not m[i + 1] for i in equals if row.index(dot, i) - i == 3]
        results.add(len(equals))
    assert 0.35 < sum(shown) / len(shown) < 0.65 and len(results) > 3

def test_batches_of_tails_stories_and_sums():
    decode, asked, after = DATA.tokenizer.decode, set(), ([], [])
    for step in range(200, 220):
        tokens, masked, weight, pad = DATA.batch(step)
        P, texts = tokens.shape[1] - 32, [decode(row) for row in tokens]
        assert ["left?" in text for text in texts] == [True] * 56 + [False] * 8
        assert pad[:56].min() == 0 and not pad[56:].any()  # no column is padding in all rows
        for row, m, p in zip(tokens[:56], masked, pad):
            assert decode(row[p:P]).endswith("left?\n") and not m[:P].any()
            assert side(numbers(decode(row[P:]).split("<")[0])) == "train"
        assert torch.allclose(weight[:21].sum(1), torch.ones(21))
        assert not (weight[:21][~masked[:21]] > 0).any()
        for r, (row, m, w) in enumerate(zip(tokens[:21], masked, weight)):  # tails
            i = m.int().argmax()
            assert m[i:].all() and not m[:i].any() and w[i] > 0
            assert re.fullmatch(r"[^.]*\.|[^.]*<\|eos\|>", decode(row[w > 0]))
            asked.add(decode([row[i]]).strip())
            after[r % 2].append("=" in decode(row[i - 3:i]))
    assert sum(after[1]) > 1.5 * sum(after[0])  # every other row asks for a result
    # every kind of token is asked for with nothing to its right
    assert asked > {"=", ".", "Monday", "####", "<|eos|>"}
    # the rows of validation, whole
    pairs = problems(random.Random("validation"), 256, DATA.args.ops, "validation")
    for (question, answer), row, p in zip(pairs, *(part.tolist() for part in DATA.val[:2])):
        assert decode(row[:40]) == "<|eos|>" * p + question + "\n"
        assert re.fullmatch(re.escape(answer) + r"(<\|eos\|>)+", decode(row[40:]))
    assert (DATA.val[2] == (torch.arange(72) < 40)).all()  # frozen

def test_loss_falls_and_the_file_answers(train):
    out, _ = train(SMALL + "--steps 150 --val-every 75 --eval 4 --sums 0")
    first, second = map(float, re.findall(r"validation ([\d.]+) nats per token\n", out))
    assert second < first < 6.3 and second < 3, out
    assert re.search(r"greedy +left_to_right +\d of 4 exact .* 1\.\d\dx fewer", out), out
    assert load("a.pt")[0].wte.weight.dtype == torch.bfloat16
    model, tokenizer = load("a.pt", dtype=torch.float64)
    assert {*files()} == {"a.pt", "a.pt.train"} and len(model.extra["problems"]) == 1000
    # random orders belong to the problem, whatever the batches are
    how = dict(cache="greedy", remasking="random", temperature=1.0)
    two, one = (answer_problems(model, tokenizer, 1, 4, size, **how) for size in (2, 1))
    assert (two.right, two.steps) == (one.right, one.steps) and two.ids == one.ids
    assert two.ids[2:] == answer_problems(model, tokenizer, 3, 2, **how).ids
    assert len(set(map(tuple, two.ids))) == 4 and 0 < two.positions_run < two.positions_full
    question, _ = model.extra["problems"][2]
    model.extra["problems"][2] = question, text_of(two.ids[1], model, tokenizer).strip()
    right = answer_problems(model, tokenizer, 1, 4, 2, **how).right
    assert not any(two.right) and right == [False, True, False, False]

@pytest.mark.parametrize("more", ["", pytest.param("--causal ", marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_same_bits(train, more):
    """By SIGTERM and Ctrl-C, which save and exit with 130, or at any moment after a save."""
    train(STEPS + more + "--out whole.pt")
    out, _ = train(STEPS + more, code=130, at=3, do=TERMINATE)
    assert "stopped after 3 steps; to resume: " in out and "--resume" in out
    assert load("a.pt")[1] is not None  # nothing was validated, but better than none
    steps = [checkpoint.read("a.pt.train")["step"]]
    # saves by the clock; the first one is before the first step of this run
    for flags, code, at, number in (("--save-minutes 0", 9, 1, 0), ("--save-minutes 0", 9, 2, 0),
                                    ("", 130, 4, signal.SIGINT)):
        train(RESUME + flags, code=code, at=at,
              do=lambda model: signal.raise_signal(number) if number else sys.exit(9))
        steps.append(checkpoint.read("a.pt.train")["step"])
    assert steps == [3, 3, 4, 8]
    Path("a.pt.train.123.tmp").write_text("of a run that was killed while it saved")
    train(RESUME)
    assert not list(Path().glob("*.tmp"))
    whole, found = (checkpoint.read(f"{name}.pt.train")["weights"] for name in ("whole", "a"))
    assert all(torch.equal(w, found[k]) for k, w in whole.items())

def test_causal_models_and_those_like_another(train):
    """Of problems and of a text: lengths, tokenizer and ops are the other model's."""
    train(SMALL + "--steps 2 --vocab 400 --ops 2 3 --prompt-len 56 --gen-length 48 "
          "--block-length 16")
    out, _ = train(SMALL + "--steps 150 --val-every 75 --causal --like a.pt --out b.pt --eval 3")
    first, second = map(float, re.findall(r"validation ([\d.]+) nats per token\n", out))
    assert second < first < 6.3 and second < 3, out
    assert re.search(r"\nnone {28}\d of 3 .*\nautoregressive {18}\d of 3 .* 4\d\.\d\dx", out), out
    (a, tokens), (b, others) = load("a.pt"), load("b.pt")
    assert tokens.state() == others.state() and a.extra == b.extra
    assert (b.config.causal, b.config.max_len) == (True, a.config.max_len) == (True, 208)
    two = [answer_problems(b.float(), others, n=3, cache=c).ids for c in ("none", "autoregressive")]
    assert two[0] == two[1]
    Path("my.txt").write_text(DUCKS, encoding="utf-8")
    train(SMALL + "--data my.txt --steps 2 --vocab 300 --gen-length 24 --block-length 8 --out t.pt")
    train(SMALL + "--data my.txt --causal --like t.pt --steps 2 --out u.pt")
    (a, tokens), (b, others) = load("t.pt"), load("u.pt")
    assert tokens.state() == others.state() and a.extra == b.extra

def test_what_stops_a_run_keeps_the_last_good_checkpoint(train):
    infinite = Mock(return_value=torch.tensor(torch.inf, requires_grad=True))
    steep = Mock(side_effect=lambda model: model.norm.weight.register_hook(lambda g: g * torch.nan))
    full_gpu = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 G"))
    train(STEPS, code=130, at=8, do=TERMINATE)
    kept = files()
    for do, words in ((infinite, "the loss is inf at step 10: lower --lr and start again;"),
                      (steep, "the gradient is nan at step 10"), (full_gpu, "raise --accumulate")):
        _, err = train(RESUME, code=2, at=2, do=do)
        assert re.match(f"train_tiny.py: .*{words}", err.splitlines()[-1]) and files() == kept, err
    # it said "keeps the best model so far" of a file that did not exist
    _, err = train(STEPS + "--out b.pt", code=2, at=3, do=infinite)
    assert err.endswith("is inf at step 3: lower --lr and start again\n"), err
    assert {*files()} == {"a.pt", "a.pt.train"}

def test_resume_refuses_what_it_cannot_continue(train):
    train(SMALL + "--steps 2")
    state, resume = torch.load("a.pt.train"), "--resume --out b.pt"
    odd = {"ENDLESS": ENDLESS, "TENSOR": torch.ones(2)}  # a campaign hung on the first
    for name, value, words in REFUSED["resume"]:
        value = odd.get(value, value) if isinstance(value, str) else value
        torch.save(state | {"args": state["args"] | {name: value}}, "b.pt.train")
        assert words in train(resume, code=2)[1]

@pytest.mark.parametrize("more", ["", "--causal "])
def test_resume_knows_its_text(train, monkeypatch, more):
    """From another folder it did not find the text, or took another one that it found there."""
    os.mkdir("b")
    Path("my.txt").write_text(DUCKS, encoding="utf-8")
    Path("b/my.txt").write_text(DUCKS.replace("duck", "goat"), encoding="utf-8")
    out, _ = train(SMALL + more + "--data my.txt --steps 6 --val-every 3")
    first, second = map(float, re.findall(r"validation ([\d.]+) nats per token\n", out))
    assert second < first and "nats per byte" in out
    monkeypatch.chdir("b")
    resume, another = "--resume --out ../a.pt ", "is not the text that the run was started with"
    train(resume)  # with the text of the folder above
    assert another in train(resume + "--data my.txt", code=2)[1]
    os.rename("../my.txt", "moved.txt")
    assert "--data FILE" in train(resume, code=2)[1]
    Path("../my.txt").write_text(DUCKS[::-1], encoding="utf-8")
    assert another in train(resume, code=2)[1]
    train(resume + "--data moved.txt")

def test_prompts_of_a_text_hold_whole_characters(tmp_path):
    """They were cut at a token: two of three ended with U+FFFD and encoded to other ids."""
    text = "".join(random.Random(0).choices("天地玄黄宇宙洪荒日月盈昃辰宿列张，。🙂", k=4000))
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    for n in (8, 9, 10, 1):
        d = t.Text(t.parse_args(["--data", str(tmp_path / "my.txt"), "--prompt-len", str(n)])[0])
        ids = [d.tokenizer.encode(prompt) for prompt in d.extra["prompts"]]
        assert len(ids) == 3 and all(prompt in text for prompt in d.extra["prompts"])
        assert n == 1 or all(n - 4 < len(row) <= n for row in ids)  # 1: a whole character instead

@pytest.mark.parametrize("line", [*open(ROOT / "tests" / "errors_train.txt")])
def test_user_errors(line, train, monkeypatch):
    flags, words = line.strip().split(" | ")
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    texts = dict.fromkeys(["my.txt", "notes.md", "m.pt.train"], DUCKS.encode())
    texts |= {"latin.txt": b"caf\xe9 " * 100, "short.txt": b"too short", "empty.txt": b""}
    for name, text in texts.items():
        Path(name).write_bytes(text)
    model, tokenizer = byte_model()
    save("plain.pt", model, tokenizer)
    model.extra |= dict(gen_length=8)
    save("text.pt", model, tokenizer)
    torch.save({"x": 1}, "other.pt.train")
    torch.save(dict(args={}, step=0, best=1.0, weights={}, optimizers=[]), "old.pt.train")
    before = files()
    monkeypatch.setattr(t, "train", None)  # reported before the first step
    out, err = train(flags, code=2)
    assert words in err and err.count("\n") == 1 and not out and files() == before, err
