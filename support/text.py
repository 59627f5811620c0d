"""A text of the user as the data of a training run, instead of support/problems.py."""
import hashlib
import random

import torch

from model import diffusion_noise, every_token
from support.checkpoint import first_line
from support.tokenizer import build_tokenizer

def read_text(path, checksum=None):
    """-> text, its checksum. Given the checksum of an earlier run, refuses another text."""
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except UnicodeDecodeError:
        raise ValueError(f"--data {path} is not UTF-8 text") from None
    except OSError as e:
        moved = ": if it was moved, add --data FILE to --resume" if checksum else ""
        raise ValueError(f"cannot read --data {path}: {first_line(e)}{moved}") from None
    found = hashlib.sha256(text.encode()).hexdigest()
    if checksum not in (None, found):
        raise ValueError(f"--data {path} is not the text that the run was started with: add --data "
                         "FILE with that text to --resume, or start again without --resume")
    return text, found

class Text:
    """Rows from anywhere in the text; its last tenth is for validation."""
    def __init__(self, args, checksum=None, tokenizer=None):
        self.args, T = args, args.prompt_len + args.gen_length
        text, self.checksum = read_text(args.data, checksum)
        cut = len(text) * 9 // 10
        tokenizer = self.tokenizer = tokenizer or build_tokenizer(text[:cut], args.vocab)
        self.train = torch.tensor(tokenizer.encode(text[:cut]), dtype=torch.int64)
        tail = torch.tensor(tokenizer.encode(text[cut:]), dtype=torch.int64)
        if min(len(tail), len(self.train)) < T:
            raise ValueError(f"--data {args.data} is too short: its last tenth has {len(tail)} "
                             f"tokens, the rest {len(self.train)}, and a row needs {T}")
        val = tail[:len(tail) // T * T].view(-1, T)[:256]
        self.val = val, torch.zeros(len(val)).long(), torch.zeros(val.shape).bool()
        self.bytes_per_token = len(text[cut:].encode()) / len(tail)
        starts = range(cut, len(text), max(1, (len(text) - cut) // 3))[:3]
        self.extra = {"prompts": [self.prompt(text[i:]) for i in starts],
                      "gen_length": args.gen_length, "block_length": args.block_length}

    def prompt(self, text):
        """The beginning of a text, of ids that make whole characters and that it encodes to."""
        tokenizer, n = self.tokenizer, self.args.prompt_len
        ids = tokenizer.encode(text[:20 * n])[:n]
        while tokenizer.encode(tokenizer.decode(ids)) != ids:
            ids = ids[:-1]
        return tokenizer.decode(ids) or text[0]

    def batch(self, step):
        """-> tokens (B, T), masked (B, T), weight (B, T), and None: nothing is padded"""
        args, T = self.args, self.val[0].shape[1]
        g = torch.Generator().manual_seed(random.Random(f"{args.seed} {step}").getrandbits(32))
        start = torch.randint(len(self.train) - T + 1, (args.batch_size, 1), generator=g)
        tokens = self.train[start + torch.arange(T)]                           # (B, T)
        free = torch.zeros(tokens.shape).bool()
        noise = every_token(free) if args.causal else diffusion_noise(free, generator=g)
        return tokens, *noise, None
