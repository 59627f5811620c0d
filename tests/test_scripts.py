"""scripts/accuracy.py and bench.py, and the user errors of these and of figures.py."""
import contextlib
import io
import json
import math
import shlex

import pytest
import torch
from conftest import REFUSED, random_model

from caches import CACHES, COSTS
from dkv_min import cache_cost, generate
from model import save
import sample
from scripts import accuracy, bench, figures
from support.arithmetic import work
from support.evaluate import encode, text_of
from support.tokenizer import build_tokenizer

def toy(path, n_layer=3, G=16):
    """Random weights, a tokenizer of bytes, and three problems. The model gives the answer that the
    second one has."""
    model = random_model(dtype=torch.float32, n_layer=n_layer, vocab_size=260, n_vocab=258,
                         mask_id=257, eos_id=256, eot_id=None)
    tokenizer = build_tokenizer("some text ", 258)
    prompt = tokenizer.encode("and now\n")
    ids = generate(model, [prompt], gen_length=G, block_length=G // 2).tokens[0][-G:]
    right = text_of(ids, model, tokenizer).strip()
    model.extra = dict(problems=[("how many", "none"), ("and now", right), ("who", "nobody")],
                       gen_length=G, block_length=G // 2, template="{}\n",
                       known_order="left_to_right")
    save(path, model, tokenizer)
    return model, [encode([q], tokenizer, model.extra) for q, _ in model.extra["problems"]]

def cost(prompts, how, G=16):
    """Positions by the closed form, for the settings of a run of toy()."""
    own = {name: value for name, value in how.items() if name not in ("steps", "remasking")}
    return sum(cache_cost(len(ids), G, round(G * how.get("steps", 1)), G // 2, **own)
               for ids in prompts)

def run(main, *flags):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*map(str, flags)]) == 0
    return out.getvalue()

def refused(main, flags, words):
    with pytest.raises(ValueError) as e:
        main([*map(str, flags)])
    assert words in str(e.value) and "\n" not in str(e.value)

def test_intervals():
    newcombe, by_hand = (30.80, 25.53, 36.62), (10, 3.425, 16.183)  # 1998, table I
    assert accuracy.wilson(0, 10) == pytest.approx((0, 0, 27.75), abs=0.01)
    assert accuracy.wilson(81, 263) == pytest.approx(newcombe, abs=0.01)
    a, b = [True] * 50 + [False] * 50, [True] * 40 + [False] * 60
    assert accuracy.paired(a, b) == pytest.approx(by_hand, abs=0.001)
    difference, low, high = accuracy.paired(a, b)
    assert accuracy.paired(b, a) == pytest.approx((-difference, -high, -low))
    assert accuracy.paired([True] * 10, [False] * 10)[2] == 100
    same, low, high = accuracy.paired(a, a)
    assert same == 0 and low < 0 < high  # never certain

@pytest.fixture(scope="module")
def guider():
    return random_model(1, torch.float32, vocab_size=260, n_vocab=258, mask_id=257, eos_id=256,
                        eot_id=None, causal=True, shift=True)

def test_the_league_on_two_problems_and_resuming(tmp_path, guider):
    model, prompts = toy(tmp_path / "a.pt")
    save(tmp_path / "g.pt", guider, build_tokenizer("some text ", 258))
    log, other, table = tmp_path / "log", tmp_path / "other", tmp_path / "table.json"
    rules = ["autoregressive", "one-a-step", "threshold-0.9", "guided"]
    runs = accuracy.runs(model, rules)
    ask = ["--ckpt", tmp_path / "a.pt", "--n", 2, "--batch-size", 1, "--workers", 1, "--guider",
           tmp_path / "g.pt", "--log", log]
    printed = run(accuracy.main, *ask, "--rules", *rules, "--json", table)
    lines = log.read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[4:]]
    parts = {(part["run"], part["first"]): part for part in map(json.loads, lines[1:])}
    assert len(rows) == len({str(how) for _, how, _ in runs}) == 31 and len(parts) == 62
    agreements, full = set(), cost(prompts[:2], dict(cache="none"))
    for i, (row, (rule, how, base)) in enumerate(zip(rows, runs)):
        mine, none = ([parts[j, 0], parts[j, 1]] for j in (i, i if base is None else base))
        ran, steps = (sum(part[key] for part in mine) for key in ("ran", "steps"))
        if how["cache"] in COSTS and rule == "one-a-step":
            assert ran == cost(prompts[:2], how) and steps == 32
        assert row[0] == rule.replace("-", " ") and row[1].startswith(how["cache"])
        share = f"{50 * sum(part['right'][0] for part in mine):.1f}% ["
        assert row[2].startswith(share) if i else not row[2]  # its weights are random
        assert row[4:6] == [f"{full / ran:.2f}x", f"{steps / 2:.1f}"]
        times = [part["seconds"][0] / parts[0, part["first"]]["seconds"][0] for part in mine]
        assert row[8] == f"{sum(times) / 2:.2f}"
        if base in (None, i):
            assert row[3] == row[6] == ""
            continue
        # the two columns of the comparison with no cache under the same rule
        assert (runs[base][0], runs[base][1]["cache"]) == (rule, "none")
        pairs = [*zip(mine, none)]
        points = sum(50 * (here["right"][0] - there["right"][0]) for here, there in pairs)
        same = sum(x == y for here, there in pairs for x, y in zip(here["ids"][0], there["ids"][0]))
        assert row[3].startswith(f"{points:+.1f} [") and row[6] == f"{100 * same / 32:.1f}%"
        agreements.add(same)
    assert rows[2][2].startswith("50.0% [") and len(agreements) > 1
    # the model to beat writes as many tokens as the right answers have, one in each forward
    n = [min(16, len(answer.encode()) + 1) for _, answer in model.extra["problems"][:2]]
    assert [parts[0, i]["steps"] for i in (0, 1)] == [parts[0, i]["tokens"][0] for i in (0, 1)] == n
    found = json.loads(table.read_text())["runs"]
    assert [row["cache"] for row in found] == [row[1] for row in rows]
    part = run(accuracy.main, *ask[:8], "--rules", "threshold-0.9", "--caches", "local", "greedy")
    row, = (line for line in printed.splitlines() if line.startswith("| threshold 0.9 | local"))
    row, last = (line.split("|")[:8] for line in (row, part.splitlines()[-1]))  # without times
    assert last == row and len(part.splitlines()) == 6
    log.write_text("\n".join(lines[:45]) + "\n" + lines[45][:20])  # as a killed run leaves it
    run(accuracy.main, *ask, "--rules", *rules)
    again = [*map(json.loads, log.read_text().splitlines()[1:])]
    assert {(a["run"], a["first"]): a["ids"] for a in again} == {
        key: part["ids"] for key, part in parts.items()} and len(again) == 62
    assert all(part in again for part in [*map(json.loads, lines[1:45])])
    other.write_bytes(b"\xff{ not ours\n")
    for flags in (["--n", 1], ["--log", other]):
        refused(accuracy.main, [*ask, "--rules", *rules, *flags], "is not a log of this")
    assert other.read_bytes() == b"\xff{ not ours\n"

def test_each_rule_has_every_cache_but_those_that_it_refuses(tmp_path, guider):
    model, _ = toy(tmp_path / "a.pt")
    for rule in accuracy.RULES.keys() - accuracy.RIVALS.keys():
        known = {how["cache"] for _, how, _ in accuracy.runs(model, [rule], CACHES)}
        refuses = {"greedy"} if rule != "left-to-right" else set()
        assert known == {*CACHES} - {"autoregressive", "guided"} - refuses
    guider.extra = model.extra
    causal = [(rule, how["cache"]) for rule, how, _ in accuracy.runs(guider)]
    assert causal == [("left-to-right", "none"), ("left-to-right", "autoregressive")]

def test_a_text_and_its_judge(tmp_path, guider):
    (model, _), tokenizer = toy(tmp_path / "a.pt"), build_tokenizer("some text ", 258)
    text = "ab " * 500
    save(tmp_path / "g.pt", guider, tokenizer)
    (tmp_path / "a.txt").write_text(text)
    problems = accuracy.continuations(tmp_path / "a.txt", model, tokenizer, 3)
    # the context of 64 is twice a prompt of 16 and its 16 tokens
    tail = text[1350:]
    assert problems == [(tail[i:i + 16], tail[i + 16:i + 32]) for i in (0, 59, 118)]
    printed = run(accuracy.main, "--ckpt", tmp_path / "a.pt", "--data", tmp_path / "a.txt",
                  "--judge", tmp_path / "g.pt", "--n", 3, "--workers", 1, "--rules",
                  "autoregressive", "two-a-step", "--caches", "local", "--log", tmp_path / "log")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[4:]]
    ids = {part["run"]: part["ids"] for part in
           map(json.loads, (tmp_path / "log").read_text().splitlines()[1:])}
    texts = [*([tokenizer.decode(row) for row in ids[i]] for i in range(3)),
             [right for _, right in problems]]
    for row, found in zip(rows, texts):
        nats, grams = [], []
        for (prompt, _), written in zip(problems, found):
            given, new = tokenizer.encode(prompt), tokenizer.encode(written)
            logits = guider(torch.tensor([given + new]))[0, len(given) - 1:-1, :257]  # no mask
            nats.append(-logits.log_softmax(-1)[range(len(new)), new].sum().item())
            nats[-1] /= len(written.encode())
            grams += [tuple(new[i:i + 4]) for i in range(len(new) - 3)]
        assert row[2].startswith(f"{sum(nats) / 3:.3f} [")
        assert row[4] == f"{100 * len(set(grams)) / len(grams):.1f}%"
    assert [row[0] for row in rows] == ["autoregressive", "two a step", "two a step",
                                        "held-out text"]

@pytest.mark.parametrize("text, pattern, expected", [
    ("3 + 4 #### 7", None, 7), ("#### 1 and then ####  $1,234.00\nso", None, 1234),
    ("#### seven.", None, "seven"), ("no number", None, "no number"), ("it is 18", r"\d+", 18),
    ("", r"\d+", ""), ("first 3, then 5 apples", r"(\d+) apples|never", 5)])
def test_results(text, pattern, expected):
    assert accuracy.result_of(text, pattern or accuracy.HASHES) == expected

def test_problems_in_the_format_of_gsm8k(tmp_path):
    model, _ = toy(tmp_path / "a.pt")
    data, prompts, out = (tmp_path / name for name in ("d.jsonl", "p.jsonl", "a.jsonl"))
    right = model.extra["problems"][1][1]
    pairs = [("one", 1), ("who", "so #### 2"), ("and now", right)]
    data.write_text("".join(json.dumps(dict(question=q, answer=a)) + "\n" for q, a in pairs))
    run(accuracy.main, "--data", data, "--few-shot", 1, "--prompts", prompts)
    asked = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    start = "Question: one\nAnswer: 1\n\nQuestion: "
    assert asked == [start + "who\nAnswer:", start + "and now\nAnswer:"]
    refused(accuracy.main, ["--data", data, "--few-shot", 3, "--prompts", prompts], "--few-shot 3")
    ask = "--data", data, "--pattern", "(?s).*"
    run(accuracy.main, *ask, "--prompts", prompts)
    run(sample.main, "--ckpt", tmp_path / "a.pt", "--prompts", prompts, "--out", out, "--cache",
        "all", "--no-delay")
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    *_, last = answers
    out.write_text("\n".join(map(json.dumps, answers[:-1])))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in
            run(accuracy.main, *ask, "--answers", out).splitlines()[2:]]
    caches = list(dict.fromkeys(answer["cache"] for answer in answers))
    assert [row[0].split(",")[0] for row in rows] == caches
    for (name, answered, exact, fewer, forwards), cache in zip(rows, caches):
        its = [a for a in answers[:-1] if a["cache"] == cache]
        hits = sum(a["prompt"] == "and now" and a["text"].strip() == right for a in its)
        assert exact.startswith(f"{100 * hits / len(its):.1f}% [") and forwards == "16.0"
        assert answered == f"{len(its)} of 3" and (len(its) == 2) == (cache == last["cache"])
        full, ran = (sum(a[f"positions_{name}"] for a in its) for name in ("full", "run"))
        assert fewer == f"{full / ran:.2f}x"
    assert rows[0][2].startswith("33.3%")
    refused(accuracy.main, [*ask, "--few-shot", 1, "--answers", out], "repeat the flags")

def run_bench(path, *flags):
    """-> what it printed; the JSON of its last line and of its file, the same; the runs by name."""
    printed = run(bench.main, *flags, "--preset", "tiny", "--repeats", 1, "--json", path)
    found = json.loads(path.read_text())
    assert json.loads(printed.splitlines()[-1]) == found
    return printed, found, {r["run"]: r for r in found["runs"]}

def test_the_table(tmp_path):
    printed, found, rows = run_bench(tmp_path / "o.json", "--prompt-len", 8, "--gen-length", 32,
                                     "--block-length", 16, "--batch", 2)
    runs = bench.runs(CACHES[:-1], 4, steps=32)  # all but guided
    assert list(rows) == list(runs) and {how["cache"] for how in runs.values()} == {*CACHES[:-1]}
    for name, r in rows.items():
        how = dict(steps=32, block_length=16) | runs[name]
        if how["cache"] in COSTS:
            assert r["positions"] == cache_cost(8, 32, **how)
        assert r["forwards"] == (how["steps"] or 32) and 0 < r["outside"] < 1
        assert r["times_ar"] == r["seconds"] / rows["autoregressive"]["seconds"]
        assert all(r[key] > 0 for key in ("seconds", "floor", "peak"))
        assert r["tokens_per_s"] == pytest.approx(64 / r["seconds"])
    # all once, then the masks of the block and what was revealed: 16, and 32 in the second block
    assert rows["entropy never"]["positions"] == 40 + 15 * 16 + 16 * 32
    none, greedy = rows["none"], rows["greedy 8"]
    assert none["predicted"] == none["gain"] == 1
    assert 1 < greedy["predicted"] < none["positions"] / greedy["positions"] + 0.5
    assert found["bandwidth"] > 0 and found["matmul_peak"] > 0 and "whole runs" in printed
    few = run_bench(tmp_path / "o.json", "--gen-length", 64, "--prompt-len", 8, "--steps", 2,
                    "--caches", "pd", "window", "dual", "--refresh", 2, "--sample", 2)
    assert few[1]["conditions"]["block_length"] == 32  # window runs only 16 masks
    assert {name: r["positions"] for name, r in few[2].items()} == {
        "none": 2 * 72, "pd 2": 72 + 64, "dual": 2 * 72}

@pytest.mark.parametrize("cache", CACHES[:-1])
@pytest.mark.parametrize("block_length", [8, 24])
def test_sampled_runs_add_up(monkeypatch, cache, block_length):
    """On a clock that only the model's arithmetic moves: fewer run, the sums are those of all."""
    ran, model = [], random_model(dtype=torch.float32)

    def tick(_, given, out):
        tokens, _, cache, rows, *_ = given
        T = cache.T if cache else tokens.shape[1]
        ran.append(1 + work(model.config, *tokens.shape, rows.shape[1], T) / 1e4)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: sum(ran, 0.0))
    setting = bench.Bench(model, 2, 12, 24, block_length=block_length)
    for either in (model, setting.same()):
        either.register_forward_hook(tick)
    own = dict(decode=dict(refresh=4), greedy=dict(refresh=4), entropy=dict(tau=math.inf),
               autoregressive=dict(steps=None, block_length=None))
    how = dict(cache=cache) | own.get(cache, {})
    whole, every = setting.run(how)
    assert whole.calls == setting.run(how, set())[0].calls
    assert len(ran) == 24  # nothing runs to know the steps
    expected = pytest.approx(24 + sum(w for _, w in whole.calls) / 1e4)
    assert every["seconds"] == every["inside"] == expected
    steps = bench.spread(whole.calls, 3)
    sampled, few = setting.run(how, steps)
    kinds = [kind for kind, _ in whole.calls]
    assert len(steps) == sum(min(3, kinds.count(kind)) for kind in (True, False))
    assert len(ran) == 24 + len(steps)
    assert set(sampled.ran) == steps and sampled.calls == whole.calls
    assert few["positions"] == every["positions"]
    if cache in COSTS:
        how = dict(steps=24, block_length=block_length) | how
        assert few["positions"] == cache_cost(12, 24, **how)
    assert few["forwards"] == every["forwards"] == 24
    assert few["seconds"] == pytest.approx(every["seconds"], rel=0.02)

def test_the_arithmetic():
    """Against what torch counts in the matrix products and the attention."""
    from torch.utils.flop_counter import FlopCounterMode
    model = random_model(dtype=torch.float32, n_kv_head=2)
    math = torch.nn.attention.SDPBackend.MATH
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(math):
        model(torch.ones(2, 10, dtype=torch.int64), rows=torch.arange(4).expand(2, 4))
    assert counter.get_total_flops() == 2 * work(model.config, 2, 10, 4, 10)

@pytest.mark.parametrize("script, flags, words", REFUSED["scripts"])
def test_user_errors(script, flags, words):
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    script = dict(accuracy=accuracy, bench=bench, figures=figures)[script]
    refused(script.main, shlex.split(flags), words)
