"""A Hugging Face tokenizer (tokenizer.json, or vocab.json and merges.txt) -> support/tokenizer.py's
Tokenizer, which needs only tiktoken. A part that cannot be converted exactly is refused by name.

The two merge differently. Hugging Face has a list of pairs. tiktoken joins any two neighbours whose
bytes together are a token, the token of the lowest rank before the others, and takes a piece that
is a token as it is. They agree on every text if every token, spelled in single bytes and merged by
the pairs, comes out as that token, and ranks as the last pair of that does: within a longer text
its bytes are merged in the same way. This is checked for all tokens.

With ignore_merges (Llama 3.1) Hugging Face too takes a piece that is a token as it is. Then a token
that does not come out is right as well, unless its bytes end as two tokens, which tiktoken alone
would join in the middle of a piece.
"""
import functools
import itertools
import json
import os
import sys

import regex
import tiktoken

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from support.tokenizer import Tokenizer  # noqa: E402

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# digits are cut out first, so a piece ends before each of them
DIGITS = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+")
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# class of a tokenizer without tokenizer.json: its pattern, and whether it brings text into NFC
SLOW = {"GPT2Tokenizer": (GPT2, False), "Qwen2Tokenizer": (QWEN2, True),
        "DreamTokenizer": (QWEN2, True)}
PATIENCE = 5  # seconds of CPU time for 195,000 characters: a good pattern needs less than one
# GPT-2's alphabet, a printable letter for every byte: {letter: byte}
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {chr(b): b for b in PLAIN} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PLAIN)}

def refuse(where, value):
    raise ValueError(f"this tokenizer cannot be converted exactly: {where} is "
                     f"{json.dumps(value)[:80]}, which is not supported")

def need(value, where, kind):
    """-> value, if it is of that kind"""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {json.dumps(value)[:80]}, expected {kind.__name__}")
    return value

def only(part, where, **allowed):
    """Check that every field of part is allowed and has an allowed value (None: any value)."""
    for name, value in need(part, where, dict).items():
        good = allowed.get(name, [])  # 1 == True, so types are compared as well
        if good is not None and (type(value), value) not in [(type(v), v) for v in good]:
            refuse(f"{where}.{name}", value)

def read_normalizer(part):
    """-> whether text is brought into NFC first"""
    if part is None:
        return False
    if need(part, "normalizer", dict).get("type") == "Sequence":
        only(part, "normalizer", type=None, normalizers=None)
        parts = need(part.get("normalizers"), "normalizer.normalizers", list)
        return any([read_normalizer(p) for p in parts])
    only(part, "normalizer", type=["NFC"])
    return True

def read_pre_tokenizer(part):
    """-> pattern, prefix_space"""
    where, parts = "pre_tokenizer", [part]
    if need(part, where, dict).get("type") == "Sequence":
        only(part, where, type=None, pretokenizers=None)
        parts = need(part.get("pretokenizers"), f"{where}.pretokenizers", list)
    kinds = [need(p, f"a part of {where}", dict).get("type") for p in parts]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"], ["Digits", "ByteLevel"]):
        refuse(where, kinds)
    first, kind = parts[0], kinds[0]
    last = {"use_regex": True, "add_prefix_space": True} | parts[-1]  # an absent setting is on
    only(last, f"{where}.ByteLevel", type=None, trim_offsets=None, use_regex=[kind != "Split"],
         add_prefix_space=[False, True] if kind == "ByteLevel" else [False])
    if kind == "ByteLevel":
        return GPT2, last["add_prefix_space"]
    if kind == "Digits":
        only({"individual_digits": False} | first, f"{where}.Digits", type=None,
             individual_digits=[True])
        return DIGITS, False
    only(first, f"{where}.Split", type=None, pattern=None, behavior=["Isolated"], invert=[False])
    only(first.get("pattern"), f"{where}.Split.pattern", Regex=None)
    return need(first["pattern"].get("Regex"), f"{where}.Split.pattern.Regex", str), False

def check_syntax(pattern):
    """tiktoken's regular expressions are Rust's, Hugging Face's are Oniguruma's. Refuse syntax that
    the two read differently."""
    # property escapes, other escapes and sets do not count as signs
    bare = regex.sub(r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^]\\])*\]", "x", pattern)
    for sign in (r"\^", r"\$", r"\{[\d,]*\}\+", r"\(\?[msxPR(]", r"\(\?<(?![=!])"):
        if found := regex.search(sign, bare):
            refuse(f"the sign {found[0]} in the pattern", pattern)
    if odd := set(regex.findall(r"\\(.)", pattern)) & set("hHRXKGyYO"):
        refuse(f"the escape \\{min(odd)} in the pattern", pattern)
    if regex.search(r"\[\^?(?:\\.|[^]\\])*(\[|--|&&|~~)", pattern):
        refuse("a set within a set in the pattern", pattern)

@functools.cache  # takes a second, and tests convert the same patterns many times
def total(pattern):
    """The pattern for tiktoken. tiktoken drops text that the pattern does not match, Hugging Face
    keeps it as a piece, so a pattern that leaves anything out gets an alternative for it."""
    check_syntax(pattern)
    try:
        tiktoken.Encoding("try", pat_str=pattern, special_tokens={},
                          mergeable_ranks={bytes([b]): b for b in range(256)})
        compiled = regex.compile(pattern)
    except (regex.error, ValueError) as e:
        refuse(f"the pattern ({str(e).splitlines()[0]})", pattern)
    letters = [chr(c) for c in range(0x30000) if not 0xD800 <= c < 0xE000]
    for around in ("{}", "a{}", " {}", "{}1", "\n{} "):
        text = "".join(map(around.format, letters))
        try:
            found = [len(m.group()) for m in compiled.finditer(text, timeout=PATIENCE)]
        except TimeoutError:
            refuse("a pattern that takes too long", pattern)
        if 0 in found:
            refuse("a pattern that matches the empty text in places", pattern)
        if sum(found) < len(text):
            return f"{pattern}|(?:(?!{pattern})[\\s\\S])+"
    return pattern

def read_added(tokens, nfc):
    """-> {text: id} of the tokens that are cut out of a text before anything else"""
    where, added, kinds = "added_tokens", {}, {False: [], True: []}
    for token in need(tokens, where, list):
        only(token, where, id=None, content=None, special=None, normalized=None, lstrip=[False],
             rstrip=[False], single_word=[False])
        content = need(token.get("content"), f"{where}.content", str)
        number = need(token.get("id"), f"{where}.id", int)
        if not content or added.setdefault(content, number) != number:
            refuse(f"{where}.content", content)
        kinds[bool(token.get("normalized"))].append(content)
    if nfc and kinds[True]:
        refuse(f"{where}.normalized beside a normalizer", kinds[True][:3])
    for a, b in itertools.product(kinds[True], kinds[False]):  # Hugging Face looks for a last
        lengths = range(1, min(len(a), len(b)))
        if a in b or b in a or any(a.endswith(b[:k]) or b.endswith(a[:k]) for k in lengths):
            refuse("an added token that is normalized and overlaps one that is not", a)
    return added

def merge(text, rank, least=1):
    """Merge text, one piece in LETTERS, by the pairs in the order of their ranks, as Hugging Face
    does, until so few are left. -> list of tokens"""
    parts = list(text)
    while len(parts) > least:
        found = [(rank[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in rank]
        if not found:
            break
        i = min(found)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts

def build(vocab, merges, added, pattern, nfc, prefix_space, ignore_merges=False):
    """vocab {token in LETTERS: id}, merges [(a, b)], added {text: id} -> Tokenizer"""
    for token, i in need(vocab, "vocab.json", dict).items():
        need(i, f"the id of {token!r}", int)
        if added.get(token, i) != i:
            refuse("an added token that has another id in the vocabulary", token)
    vocab = {token: i for token, i in vocab.items() if token not in added}
    if lacking := [f"0x{b:02x}" for letter, b in LETTERS.items() if letter not in vocab]:
        refuse("the list of single bytes without a token", lacking)
    rank = {}
    for pair in map(tuple, merges):
        if [*map(type, pair)] != [str, str] or not {*pair, "".join(pair)} <= vocab.keys():
            refuse("a merge that is not of two tokens in the vocabulary", pair)
        if pair in rank or not set("".join(pair)) <= LETTERS.keys():
            refuse("a merge that is there twice or is not of bytes", pair)
        rank[pair] = len(rank)
    # the check of every token. Of several ways to make a token one is taken, and its rank counts
    made = dict.fromkeys(a + b for a, b in rank)
    if ignore_merges:
        made |= dict.fromkeys(t for t in vocab if len(t) > 1 and set(t) <= LETTERS.keys())
    last = {t: tuple(merge(t, rank, least=2)) for t in made}
    wrong = [t for t in made if last[t] not in rank]
    if wrong and not ignore_merges:
        refuse(f"the list of tokens ({len(wrong)} of {len(made)}) that their own bytes do not "
               "merge to", wrong[:3])
    for t in wrong:
        if len(last[t]) == 2:
            refuse("with ignore_merges, a token that no merge makes, of two that exist", t)
    order = sorted(made, key=lambda t: rank.get(last[t], len(rank)))
    ranks = {t: vocab[t] for t in [*LETTERS, *order]}
    unmade = {t: i for t, i in vocab.items() if t not in ranks}

    def in_bytes(tokens):
        return {bytes(LETTERS[c] for c in t) if set(t) <= LETTERS.keys() else t.encode(): i
                for t, i in tokens.items()}
    return Tokenizer(in_bytes(ranks), total(pattern), added, in_bytes(unmade), nfc, prefix_space)

def from_json(doc):
    """The content of a tokenizer.json -> Tokenizer"""
    only(doc, "tokenizer.json", **dict.fromkeys((
        "version", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder",
        "model", "truncation", "padding")))  # the last two are up to the caller
    decoder, model = doc.get("decoder"), doc.get("model")
    if decoder is not None and need(decoder, "decoder", dict).get("type") != "ByteLevel":
        refuse("decoder", decoder)
    only(model, "model", type=["BPE"], vocab=None, merges=None, dropout=[None, 0, 0.0],
         unk_token=None, fuse_unk=None, byte_fallback=[None, False],
         continuing_subword_prefix=[None, ""], end_of_word_suffix=[None, ""],
         ignore_merges=[None, False, True])
    nfc = read_normalizer(doc.get("normalizer"))
    pattern, prefix_space = read_pre_tokenizer(doc.get("pre_tokenizer"))
    added = read_added(doc.get("added_tokens", []), nfc)
    vocab = need(model.get("vocab"), "model.vocab", dict)
    new = [i for t, i in added.items() if t not in vocab]
    if new != list(range(len(vocab), len(vocab) + len(new))):
        refuse("the list of ids of added tokens that are not in the vocabulary and do not continue "
               "its numbers", new[:5])
    merges = [m.split(" ") if isinstance(m, str) else need(m, "a merge", list)
              for m in need(model.get("merges"), "model.merges", list)]
    return build(vocab, merges, added, pattern, nfc, prefix_space, model.get("ignore_merges"))

def from_parts(vocab, merges, config, more):
    """vocab.json, merges.txt, tokenizer_config.json, added_tokens.json -> Tokenizer"""
    kind = need(config, "tokenizer_config.json", dict).get("tokenizer_class")
    if kind not in SLOW:
        refuse("tokenizer_class", kind)
    pattern, nfc = SLOW[kind]
    tokens = [{"id": int(i), **t} for i, t in config.get("added_tokens_decoder", {}).items()]
    known = {t["content"] for t in tokens}
    tokens += [{"id": i, "content": t} for t, i in need(more, "added_tokens.json", dict).items()
               if t not in known]
    pairs = [line.split(" ") for line in merges.split("\n")
             if line and not line.startswith("#version")]
    made = build(vocab, pairs, read_added(tokens, nfc), pattern, nfc,
                 bool(config.get("add_prefix_space")))
    if lost := [repr(b) for b in made.unmerged if not regex.fullmatch(rb"<.+>", b)]:
        refuse("merges.txt is cut, or the list of tokens that it does not make", lost[:3])
    return made

def read_file(path, parse=json.loads):
    try:
        with open(path, encoding="utf-8") as f:
            return parse(f.read())
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        kind = "UTF-8" if isinstance(e, UnicodeDecodeError) else "JSON"
        raise ValueError(f"{path} is damaged: it is not {kind}") from None

def from_folder(folder):
    """A folder of the Hugging Face kind -> Tokenizer, or None if it has none."""
    path, vocab, merges, config, more = (os.path.join(folder, f) for f in (
        "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"))
    if os.path.exists(path):
        convert, docs = from_json, [read_file(path)]
    elif os.path.exists(vocab):
        path, convert = folder, from_parts
        docs = [read_file(vocab), read_file(merges, str), read_file(config),
                read_file(more) if os.path.exists(more) else {}]
    else:
        return None
    try:
        return convert(*docs)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    except (TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {type(e).__name__}: {e}") from None
