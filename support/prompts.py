"""Prompts: from the flags of sample.py or from the checkpoint, checked before the work."""
import json
import random

import torch

from support.evaluate import encode

N_DEMO = 4  # of the checkpoint's problems that a run without prompts answers
FALLBACK = ["What is a key-value cache?"]  # for checkpoints with neither problems nor prompts
LONGEST = 400_000  # characters: tiktoken breaks down on a million blanks

def check_text(text, what="a prompt"):
    """Raises ValueError for what the tokenizer should not be given."""
    if not isinstance(text, str):
        raise ValueError(f"{what} has to be text, and this is not: {text!r:.80}")
    if not 0 < len(text) <= LONGEST:
        size = f"has {len(text):,} characters" if text else "is empty"
        raise ValueError(f"{what} {size}: it needs 1 to {LONGEST:,} characters")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not UTF-8 text: {text!r:.80}") from None

def read_prompts(texts, path):
    """-> the texts and those of the file, one a line; - is stdin. Raises ValueError."""
    lines = []
    if path is not None:
        try:
            with open(0 if path == "-" else path, "rb") as f:
                lines = f.read().decode("utf-8-sig").split("\n")  # not at U+2028, as splitlines
            lines = [line.rstrip("\r") for line in lines if line.strip()]
            if path.endswith(".jsonl"):
                lines = [json.loads(line)["prompt"] for line in lines]
        except OSError as e:
            raise ValueError(f"cannot read --prompts {path}: {e.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"--prompts {path} is not UTF-8 text") from None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"--prompts {path} needs JSON with a `prompt` on each line") from None
        if not texts and not lines:
            raise ValueError(f"--prompts {path} holds no prompt")
    for text in texts + lines:
        check_text(text)
    return texts + lines

def parse_ids(text):
    try:
        return None if text is None else [int(i) for i in text.split(",")]
    except ValueError:
        raise ValueError(f"--ids is {text!r:.80}, and has to be token ids such as 1,2,3") from None

def find_questions(args, texts, ids, extra, tokenizer):
    """-> [(text, ids, right answer)] of the user's prompts or the checkpoint's own; else None."""
    pairs = [(text, None) for text in texts]
    if not texts and not ids:
        own = [(text, None) for text in extra.get("prompts", FALLBACK)]
        pairs = extra["problems"][:N_DEMO] if "problems" in extra else own
        pairs = pairs if args.watch is None else pairs[:1]  # one to look at
    if pairs and tokenizer is None:
        raise ValueError(f"{args.ckpt} has no tokenizer, so it cannot read text: give --ids")
    questions = [(text, encode([text], tokenizer, extra, args.raw), right) for text, right in pairs]
    return questions + ([(None, ids, None)] if ids else [])

def draws(seed, index):
    """A generator for the prompt of this index, so that answers do not depend on the batch."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {index}").getrandbits(32))
