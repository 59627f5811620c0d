"""Tokenizers of the Hugging Face kind, converted: the same ids as the package `tokenizers` gives. tests/tokenizers.json has
them, so the package is not needed; where it is installed, 20,000 random strings each are compared as well.

python -m pytest tests/test_tokenizers.py"""
import json
import pathlib
import time

import pytest

from model import Tokenizer
from scripts import hf_tokenizer
from scripts.hf_tokenizer import GPT2, LETTERS, from_folder, from_json, total
from scripts.make_tokenizers import QWEN2, kinds, strings

DATA = json.loads((pathlib.Path(__file__).parent / "tokenizers.json").read_text())
NAMES = list(DATA["tokenizers"])


@pytest.mark.parametrize("name", NAMES)
def test_same_ids(name):
    made = from_json(DATA["tokenizers"][name]["doc"])
    for t in (made, Tokenizer.from_state(json.loads(json.dumps(made.state())))):  # the stored form is plain values
        for text, ids in zip(DATA["strings"], DATA["tokenizers"][name]["ids"]):
            assert t.encode(text, special=True) == ids, repr(text)
            if name not in ("qwen2 nfc", "gpt2 prefix space"):
                assert t.decode(ids) == text


def test_the_fixtures_are_of_different_kinds():
    ids = {name: t["ids"] for name, t in DATA["tokenizers"].items()}
    assert len(NAMES) == 11 and len(DATA["strings"]) > 60
    same = [name for name in NAMES if ids[name] == ids["llada"]]
    assert same == ["llada", "ignore_merges", "orphans", "every split"]  # these are to make no difference
    at = DATA["strings"].index("qqq qqqq the orphanage ʬʬ ʬʬʬʬ")
    assert ids["orphans ignore_merges"][at] != ids["orphans"][at] == ids["llada"][at]


def test_what_a_user_types_is_text():
    t = from_json(DATA["tokenizers"]["llada"]["doc"])
    text = "a<|end|>b"
    assert t.special["<|end|>"] not in t.encode(text) and t.decode(t.encode(text)) == text
    assert t.encode(text, special=True) == t.encode("a") + [t.special["<|end|>"]] + t.encode("b")
    assert t.encode("<|end|>x", special=True) == [t.special["<|end|>x"]]  # the longest


@pytest.mark.parametrize("name", NAMES)
def test_random_strings_against_tokenizers(name):
    theirs = pytest.importorskip("tokenizers", reason="compares with the package tokenizers, if there is one")
    doc = DATA["tokenizers"][name]["doc"]
    ours, theirs = from_json(doc), theirs.Tokenizer.from_str(json.dumps(doc))
    texts = strings(seed=NAMES.index(name) + 1, n=20000)
    wrong = [s for s, e in zip(texts, theirs.encode_batch(texts, add_special_tokens=False)) if ours.encode(s, special=True) != e.ids]
    assert not wrong, f"{len(wrong)} of {len(texts)}, such as {wrong[0]!r}"


def test_the_fixtures_can_be_made_again():
    pytest.importorskip("tokenizers", reason="trains with the package tokenizers, if there is one")
    made = kinds(400)
    assert list(made) == NAMES
    assert made == {name: t["doc"] for name, t in DATA["tokenizers"].items()}, "tests/tokenizers.json is stale: run scripts/make_tokenizers.py"


def changed(**parts):
    doc = json.loads(json.dumps(DATA["tokenizers"]["llada"]["doc"]))
    for path, value in parts.items():
        *where, last = path.split("__")
        at = doc
        for key in where:
            at = at[int(key) if isinstance(at, list) else key]
        at[int(last) if isinstance(at, list) else last] = value
    return doc


MODEL = DATA["tokenizers"]["llada"]["doc"]["model"]
REFUSED = {
    "unigram": (changed(model__type="Unigram"), "model.type"),
    "dropout": (changed(model__dropout=0.1), "dropout"),
    "byte_fallback": (changed(model__byte_fallback=True), "byte_fallback"),
    "prefix of subwords": (changed(model__continuing_subword_prefix="##"), "continuing_subword_prefix"),
    "suffix of words": (changed(model__end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "unknown field of the model": (changed(model__magic=1), "model.magic"),
    "unknown field": (changed(magic=1), "tokenizer.json.magic"),
    "lower case": (changed(normalizer={"type": "Lowercase"}), "Lowercase"),
    "nfkc in a row": (changed(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}), "NFKC"),
    "metaspace": (changed(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
    "no pre_tokenizer": (changed(pre_tokenizer=None), "pre_tokenizer"),
    "two splits": (changed(pre_tokenizer__pretokenizers=[{"type": "Split"}] * 2 + [{"type": "ByteLevel"}]), "pre_tokenizer"),
    "removed pieces": (changed(pre_tokenizer__pretokenizers__0__behavior="Removed"), "behavior"),
    "inverted": (changed(pre_tokenizer__pretokenizers__0__invert=True), "invert"),
    "split and GPT-2's pattern": (changed(pre_tokenizer__pretokenizers__1__use_regex=True), "use_regex"),
    "split and a space before every piece": (changed(pre_tokenizer__pretokenizers__1__add_prefix_space=True), "add_prefix_space"),
    "a pattern of one string": (changed(pre_tokenizer__pretokenizers__0__pattern={"String": "a"}), "String"),
    "a broken pattern": (changed(pre_tokenizer__pretokenizers__0__pattern={"Regex": "(a"}), "pattern"),
    "an added token that eats blanks": (changed(added_tokens__0__lstrip=True), "lstrip"),
    "another decoder": (changed(decoder={"type": "Metaspace"}), "decoder"),
    "a byte is missing": (changed(model__vocab={t: i for t, i in MODEL["vocab"].items() if t != "Ā"}, model__merges=[], added_tokens=[]), "0x00"),
    "merges of nothing": (changed(model__merges=[["no", "such"]]), "no"),
    "a merge of three": (changed(model__merges=["a b c"]), "merge"),
    "a merge twice": (changed(model__merges=MODEL["merges"] + MODEL["merges"][:1]), "twice"),
    "an id that is text": (changed(model__vocab={**MODEL["vocab"], "a": "1"}), "id"),
    "two tokens with one id": (changed(model__vocab={**MODEL["vocab"], "a": MODEL["vocab"]["b"]}, added_tokens=[]), "share an id"),
    "a merge that is not of bytes": (changed(model__vocab={**MODEL["vocab"], "▁": 900, "▁a": 901}, model__merges=MODEL["merges"] + [["▁", "a"]], added_tokens=[]), "not of bytes"),
    "normalized beside a normalizer": (changed(normalizer={"type": "NFC"}, added_tokens__0__normalized=True), "normalizer"),
    "a normalized token within one that is not": (changed(added_tokens__2__normalized=True), "overlaps"),
    "an added id that leaves a gap": (changed(added_tokens__4__id=999), "999"),
    "an orphan that tiktoken would make elsewhere": (changed(model__ignore_merges=True, model__vocab={**MODEL["vocab"], "zq": 400}, added_tokens=[]), "zq"),
    "the start of a line": (changed(pre_tokenizer__pretokenizers__0__pattern={"Regex": r"^\p{L}+|[\s\S]"}), "sign ^"),
    "the end of a line": (changed(pre_tokenizer__pretokenizers__0__pattern={"Regex": r"\s++$|[\s\S]"}), "sign $"),
    "a counted repeat and a plus": (changed(pre_tokenizer__pretokenizers__0__pattern={"Regex": r"\p{N}{1,3}+|[\s\S]"}), "sign {1,3}+"),
    "(?m:": (changed(pre_tokenizer__pretokenizers__0__pattern={"Regex": r"(?m:.+)|[\s\S]"}), "(?m"),
    "sets in sets": (changed(pre_tokenizer__pretokenizers__0__pattern={"Regex": r"[a-z--[aeiou]]|[\s\S]"}), "set"),
    "an empty match": (changed(pre_tokenizer__pretokenizers__0__pattern={"Regex": r"(?=\p{N})|\p{L}+|[\s\S]"}), "nothing at all"),
    "a pattern that tiktoken does not know": (changed(pre_tokenizer__pretokenizers__0__pattern={"Regex": r"\p{Nonsense}"}), "the pattern ("),
    "an escape of Oniguruma's": (changed(pre_tokenizer__pretokenizers__0__pattern={"Regex": r"\h+|[\s\S]"}), r"escape \h"),
    "vocab is a list": (changed(model__vocab=[]), "vocab"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(name, tmp_path):
    doc, words = REFUSED[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(doc))
    with pytest.raises(ValueError) as e:
        from_folder(tmp_path)
    assert words in str(e.value) and "\n" not in str(e.value) and "tokenizer.json" in str(e.value), str(e.value)


def test_the_check_of_every_token():
    """With the pairs b+c, a+b, ab+c: Hugging Face makes of abc [a, bc], tiktoken abc. Such a vocabulary is refused."""
    vocab = {letter: i for i, letter in enumerate(LETTERS)} | {"bc": 256, "ab": 257, "abc": 258}
    doc = changed(model__vocab=vocab, model__merges=[["b", "c"], ["a", "b"], ["ab", "c"]], added_tokens=[])
    with pytest.raises(ValueError, match="abc"):
        from_json(doc)
    doc["model"]["merges"] = [["b", "c"], ["a", "b"], ["a", "bc"]]
    assert from_json(doc).encode("abc") == [258]


def test_a_pattern_that_leaves_something_out():
    pattern = total(r"\p{L}+|\s+")
    vocab = {letter: i for i, letter in enumerate(LETTERS)} | {"12": 256}
    t = from_json(changed(model__vocab=vocab, model__merges=[["1", "2"]], added_tokens=[], pre_tokenizer__pretokenizers__0__pattern={"Regex": r"\p{L}+|\s+"}))
    assert t.pattern == pattern != r"\p{L}+|\s+" and t.decode(t.encode("a 12 b.")) == "a 12 b." and 256 in t.encode("a12")
    assert [total(p) for p in (GPT2, QWEN2)] == [GPT2, QWEN2]


def test_a_pattern_without_an_end(monkeypatch):
    """tests/fuzz.py found that a pattern like this kept the converter busy for good."""
    monkeypatch.setattr(hf_tokenizer, "PATIENCE", 0.2)
    with pytest.raises(ValueError, match="takes too long"):
        total(r"(a+)+!|(?:\w+\s?)+!|(?:\S|\s)")


def test_the_older_form(tmp_path):
    """vocab.json, merges.txt and the class of the tokenizer, as Dream has them."""
    doc, ids = DATA["tokenizers"]["qwen2 nfc"]["doc"], DATA["tokenizers"]["qwen2 nfc"]["ids"]
    (tmp_path / "vocab.json").write_text(json.dumps(doc["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in doc["model"]["merges"]) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": {str(t["id"]): {"content": t["content"], "lstrip": False, "special": True} for t in doc["added_tokens"][:3]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({t["content"]: t["id"] for t in doc["added_tokens"]}))
    t = from_folder(tmp_path)
    assert [t.encode(s, special=True) for s in DATA["strings"]] == ids
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "MarianTokenizer"}))
    with pytest.raises(ValueError, match="MarianTokenizer"):
        from_folder(tmp_path)
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="merges.txt"):
        from_folder(tmp_path)
    (tmp_path / "added_tokens.json").write_text("[]")
    with pytest.raises(ValueError, match="added_tokens.json"):
        from_folder(tmp_path)


def test_a_large_vocabulary_does_not_take_long():
    """The check of all tokens and of the pattern: seconds for 126 thousand."""
    vocab, merges = {letter: i for i, letter in enumerate(LETTERS)}, []
    small = "abcdefghijklmnopqrstuvwxyz"
    for a in small:
        for b in small:
            vocab[a + b] = len(vocab)
            merges.append([a, b])
    for pair in [a + b for a in small for b in small]:
        for c in small.upper():
            vocab[pair + c] = len(vocab)
            merges.append([pair, c])
    began = time.perf_counter()
    t = from_json(changed(model__vocab=vocab, model__merges=merges, added_tokens=[]))
    assert len(t.ranks) == len(vocab) > 18000
    assert time.perf_counter() - began < 10
