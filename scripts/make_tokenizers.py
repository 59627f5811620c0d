"""Makes tests/tokenizers.json: small tokenizers of the kinds that scripts/hf_tokenizer.py converts, strings, and the ids that
the package `tokenizers` gives them. Needs that package; the tests need only what it wrote.

python scripts/make_tokenizers.py
"""
import json
import pathlib
import random
import sys
import unicodedata

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
LLADA = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
from scripts.hf_tokenizer import LETTERS, QWEN2  # noqa: E402

TEXT = pathlib.Path(__file__).read_text() + """
We'll see; they've said it's 1234 of 56,789 and 100,000 in 1999, 2024, 2025. ÄÖÜ äöü straße, naïve café, Ελληνικά, русский текст, עברית, العربية, हिन्दी, ไทย,
中文字符和日本語のかな, 한국어 조선말, emoji 😀👍🏽🇩🇪👨‍👩‍👧.   spaces\t\ttabs\r\n\r\n  lines   \n    indented\n""" * 8
SPECIAL = ["<|start|>", "<|end|>", "<|end|>x", "<|mask|>", "[CLS]"]


def strings(seed=0, n=0):
    """Fixed ones that have broken tokenizers before, then n random ones."""
    rng = random.Random(seed)
    fixed = ["", "a", " ", "  ", "   a", "a   ", "a  b   c", "\n", "\n\n\n", " \n \n", "x  \n  y", "\t\t x\r\n\r\ny", "Hello world", " Hello world", "I'm you're they've he'll she'd it's WE'LL DON'T 'tis O'Neil''s",
             "numbers 12345 and 3.14159 and 1,000,000", "007 1 22 333 4444", "e\u0301 a\u0308 \u212b \ufb01", "naïve café straße", "qqq qqqq the orphanage ʬʬ ʬʬʬʬ", "100 1000 10000 2025 20242025", "Ελληνικά русский עברית العربية हिन्दी ไทย", "中文字符 日本語 한국어", "😀👍🏽🇩🇪👨‍👩‍👧 x😀y",
             "\u00a0\u2003\u3000\u0085\u2028\u200b\ufeff\u001c", "a\u00a0b\u2003c\u3000d", "\x00\x01\x7f", "<|start|>user<|end|>", "<|end|>x<|end|> x<|mask|><|mask|>", "[CLS] [CLS][cls] <|start |>", "<|sta", "a<|end|>\n\n  <|start|>'s", "!!!???...\n\n", "#### 7*8=56. --- ***",
             "word" * 30, " " * 70, "ab" * 40 + " " + "9" * 20]
    pools = [[chr(c) for c in range(32, 127)], list(" \t\n\r\u00a0\u2003\u3000\u0085\u2028\u200b\ufeff\u001cab1"), list("0123456789 .,a\n"), list("sStTdDmMlLvVrReE' \u2019"), [chr(c) for c in range(0, 256)],
             [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000], SPECIAL + list(" x\n'")]
    for _ in range(n):
        kind = rng.randrange(len(pools) + 2)
        if kind < len(pools):
            fixed.append("".join(rng.choices(pools[kind], k=rng.randrange(1, 40))))
        elif kind == len(pools):
            fixed.append(rng.randbytes(rng.randrange(1, 60)).decode("utf-8", "replace"))
        else:
            at = rng.randrange(len(TEXT))
            fixed.append(TEXT[at:at + rng.randrange(1, 80)])
    # the crate's Unicode tables are older than Python's: letters that only one of them knows how to order are left out
    return [s for s in fixed if not any(unicodedata.combining(c) > 0 and ord(c) > 0x0860 for c in s)]


def trained(pattern, vocab, nfc=False):
    """-> the document of a tokenizer.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    t = Tokenizer(models.BPE())
    if nfc:
        t.normalizer = normalizers.Sequence([normalizers.NFC()])
    if pattern:
        t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=list(LETTERS), show_progress=False))
    t.add_special_tokens(SPECIAL)
    return json.loads(t.to_str())


def with_added(doc):
    """With the added tokens in the vocabulary too: else `tokenizers` gives them the ids behind its end, whatever theirs are."""
    doc["model"]["vocab"] |= {t["content"]: t["id"] for t in doc["added_tokens"]}
    return doc


def renumbered(doc, number):
    doc = json.loads(json.dumps(doc))
    doc["model"]["vocab"] = {t: number(i) for t, i in doc["model"]["vocab"].items()}
    for token in doc["added_tokens"]:
        token["id"] = number(token["id"])
    return with_added(doc)


def kinds(vocab):
    """-> {name: document}"""
    llada = trained(LLADA, vocab)
    n = vocab + len(SPECIAL)
    shuffled = random.Random(1).sample(range(3 * n), n)
    orphans = json.loads(json.dumps(llada))
    for i, t in enumerate(("Ġorphanage", "qqq", "ʬʬ")):  # tokens that no merge makes
        orphans["model"]["vocab"]["".join({b: c for c, b in LETTERS.items()}[b] for b in t.encode()) if t == "ʬʬ" else t] = n + i
    with_added(orphans)
    every = json.loads(json.dumps(llada))  # every way to cut a token in two, as converters from tiktoken write them
    rank = {t: i for i, t in enumerate(dict.fromkeys("".join(m) for m in every["model"]["merges"]))}
    have = every["model"]["vocab"].keys()
    every["model"]["merges"] = [[t[:i], t[i:]] for t in rank for i in range(1, len(t)) if t[:i] in have and t[i:] in have]
    digits = trained(None, vocab)
    digits["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}
    return {"llada": llada, "llama3": trained(LLAMA3, vocab), "qwen2 nfc": trained(QWEN2, vocab, nfc=True), "gpt2 prefix space": trained(None, vocab), "digits": digits,
            "permuted ids": renumbered(llada, lambda i: shuffled[i]), "specials first": renumbered(llada, lambda i: (i + len(SPECIAL)) % n),
            "ignore_merges": {**llada, "model": {**llada["model"], "ignore_merges": True}}, "orphans": orphans,
            "orphans ignore_merges": {**orphans, "model": {**orphans["model"], "ignore_merges": True}}, "every split": every}


def main(target=ROOT / "tests" / "tokenizers.json"):
    from tokenizers import Tokenizer
    texts, out = strings(n=40), {}
    for name, doc in kinds(400).items():
        t = Tokenizer.from_str(json.dumps(doc))
        out[name] = {"doc": doc, "ids": [t.encode(s, add_special_tokens=False).ids for s in texts]}
    target.write_text(json.dumps({"strings": texts, "tokenizers": out}, separators=(",", ":")) + "\n")
    print(f"{target}: {len(out)} tokenizers, {len(texts)} strings, {target.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
