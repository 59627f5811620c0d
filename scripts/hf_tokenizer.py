"""A Hugging Face tokenizer (tokenizer.json, or vocab.json and merges.txt) -> the Tokenizer of model.py, which needs nothing
but tiktoken. What it cannot do exactly it refuses by name.

The two differ in how they merge. Hugging Face has a list of pairs; tiktoken joins any two neighbours whose bytes together
are a token, the one that was made first before the others, and takes a piece that is a token as it is. They agree on every
text if every token, spelled in single bytes and merged by the pairs, comes out as that token; that is checked for all of them.
"""
import json
import os
import sys

import regex
import tiktoken

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import Tokenizer  # noqa: E402

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"  # digits are cut out first, so what is before one ends
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SLOW = {"GPT2Tokenizer": (GPT2, False), "Qwen2Tokenizer": (QWEN2, True), "DreamTokenizer": (QWEN2, True)}  # class: pattern, NFC


def byte_letters():
    """GPT-2's alphabet: a printable letter for every byte. -> {letter: byte}"""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


LETTERS = byte_letters()


PATIENCE = 5  # seconds of processor time for 195,000 characters, which a good pattern cuts in less than one
REFUSED = "this tokenizer cannot be converted exactly: "


def refuse(where, value):
    raise ValueError(f"{REFUSED}{where} is {json.dumps(value)[:80]}, which is not supported")


def need(value, where, kind):
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {json.dumps(value)[:80]}, which a tokenizer cannot have there")
    return value


def only(part, where, **allowed):
    """Every field of part is one of those allowed and has one of their values (None: any value)."""
    need(part, where, dict)
    for name, value in part.items():
        if name not in allowed or (allowed[name] is not None and not any(value is v or value == v and type(value) is type(v) for v in allowed[name])):
            refuse(f"{where}.{name}", value)


def read_normalizer(part):
    """-> whether text is brought into NFC first."""
    if part is None:
        return False
    if need(part, "normalizer", dict).get("type") == "Sequence":
        only(part, "normalizer", type=None, normalizers=None)
        return any([read_normalizer(p) for p in need(part.get("normalizers"), "normalizer.normalizers", list)])
    only(part, "normalizer", type=["NFC"])
    return True


def read_pre_tokenizer(part):
    """-> pattern, prefix_space."""
    parts = [part]
    if need(part, "pre_tokenizer", dict).get("type") == "Sequence":
        only(part, "pre_tokenizer", type=None, pretokenizers=None)
        parts = need(part.get("pretokenizers"), "pre_tokenizer.pretokenizers", list)
    kinds = [need(p, "a part of pre_tokenizer", dict).get("type") for p in parts]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"], ["Digits", "ByteLevel"]):
        refuse("pre_tokenizer", kinds)
    alone, split = kinds == ["ByteLevel"], kinds[0] == "Split"
    last = {"use_regex": True, "add_prefix_space": True} | parts[-1]  # what is absent is on
    only(last, "pre_tokenizer.ByteLevel", type=None, trim_offsets=None, use_regex=[not split], add_prefix_space=[False, True] if alone else [False])
    if alone:
        return GPT2, last["add_prefix_space"]
    if not split:
        only({"individual_digits": False} | parts[0], "pre_tokenizer.Digits", type=None, individual_digits=[True])
        return DIGITS, False
    only(parts[0], "pre_tokenizer.Split", type=None, pattern=None, behavior=["Isolated"], invert=[False])
    only(need(parts[0].get("pattern"), "pre_tokenizer.Split.pattern", dict), "pre_tokenizer.Split.pattern", Regex=None)
    return need(parts[0]["pattern"].get("Regex"), "pre_tokenizer.Split.pattern.Regex", str), False


def total(pattern):
    """The pattern for tiktoken, whose regular expressions are Rust's and not Oniguruma's: what the two read differently is
    refused. tiktoken drops text that the pattern does not match, Hugging Face keeps it as a piece: a pattern that leaves
    anything out gets an alternative for it."""
    sets = r"\[(?:\\.|[^]\\])*\]"
    bare = regex.sub(r"\\[pP]\{[^}]*\}|\\.|" + sets, "x", pattern)  # escapes and sets do not count
    for sign in (r"\^", r"\$", r"\{[\d,]*\}\+", r"\(\?[msxPR(]", r"\(\?<(?![=!])"):
        if found := regex.search(sign, bare):
            refuse(f"the sign {found[0]} in the pattern", pattern)
    if odd := set(regex.findall(r"\\(.)", pattern)) & set("hHRXKGyYO"):
        refuse(f"the escape \\{min(odd)} in the pattern", pattern)
    if regex.search(r"\[\^?(?:\\.|[^]\\])*(\[|--|&&|~~)", pattern):
        refuse("a set within a set in the pattern", pattern)
    try:
        tiktoken.Encoding("try", pat_str=pattern, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={})
        for around in ("{}", "a{}", " {}", "{}1", "\n{} "):
            text = "".join(around.format(chr(c)) for c in range(0x30000) if not 0xD800 <= c < 0xE000)
            found = [len(m.group()) for m in regex.finditer(pattern, text, timeout=PATIENCE)]
            if 0 in found:
                refuse("a pattern that matches nothing at all in places", pattern)
            if sum(found) < len(text):
                return f"{pattern}|(?:(?!{pattern})[\\s\\S])+"
    except (regex.error, ValueError) as e:
        if str(e).startswith(REFUSED):
            raise
        refuse(f"the pattern ({str(e).splitlines()[0]})", pattern)
    except TimeoutError:
        refuse("a pattern that takes too long", pattern)
    return pattern


def overlap(a, b):
    return a in b or b in a or any(a.endswith(b[:k]) or b.endswith(a[:k]) for k in range(1, min(len(a), len(b))))


def read_added(tokens, nfc):
    """-> {text: id} of the tokens that are cut out of a text before anything else."""
    added, kinds = {}, {False: [], True: []}
    for token in need(tokens, "added_tokens", list):
        only(token, "added_tokens", id=None, content=None, special=None, normalized=None, lstrip=[False], rstrip=[False], single_word=[False])
        content = need(token.get("content"), "added_tokens.content", str)
        if not content or added.setdefault(content, need(token.get("id"), "added_tokens.id", int)) != token["id"]:
            refuse("added_tokens.content", content)
        kinds[bool(token.get("normalized"))].append(content)
    if nfc and kinds[True]:
        refuse("added_tokens.normalized beside a normalizer", kinds[True][:3])
    for a in kinds[True]:  # Hugging Face looks for these last
        if any(overlap(a, b) for b in kinds[False]):
            refuse("an added token that is normalized and overlaps one that is not", a)
    return added


def merge(text, rank):
    """The pairs of text, which is one piece in LETTERS, in the order of their ranks, as Hugging Face merges them."""
    parts = list(text)
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), len(rank)))
        if (parts[best], parts[best + 1]) not in rank:
            break
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts


def build(vocab, merges, added, pattern, nfc, prefix_space, ignore_merges=False):
    """vocab {token in LETTERS: id}, merges [(a, b)], added {text: id} -> Tokenizer"""
    vocab = {need(t, "a token", str): need(i, f"the id of {t!r}", int) for t, i in need(vocab, "vocab", dict).items() if added.get(t) != i}
    if twice := vocab.keys() & added.keys():
        refuse("an added token that has another id in the vocabulary", min(twice))
    ranks = {letter: vocab.get(letter) for letter in LETTERS}
    lacking = [f"0x{LETTERS[letter]:02x}" for letter, i in ranks.items() if i is None]
    if lacking:
        refuse("the list of single bytes without a token", lacking)
    rank = {}
    for a, b in merges:
        if not {a, b, a + b} <= vocab.keys():
            refuse("a merge of tokens that are not in the vocabulary", [a, b])
        if (a, b) in rank or not set(a + b) <= LETTERS.keys():
            refuse("a merge that stands there twice or is not of bytes", [a, b])
        rank[a, b] = len(rank)
        ranks.setdefault(a + b, vocab[a + b])  # a token made in two ways: the first one counts
    unmade = {t: i for t, i in vocab.items() if t not in ranks}
    wrong = [t for t in ranks if merge(t, rank) != [t]]  # the check of every token
    if wrong:
        refuse(f"the list of tokens ({len(wrong)} of {len(ranks)}) that their own bytes do not merge to", wrong[:3])
    if ignore_merges:  # a piece that is a token is taken as it is, whether merges lead there or not
        ranks |= {t: i for t, i in unmade.items() if set(t) <= LETTERS.keys()}
        for t in unmade.keys() & ranks.keys():  # but tiktoken would make it in the middle of a piece as well
            if any(t[:i] in ranks and t[i:] in ranks for i in range(1, len(t))):
                refuse("with ignore_merges, a token that no merge makes, of two that there are", t)
        unmade = {t: i for t, i in unmade.items() if t not in ranks}

    def to_bytes(t):
        return bytes(LETTERS[c] for c in t) if set(t) <= LETTERS.keys() else t.encode()

    return Tokenizer({to_bytes(t): i for t, i in ranks.items()}, total(pattern), added, {to_bytes(t): i for t, i in unmade.items()}, nfc, prefix_space)


def from_json(doc):
    """The content of a tokenizer.json -> Tokenizer."""
    only(doc, "tokenizer.json", version=None, truncation=None, padding=None,  # these two are the caller's business
         added_tokens=None, normalizer=None, pre_tokenizer=None, post_processor=None, decoder=None, model=None)
    decoder = doc.get("decoder")
    if decoder is not None and need(decoder, "decoder", dict).get("type") != "ByteLevel":
        refuse("decoder", decoder)
    model = doc.get("model")
    only(model, "model", type=["BPE"], vocab=None, merges=None, dropout=[None, 0, 0.0], unk_token=None, fuse_unk=None, byte_fallback=[None, False],
         continuing_subword_prefix=[None, ""], end_of_word_suffix=[None, ""], ignore_merges=[None, False, True])
    nfc, (pattern, prefix_space) = read_normalizer(doc.get("normalizer")), read_pre_tokenizer(doc.get("pre_tokenizer"))
    added, vocab = read_added(doc.get("added_tokens", []), nfc), need(model.get("vocab"), "model.vocab", dict)
    new = [i for t, i in added.items() if t not in vocab]
    if new != list(range(len(vocab), len(vocab) + len(new))):
        refuse("the list of ids of added tokens that the vocabulary lacks, which do not continue its numbers", new[:5])
    merges = [tuple(m.split(" ") if isinstance(m, str) else need(m, "a merge", list)) for m in need(model.get("merges"), "model.merges", list)]
    if bad := [m for m in merges if len(m) != 2 or not all(isinstance(t, str) for t in m)]:
        refuse("a merge", bad[0])
    return build(vocab, merges, added, pattern, nfc, prefix_space, bool(model.get("ignore_merges")))


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: it is no JSON in UTF-8") from None


def named(path, read, *args):
    """read(*args), whose faults name the file."""
    try:
        return read(*args)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    except (TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {type(e).__name__}: {e}") from None


def read_merges(path):
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.read().split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read {path}: {getattr(e, 'strerror', None) or 'it is no UTF-8'}") from None
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if bad := [m for m in merges if len(m) != 2]:
        raise ValueError(f"{path}: a merge is {bad[0]}")
    return merges


def from_folder(folder):
    """A folder of the Hugging Face kind -> Tokenizer, or None where it has no tokenizer. Raises ValueError."""
    whole, vocab, merges, settings, more = (os.path.join(folder, f) for f in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"))
    if os.path.exists(whole):
        return named(whole, from_json, read_json(whole))
    if not os.path.exists(vocab):
        return None

    def read_settings(config):  # the older form: the class in tokenizer_config.json stands for a pattern
        kind = need(config, "tokenizer_config.json", dict).get("tokenizer_class")
        if kind not in SLOW:
            refuse("tokenizer_class", kind)
        return [*SLOW[kind], bool(config.get("add_prefix_space"))], [{"id": int(i), **t} for i, t in config.get("added_tokens_decoder", {}).items()]

    (pattern, nfc, prefix_space), tokens = named(settings, read_settings, read_json(settings))
    if os.path.exists(more):
        known = {t["content"] for t in tokens}
        tokens += [{"id": i, "content": t} for t, i in named(more, need, read_json(more), "it", dict).items() if t not in known]
    return named(vocab, build, read_json(vocab), read_merges(merges), named(settings, read_added, tokens, nfc), pattern, nfc, prefix_space)
