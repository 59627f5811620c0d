"""Make tests/tokenizers.json: small tokenizers of the kinds that scripts/hf_tokenizer.py converts,
strings, and the ids that the package `tokenizers` gives them. Only this script needs the package.

python tests/make_tokenizers.py"""
import json
import pathlib
import random
import sys
import unicodedata

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from scripts.hf_tokenizer import LETTERS, QWEN2  # noqa: E402
from support.tokenizer import PATTERN  # noqa: E402

SPECIAL = ["<|start|>", "<|end|>", "<|end|>x", "<|mask|>", "[CLS]"]
TEXTS = json.loads((ROOT / "tests" / "texts.json").read_text(encoding="utf-8"))
FIXED = TEXTS["fixed"]  # strings that have broken tokenizers
TEXT = "\n".join(FIXED) + "\n".join(TEXTS["lines"]) * 8  # what the tokenizers are trained on
POOLS = [
    [chr(c) for c in range(32, 127)],
    list(" \t\n\r\u00a0\u2003\u3000\u0085\u2028\u200b\ufeff\u001cab1"),
    list("0123456789 .,a\n"), list("sStTdDmMlLvVrReE' \u2019"), [chr(c) for c in range(256)],
    [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000], SPECIAL + list(" x\n'"),
    list("qqzzxxjj ")]

def strings(seed=0, n=0):
    """-> FIXED, then n random strings"""
    rng, made = random.Random(seed), FIXED + TEXTS["whole"]
    for _ in range(n):
        kind = rng.randrange(len(POOLS) + 2)
        if kind < len(POOLS):
            made.append("".join(rng.choices(POOLS[kind], k=rng.randrange(1, 40))))
        elif kind == len(POOLS):
            made.append(rng.randbytes(rng.randrange(1, 60)).decode("utf-8", "replace"))
        else:
            made.append(TEXT[(at := rng.randrange(len(TEXT))):at + rng.randrange(1, 80)])
    # leave out marks that only Python orders: the Unicode tables of tokenizers are older
    return [s for s in made if not any(unicodedata.combining(c) and ord(c) > 0x0860 for c in s)]

def trained(pattern, vocab, nfc=False):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.Sequence([normalizers.NFC()]) if nfc else None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=not pattern, use_regex=not pattern)
    t.pre_tokenizer = byte_level if not pattern else pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=list(LETTERS), show_progress=False))
    t.add_special_tokens(SPECIAL)
    return json.loads(t.to_str())

def with_model(doc, **parts):
    return doc | {"model": doc["model"] | parts}

def renumbered(doc, number):
    added = [t | {"id": number(t["id"])} for t in doc["added_tokens"]]
    vocab = {t: number(i) for t, i in doc["model"]["vocab"].items()}
    vocab |= {t["content"]: t["id"] for t in added}  # or `tokenizers` numbers them itself
    return with_model(doc, vocab=vocab) | {"added_tokens": added}

def kinds(vocab):
    """-> {name: document}"""
    llada, gpt2, n = trained(PATTERN, vocab), trained(None, vocab), vocab + len(SPECIAL)
    have, shuffled = llada["model"]["vocab"], random.Random(1).sample(range(3 * n), n)
    letters = {b: letter for letter, b in LETTERS.items()}
    unmade = {"".join(letters[b] for b in t.encode()): n + i
              for i, t in enumerate((" orphanage", "qqq", "ʬʬ"))}  # tokens that no merge makes
    orphans = renumbered(with_model(llada, vocab=have | unmade), int)
    # as in Llama 3.1: every pair that makes qzxj is listed, but of its bytes zx is made first
    llama3 = trained(TEXTS["llama3"], vocab)
    pairs = [["z", "x"], ["q", "z"], ["x", "j"], ["qz", "xj"]]
    more = {"".join(pair): n + i for i, pair in enumerate(pairs)}
    llama31 = renumbered(with_model(
        llama3, ignore_merges=True, vocab=llama3["model"]["vocab"] | more,
        merges=llama3["model"]["merges"] + pairs), int)
    # every way to cut a token in two, as converters from tiktoken write them
    tokens = dict.fromkeys(map("".join, llada["model"]["merges"]))
    cuts = [[t[:i], t[i:]] for t in tokens for i in range(1, len(t))
            if t[:i] in have and t[i:] in have]
    digits = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        gpt2["pre_tokenizer"] | {"add_prefix_space": False}]}
    return {
        "llada": llada, "llama3": llama3, "llama3.1": llama31,
        "qwen2 nfc": trained(QWEN2, vocab, nfc=True), "gpt2 prefix space": gpt2,
        "digits": gpt2 | {"pre_tokenizer": digits},
        "permuted ids": renumbered(llada, lambda i: shuffled[i]),
        "specials first": renumbered(llada, lambda i: (i + len(SPECIAL)) % n),
        "ignore_merges": with_model(llada, ignore_merges=True), "orphans": orphans,
        "orphans ignore_merges": with_model(orphans, ignore_merges=True),
        "every split": with_model(llada, merges=cuts)}

if __name__ == "__main__":
    from tokenizers import Tokenizer
    texts, out = strings(n=40), {}
    for name, doc in kinds(400).items():
        t = Tokenizer.from_str(json.dumps(doc))
        out[name] = {"doc": doc, "ids": [t.encode(s, add_special_tokens=False).ids for s in texts]}
    text = json.dumps({"strings": texts, "tokenizers": out}, separators=(",", ":"))
    (ROOT / "tests" / "tokenizers.json").write_text(text + "\n", encoding="utf-8")
