"""Byte-level BPE by tiktoken, built from what the checkpoint holds; and a small BPE trainer."""
import base64
import unicodedata
from collections import Counter

import regex  # comes with tiktoken; the standard re knows neither \p{L} nor possessive quantifiers
import tiktoken
import torch

# how text is cut into pieces before bytes are merged: as LLaDA does, digits one by one
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
           r"|\s*[\r\n]|\s+(?!\S)|\s+")

class Tokenizer:
    """Text to ids and back; nothing is ever downloaded.

    ranks    {bytes: id} of what text is cut into, in the order of the merges
    pattern  the regex that cuts text into pieces first
    special  {text: id} of the tokens that no text spells (mask, end of text, ...)
    unmerged {bytes: id} of tokens that no merge makes: decoded, but never encoded to
    nfc      text is brought into Unicode's form NFC first (Qwen2 does)
    prefix_space  text that does not begin with a space gets one (some of GPT-2's kin do)
    """
    def __init__(self, ranks, pattern, special, unmerged={}, nfc=False, prefix_space=False):
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        ids = [*ranks.values(), *special.values(), *unmerged.values()]
        if missing:
            raise ValueError(f"the tokenizer lacks the single bytes {missing[:4]}")
        if len(set(ids)) < len(ids):
            raise ValueError("two tokens of the tokenizer share an id")
        if min(ids) < 0:
            raise ValueError(f"the tokenizer has the id {min(ids)}")
        if regex.match(pattern, ""):
            raise ValueError("the tokenizer's pattern matches the empty text")
        self.ranks, self.pattern, self.special, self.unmerged = ranks, pattern, special, unmerged
        self.nfc, self.prefix_space = nfc, prefix_space
        # tiktoken takes one number for a token's id and its place in the order of the merges
        places = {b: i for i, b in enumerate(ranks)}
        self.encoding = tiktoken.Encoding("dkv-min", pat_str=pattern, mergeable_ranks=places,
                                          special_tokens={})
        self.ids = list(ranks.values())  # place -> id
        self.bytes = {i: b for part in (ranks, unmerged) for b, i in part.items()}
        self.bytes |= {i: text.encode() for text, i in special.items()}
        longest_first = sorted(special, key=len, reverse=True)
        self.any_special = regex.compile(f"({'|'.join(map(regex.escape, longest_first))})")

    def encode(self, text, special=False):
        """str -> list of ids. Text that spells a special token is text, unless `special` is set."""
        ids = []
        parts = self.any_special.split(text) if special and self.special else [text]
        for i, piece in enumerate(parts):
            if i % 2:
                ids.append(self.special[piece])
                continue
            if self.nfc:
                piece = unicodedata.normalize("NFC", piece)
            if self.prefix_space and piece and piece[0] != " ":
                piece = " " + piece
            try:
                ids += [self.ids[i] for i in self.encoding.encode_ordinary(piece)]
            except BaseException as e:  # a panic of tiktoken's Rust is not an Exception
                if type(e).__name__ != "PanicException":
                    raise
                why = (str(e).strip() or "no reason").splitlines()[0]
                raise ValueError(f"the tokenizer's pattern gives up on this text: {why}") from None
        return ids

    def decode(self, ids):
        """Ids -> str. Never raises: unknown ids give nothing, bytes that are not UTF-8 U+FFFD."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")

    def state(self):
        """-> plain strings and ints for a checkpoint. Ranks are lines of `base64 id`, as in
        tiktoken's own files."""
        def lines(part):
            return "".join(f"{base64.b64encode(b).decode()} {i}\n" for b, i in part.items())
        return dict(ranks=lines(self.ranks), pattern=self.pattern, special=self.special,
                    unmerged=lines(self.unmerged), nfc=self.nfc, prefix_space=self.prefix_space)

    @classmethod
    def from_state(cls, state):
        def read(lines):
            return {base64.b64decode(b): int(i) for b, i in map(str.split, lines.splitlines())}
        return cls(read(state["ranks"]), state["pattern"], dict(state["special"]),
                   read(state.get("unmerged", "")), bool(state.get("nfc")),
                   bool(state.get("prefix_space")))

def train_bpe(text, n):
    """-> {bytes: id}: the 256 bytes, then the most frequent pair of neighbours, again and again, up
    to n ids. A merge updates the counts around its places only: one endless word is not slow."""
    freq = Counter(regex.findall(PATTERN, text))
    # the distinct words one after the other. A -1 at both ends of each belongs to no pair
    lengths = torch.tensor([1, *(len(word.encode()) + 1 for word in freq)])
    words = bytearray("\0".join(["", *freq, ""]).encode())
    ids = torch.frombuffer(words, dtype=torch.uint8).long()
    ids[lengths.cumsum(0) - 1] = -1
    times = torch.tensor([0, *freq.values()]).repeat_interleave(lengths)  # that a word occurs
    token, count = [bytes([b]) for b in range(256)], Counter()
    ranks = {b: i for i, b in enumerate(token)}

    def tally(at, sign):
        """Counts the pairs that begin at these places."""
        at = at[(ids[at] >= 0) & (ids[at + 1] >= 0)]
        pairs, which = torch.unique(ids[at] << 32 | ids[at + 1], return_inverse=True)
        sums = torch.zeros_like(pairs).index_add_(0, which, times[at])
        for pair, f in zip(pairs.tolist(), sums.tolist()):
            count[pair >> 32, pair & 0xffffffff] += sign * f

    tally(torch.arange(len(ids) - 1), 1)
    while len(ranks) < n and (most := max(count.values(), default=0)) >= 2:
        ties = [pair for pair, f in count.items() if f == most]
        x, y = max(ties, key=lambda pair: (token[pair[0]], token[pair[1]]))
        merged = token[x] + token[y]
        if merged not in ranks:
            ranks[merged] = len(token)
            token.append(merged)
        at = ((ids[:-1] == x) & (ids[1:] == y)).nonzero()[:, 0]
        if x == y:  # of a run of these pairs, which overlap, the first, the third, ...
            run = at - torch.arange(len(at))
            at = at[(at - at[torch.searchsorted(run, run)]) % 2 == 0]
        tally(torch.cat([at - 1, at, at + 1]).unique(), -1)
        ids[at], ids[at + 1] = ranks[merged], -2
        ids, times = ids[ids > -2], times[ids > -2]
        at -= torch.arange(len(at))
        tally(torch.cat([at - 1, at]).unique(), 1)
        del count[x, y]
    return ranks

def build_tokenizer(text, vocab):
    """-> Tokenizer of `vocab` ids at most, the last two for the end of the text and the mask."""
    ranks = train_bpe(text, vocab - 2)
    return Tokenizer(ranks, PATTERN, {"<|eos|>": len(ranks), "<|mask|>": len(ranks) + 1})
