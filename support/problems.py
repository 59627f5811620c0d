"""The word problems that the toy learns, made here, so that answers can be checked. A question has
a few numbers, and the worked answer computes with them in turn: each result needs the one before.
Decoding has to respect that order, which makes the toy a test of caches and decoding orders."""
import random
import zlib

import torch

from model import diffusion_noise, every_token
from support.tokenizer import build_tokenizer

SHE = """Anna Clara Emma Grace Ida Kate Maria Olga Rosa Tina
         Alma Dora Fiona Hanna Julia Laura Nina Petra Vera Zoe""".split()
HE = """Ben David Felix Henry Jack Leo Noah Paul Sam Victor
        Bruno Cecil Erik George Ivan Karl Martin Oscar Peter Walter""".split()
THINGS = """apples pens coins cards shells stamps books cups
            nuts stones candles buttons pears ribbons marbles plums""".split()
HOLDERS = "boxes bags baskets trays jars drawers crates bowls".split()
MORE = "finds buys wins makes collects borrows".split()
LESS = "loses sells breaks lends eats wastes".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TEMPLATE = "{}\n"
prompt = TEMPLATE.format  # a question -> the prompt, which has a newline after it
EQUAL, DOT = ord("="), ord(".")  # ids: in every tokenizer here a single byte has its own number

def problem(rng, ops):
    """One problem with ops additions or subtractions after the product, all results of two digits
    -> numbers, question, answer. In any wording (7, 8, -9, 5) is 7*8, minus 9, plus 5."""
    a, b = rng.choice([(a, b) for a in range(2, 10) for b in range(2, 10) if a * b >= 10])
    who, names = rng.choice([("she", SHE), ("he", HE)])
    name, thing, holder = (rng.choice(words) for words in (names, THINGS, HOLDERS))
    numbers, total = [a, b], a * b
    question, answer = [f"{name} has {a} {holder} of {b} {thing}."], [f"{a}*{b}={total}."]
    for day in DAYS[:ops]:
        d = rng.choice([d for d in range(-9, 10) if d and 10 <= total + d <= 99])
        numbers.append(d)
        deed = f"{rng.choice(MORE)} {d} more" if d > 0 else f"{rng.choice(LESS)} {-d}"
        question.append(f"{day} {who} {deed}.")
        answer.append(f"{day} {total}{d:+d}={total + d}.")
        total += d
    question.append(f"How many {thing} are left?")
    return numbers, " ".join(question), " ".join([*answer, f"#### {total}"])

def side(numbers):
    """One problem in ten is for testing, one in ten for validation, in any wording and with the two
    factors in either order."""
    a, b, *rest = numbers
    number = zlib.crc32(repr([min(a, b), max(a, b), *rest]).encode()) % 10
    return ["test", "validation", *["train"] * 8][number]

def problems(rng, n, ops, which):
    """n problems of one side, ops[0] to ops[1] steps after the product -> [(question, answer)]"""
    found = []
    while len(found) < n:
        numbers, question, answer = problem(rng, rng.randint(*ops))
        if side(numbers) == which:
            found.append((question, answer))
    return found

def story_rows(pairs, tokenizer, P, G):
    """The SFT form, in which only answers are masked -> tokens (B, P + G): the prompt, padded on
    the left to P, the answer, filled with EOS up to G; pad (B,); frozen (B, P + G): not answer"""
    eos, rows, pad = tokenizer.special["<|eos|>"], [], []
    for question, answer in pairs:
        q, a = tokenizer.encode(prompt(question)), tokenizer.encode(answer)
        if len(q) > P or len(a) >= G:
            raise ValueError(
                f"a problem has {len(q)} + {len(a)} tokens, more than --prompt-len {P} and "
                f"--gen-length {G} (EOS included) hold: raise them, or lower --ops")
        pad.append(P - len(q))
        rows.append([eos] * pad[-1] + q + a + [eos] * (G - len(a)))
    return torch.tensor(rows), torch.tensor(pad), (torch.arange(P + G) < P).expand(len(rows), -1)

def sum_rows(rng, B, T, tokenizer):
    """Rows of bare sums (B, T): arithmetic without a story around it."""
    def one():
        a, b, x, d = (rng.randint(*bounds) for bounds in ((2, 9), (2, 9), (0, 99), (1, 9)))
        kind = rng.choice("*+-")
        x = min(x, 99 - d) if kind == "+" else max(x, d)
        return {"*": f"{a}*{b}={a * b}.", "+": f"{x}+{d}={x + d}.", "-": f"{x}-{d}={x - d}."}[kind]

    # every sum has at least 5 tokens
    rows = [tokenizer.encode(" ".join(one() for _ in range(T // 5)))[:T] for _ in range(B)]
    return torch.tensor(rows, dtype=torch.int64).view(B, T)

def mask_sums(rng, tokens):
    """Masks for bare sums: all results up to a random one, and everything after it; half of the
    results show their first digit. Only the results count. LLaDA masks every token with the same
    probability. -> masked (B, T), weight (B, T) that sums to 1 in every row"""
    masked, wanted = torch.zeros(2, *tokens.shape, dtype=torch.bool)
    for r, row in enumerate(tokens.tolist()):
        starts = [i + 1 for i, token in enumerate(row) if token == EQUAL and DOT in row[i:]]
        for i in starts[:rng.randrange(len(starts)) + 1]:
            end = row.index(DOT, i)
            wanted[r, i + (end - i > 1 and rng.random() < 0.5):end] = True
        masked[r, end:] = True
    return masked | wanted, wanted / wanted.sum(1, keepdim=True)

def mask_tail(rng, tokens, start, tokenizer):
    """Masks for answers, which begin at column start: everything from a random token on. The rest
    of its sum counts. Every other row is cut after the = of the sum, if it has one."""
    masked, wanted = torch.zeros(2, *tokens.shape, dtype=torch.bool)
    for r, row in enumerate(tokens.tolist()):
        dots = [i + 1 for i in range(start, len(row)) if row[i] == DOT]
        ends = [start, *dots, row.index(tokenizer.special["<|eos|>"], start) + 1]
        lo, hi = rng.choice([*zip(ends, ends[1:])])
        if r % 2 and EQUAL in row[lo:hi]:
            lo = row.index(EQUAL, lo) + 1
        lo = rng.randrange(lo, hi)
        masked[r, lo:] = wanted[r, lo:hi] = True
    return masked, wanted / wanted.sum(1, keepdim=True)

class Problems:
    """batch(step) draws everything from (seed, step): a resumed run needs to know the step only."""
    def __init__(self, args, tokenizer=None):
        self.args, self.checksum = args, None  # a text has a checksum
        # these three do not depend on --seed, so that runs can be compared
        corpus = problems(random.Random("corpus"), 3000, args.ops, "train")
        validation = problems(random.Random("validation"), 256, args.ops, "validation")
        test = problems(random.Random("test"), 1000, args.ops, "test")
        self.tokenizer = tokenizer or build_tokenizer(
            "".join(prompt(q) + a for q, a in corpus), args.vocab)
        self.val = story_rows(validation, self.tokenizer, args.prompt_len, args.gen_length)
        self.extra = {"problems": test, "template": TEMPLATE, "known_order": "left_to_right",
                      "gen_length": args.gen_length, "block_length": args.block_length}

    def batch(self, step):
        """-> tokens (B, T), masked (B, T), weight (B, T), pad (B,)"""
        args, rng, parts = self.args, random.Random(f"{self.args.seed} {step}"), []
        g = torch.Generator().manual_seed(rng.getrandbits(32))
        # bare sums alone at first; then LLaDA's stories, some sums, and some stories that are cut
        n, P, G = args.batch_size, args.prompt_len, args.gen_length
        if step >= args.sums * args.steps:
            pairs, n = problems(rng, n - n // 8, args.ops, "train"), n // 8
            tokens, pad, frozen = story_rows(pairs, self.tokenizer, P, G)
            spare, n_cut = int(pad.min()), 0 if args.causal else len(tokens) * 3 // 8
            # without the columns that are padding in every row
            pad, P, cut, whole = pad - spare, P - spare, *tokens[:, spare:].tensor_split([n_cut])
            free = frozen[n_cut:, spare:]
            noise = every_token(free) if args.causal else diffusion_noise(free, generator=g)
            parts = [(cut, *mask_tail(rng, cut, P, self.tokenizer), pad[:n_cut]),
                     (whole, *noise, pad[n_cut:])]
        sums = sum_rows(rng, n, P + G, self.tokenizer)
        noise = every_token(sums < 0) if args.causal else mask_sums(rng, sums)
        parts += [(sums, *noise, torch.zeros(n, dtype=torch.int64))]
        return [torch.cat(column) for column in zip(*parts)]
