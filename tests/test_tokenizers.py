"""Tokenizers of the Hugging Face kind, converted: the same ids as the package `tokenizers` gives.
The ids are in tests/tokenizers.json. If the package is installed, 20,000 random strings of each
kind are compared as well."""
import json

import pytest
from conftest import REFUSED, ROOT
from make_tokenizers import kinds, strings

from scripts import hf_tokenizer
from scripts.hf_tokenizer import GPT2, LETTERS, QWEN2, from_folder, from_json, total
from support.tokenizer import Tokenizer

DATA = json.loads((ROOT / "tests" / "tokenizers.json").read_text(encoding="utf-8"))
DOCS = {name: t["doc"] for name, t in DATA["tokenizers"].items()}
IDS = {name: t["ids"] for name, t in DATA["tokenizers"].items()}
PATTERN = "pre_tokenizer.pretokenizers.0.pattern.Regex"

@pytest.mark.parametrize("name", DOCS)
def test_same_ids(name):
    made = from_json(DOCS[name])
    for t in (made, Tokenizer.from_state(json.loads(json.dumps(made.state())))):  # plain values
        for text, ids in zip(DATA["strings"], IDS[name], strict=True):
            assert t.encode(text, special=True) == ids, repr(text)
            if name not in ("qwen2 nfc", "gpt2 prefix space"):
                assert t.decode(ids) == text

@pytest.mark.parametrize("name", DOCS)
def test_random_strings_against_tokenizers(name):
    theirs = pytest.importorskip("tokenizers", reason="compares with the package tokenizers")
    ours, theirs = from_json(DOCS[name]), theirs.Tokenizer.from_str(json.dumps(DOCS[name]))
    texts = strings(seed=list(DOCS).index(name) + 1, n=20000)
    expected = theirs.encode_batch(texts, add_special_tokens=False)
    wrong = [s for s, e in zip(texts, expected) if ours.encode(s, special=True) != e.ids]
    assert not wrong, f"{len(wrong)} of {len(texts)}, such as {wrong[0]!r}"

def test_the_fixtures_can_be_made_again():
    pytest.importorskip("tokenizers", reason="trains with the package tokenizers")
    made = kinds(400)
    assert list(made) == list(DOCS) and made == DOCS, "run tests/make_tokenizers.py"

def changed(parts):
    """-> the document of "llada" with other parts, {path such as model.vocab: value}. "absent"
    removes one."""
    doc = json.loads(json.dumps(DOCS["llada"]))
    for path, value in parts.items():
        *where, last = (int(key) if key.isdecimal() else key for key in path.split("."))
        at = doc
        for key in where:
            at = at[key]
        at[last] = value
        if value == "absent":
            del at[last]
    return doc

def with_vocab(more, merges, **parts):
    """Single bytes and these tokens only."""
    vocab = {t: i for i, t in enumerate([*LETTERS, *more])}
    return changed({"added_tokens": [], "model.vocab": vocab, "model.merges": merges} | parts)

@pytest.mark.parametrize("name", REFUSED["tokenizers"])
def test_refused_by_name(name, tmp_path):
    parts, words = REFUSED["tokenizers"][name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(parts)))
    with pytest.raises(ValueError) as e:
        from_folder(tmp_path)
    line = str(e.value)
    assert words in line and "\n" not in line and "tokenizer.json" in line, line

def test_the_check_of_every_token():
    """With the pairs b+c, a+b, ab+c: Hugging Face makes [a, bc] of abc, tiktoken makes abc."""
    with pytest.raises(ValueError, match="abc"):
        from_json(with_vocab(["bc", "ab", "abc"], [["b", "c"], ["a", "b"], ["ab", "c"]]))
    doc = with_vocab(["bc", "ab", "abc"], [["b", "c"], ["a", "b"], ["a", "bc"]])
    assert from_json(doc).encode("abc") == [258]
    # abc is listed before bcd, but by a pair that its bytes never come to
    merges = [["b", "c"], ["a", "b"], ["ab", "c"], ["bc", "d"], ["a", "bc"]]
    doc = with_vocab(["bc", "ab", "abc", "bcd"], merges)
    assert from_json(doc).encode("abcd") == [doc["model"]["vocab"]["a"], 259]

def test_patterns_that_leave_something_out_or_have_no_end(monkeypatch):
    """tests/campaigns/fuzz.py found a pattern on which the converter never ended."""
    pattern = r"\p{L}+|\s+"
    t = from_json(with_vocab(["12"], [["1", "2"]], **{PATTERN: pattern}))
    assert t.pattern == total(pattern) != pattern
    assert t.decode(t.encode("a 12 b.")) == "a 12 b." and 256 in t.encode("a12")
    assert [total(p) for p in (GPT2, QWEN2)] == [GPT2, QWEN2]
    monkeypatch.setattr(hf_tokenizer, "PATIENCE", 0.2)
    with pytest.raises(ValueError, match="takes too long"):
        total(r"(a+)+!|(?:\w+\s?)+!|(?:\S|\s)")

def test_the_older_form(tmp_path):
    """vocab.json, merges.txt and the class of the tokenizer, as Dream has them."""
    def write(name, value):
        (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")

    def refused(words):
        with pytest.raises(ValueError, match=words):
            from_folder(tmp_path)
    doc = DOCS["qwen2 nfc"]
    config = {"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": {
        str(t["id"]): {"content": t["content"], "lstrip": False, "special": True}
        for t in doc["added_tokens"][:3]}}
    write("vocab.json", doc["model"]["vocab"])
    lines = ["#version: 0.2", *map(" ".join, doc["model"]["merges"]), ""]
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    write("added_tokens.json", {t["content"]: t["id"] for t in doc["added_tokens"]})
    write("tokenizer_config.json", config)
    t = from_folder(tmp_path)
    assert [t.encode(s, special=True) for s in DATA["strings"]] == IDS["qwen2 nfc"]
    write("tokenizer_config.json", config | {"tokenizer_class": "MarianTokenizer"})
    refused("MarianTokenizer")
    write("tokenizer_config.json", config)
    (tmp_path / "merges.txt").write_text("\n".join(lines[:-9]), encoding="utf-8")
    refused("merges.txt is cut")
    write("added_tokens.json", [])
    refused("added_tokens.json")
    (tmp_path / "merges.txt").unlink()
    refused("merges.txt")
