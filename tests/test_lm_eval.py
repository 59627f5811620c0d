"""scripts/lm_eval_model.py on a stub of lm_eval, and the likelihood that it needs."""
import re
import sys
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from test_scripts import toy

from dkv_min import generate
from support.evaluate import CHATS, encode, nll, text_of
from support.prompts import draws
from support.tokenizer import PATTERN, Tokenizer

@pytest.fixture
def build(monkeypatch, tmp_path):
    """-> model args -> lm_eval's model, by default of toy's checkpoint."""
    hook = SimpleNamespace(add_partial=lambda *what: None)
    stub = SimpleNamespace(
        __path__=[], cli_evaluate=None, register_model=lambda name: lambda model: model,
        LM=type("LM", (), dict(tokenizer_name=property(), cache_hook=hook)),
        normalize_gen_kwargs=lambda given, G: dict(until=[], max_gen_toks=G) | given)
    for name in ".__main__ .api .api.model .api.registry .models .models.utils".split() + [""]:
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", stub)
    sys.modules.pop("scripts.lm_eval_model", None)  # it may have been imported without the stub
    from scripts.lm_eval_model import DkvMin
    toy(tmp_path / "a.pt")
    return lambda **args: DkvMin(**dict(ckpt=str(tmp_path / "a.pt"), device="cpu") | args)

def ask(method, *args):
    return method([SimpleNamespace(args=a) for a in args])

@pytest.mark.parametrize("config", [{}, dict(shift=True), dict(shift=True, causal=True)])
def test_the_bound_by_enumeration(config, cfg=0.7, P=3, ids=(5, 9, 3, 17, 30, 8)):
    model, g = random_model(**config), torch.Generator().manual_seed(0)

    def mean(n, ids):
        """Over the sets of n masks: the cross entropy of their tokens, times 3 / n."""
        losses = []
        for at in map(list, combinations(range(P, len(ids)), n)):
            x = torch.tensor([ids, [40] * P + [*ids[P:]]])
            if not model.config.causal:
                x[:, at] = 40
            l, u = model(x)[..., [*range(40), *range(41, 44)]]
            p = (u + (cfg + 1) * (l - u)).log_softmax(-1)
            losses.append(-sum(p[i - int(model.config.shift), ids[i]].item() for i in at))
        return sum(losses) / len(losses) * (len(ids) - P) / n

    counts = [(round(k + r * 3 / 16) - 1) % 3 + 1 for k in (1, 2, 3) for r in range(16)]
    counts = [3] if model.config.causal else counts
    want = sum(mean(n, ids) for n in counts) / len(counts)
    most = 1e-6 if model.config.causal else 0.03
    assert nll(model, [*ids], P, g, 1600, cfg) == pytest.approx(want, rel=most)
    assert nll(model, [*ids[:4]], P, g, 128, cfg) == pytest.approx(mean(1, ids[:4]), rel=1e-6)

def test_answers_are_generate_s_up_to_until(build, capsys):
    how, G = dict(cache="local", threshold=0.5), 16
    lm, asked = build(**how), ["how many\n", "and now\n", "who\n", "x" * 60]
    whole = [generate(lm.model, [lm.encode(c)[-48:]], gen_length=G, block_length=8, **how).tokens
             for c in asked]
    texts = [text_of(ids[-G:], lm.model, lm.tokenizer) for [ids] in whole]
    assert ask(lm.generate_until, *[(c, {}) for c in asked]) == texts
    assert capsys.readouterr().err.count("note:") == 1  # one is too long
    cut = ask(lm.generate_until, *[(c, dict(until=["", t[3]])) for c, t in zip(asked, texts)])
    assert cut == [t[:t.index(t[3])] for t in texts]
    asked = [(c, dict(max_gen_toks=8 + 8 * (i % 2), temperature=1.0)) for i, c in enumerate(asked)]
    one, two = (ask(build(seed=3, batch_size=n).generate_until, *asked) for n in (1, "2"))
    assert one == two and len({*one}) == 4
    assert one[:1] == ask(build(seed=3).generate_until, asked[0])

def test_likelihoods(build):
    lm = build(mc_num=4)
    lm.model, lm.tokenizer = random_model(), SimpleNamespace(
        encode=lambda text, special=False: [ord(c) % 40 for c in text])
    best = "".join(chr(80 + i) for i in generate(lm.model, [[33]], gen_length=3).tokens[0][1:])
    (a, right), (b, wrong), (c, _) = ask(lm.loglikelihood, ("I", best), ("I  ", "b"), ("", "b"))
    assert right and not wrong and a < 0
    assert b == pytest.approx(-nll(lm.model, lm.encode("I  b"), 1, draws(0, 1), 4))
    assert c == pytest.approx(-nll(lm.model, [1, ord("b") % 40], 1, None, 1))

@pytest.mark.parametrize("chat", CHATS)
def test_templates(build, chat):
    lm, turns = build(), ["hi ", "yes", "x <b>"]
    special = dict(zip({*re.findall(r"<\|\w+\|>", "".join(CHATS[chat]))}, range(300, 310)))
    lm.chat, lm.tokenizer = chat, Tokenizer(lm.tokenizer.ranks, PATTERN, special)
    said = [dict(role=("user", "assistant")[i % 2], content=t) for i, t in enumerate(turns)]
    text = lm.apply_chat_template(said)
    assert lm.encode(text) == encode(turns, lm.tokenizer, dict(chat=chat))
    assert max(lm.encode(" " + text)) < 300 <= max(lm.encode(text))
    assert lm.apply_chat_template(said[:2], False) == text[:text.index("yes") + 3]
    assert "helpful" not in lm.apply_chat_template([dict(role="system", content="so"), *said])

def test_what_is_wrong_is_a_sentence(build):
    lm = build()
    wrong = [("cache", "no"), ("cache", "all"), ("tau", 1), ("speed", 2), ("threshold", "x"),
             ("cache", "guided"), ("mc_num", 0), ("gen_length", 0), ("ckpt", "none.pt"),
             ("batch_size", "auto"), ("steps", 5), ("dtype", "int8"), ("device", "x")]
    for job in [lambda: lm.loglikelihood_rolling([]), lambda: lm.apply_chat_template([]),
                *[lambda arg=arg: build(**dict([arg])) for arg in wrong]]:
        with pytest.raises(ValueError) as e:
            job()
        assert "\n" not in str(e.value)
