"""Train a toy masked diffusion model, on two CPU cores or on a GPU.

python train_tiny.py                       word problems, preset quick -> toy.pt; then python sample.py --ckpt toy.pt
python train_tiny.py --preset bundled      the model that the repository ships; --preset long: the other one, of longer answers
python train_tiny.py --data my.txt         any UTF-8 text instead
python train_tiny.py --resume              go on where toy.pt.train stopped (Ctrl-C, kill -9, power cut)
torchrun --standalone --nproc_per_node=2 train_tiny.py    two processes, each with half of every batch

The word problems are made here, so that answers can be checked and nothing has to be downloaded. A question gives a few
numbers, the worked answer computes with them one after the other; each result needs the one before it. Whatever decodes
the answer has to respect that order, and that is what makes the toy a test of caches and of decoding orders.
"""
import argparse
import contextlib
import glob
import math
import os
import random
import signal
import sys
import time
import zlib
from collections import Counter, defaultdict

import regex  # tiktoken brings it along; the standard re knows neither \p{L} nor possessive quantifiers
import torch
import torch.distributed as dist
from tqdm import tqdm

from dkv_min import generate
from model import Config, DiffusionLM, Tokenizer, diffusion_loss, diffusion_noise, load, load_file, save, save_file
from sample import Parser, cut, is_right, launch, pick_device
from scripts.several import ranks, store

# ---------------------------------------------------------------------------------------------------------------------
# the word problems

SHE = "Anna Clara Emma Grace Ida Kate Maria Olga Rosa Tina Alma Dora Fiona Hanna Julia Laura Nina Petra Vera Zoe".split()
HE = "Ben David Felix Henry Jack Leo Noah Paul Sam Victor Bruno Cecil Erik George Ivan Karl Martin Oscar Peter Walter".split()
THINGS = "apples pens coins cards shells stamps books cups nuts stones candles buttons pears ribbons marbles plums".split()
HOLDERS = "boxes bags baskets trays jars drawers crates bowls".split()
MORE = "finds buys wins makes collects borrows".split()
LESS = "loses sells breaks lends eats wastes".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TEMPLATE = "{}\n"  # how a question stands in a prompt


def problem(rng, ops, wordy):
    """One problem with ops additions or subtractions after the product -> (numbers, question, answer). A wordy answer says
    again what is added or taken away before it computes.

    numbers identify it whatever the wording: (7, 8, -9, 5) is 7*8, minus 9, plus 5; every result has two digits."""
    a, b = rng.choice([(a, b) for a in range(2, 10) for b in range(2, 10) if a * b >= 10])
    who, names = rng.choice([("she", SHE), ("he", HE)])
    name, thing, holder = rng.choice(names), rng.choice(THINGS), rng.choice(HOLDERS)
    numbers, total = [a, b], a * b
    question, answer = [f"{name} has {a} {holder} of {b} {thing}."], [f"{a}*{b}={total}."]
    for day in DAYS[:ops]:
        d = rng.choice([d for d in range(-9, 10) if d and 10 <= total + d <= 99])
        numbers.append(d)
        question.append(f"{day} {who} {rng.choice(MORE)} {d} more." if d > 0 else f"{day} {who} {rng.choice(LESS)} {-d}.")
        again = f" {who} {'gets' if d > 0 else 'loses'} {abs(d)}:" if wordy else ""
        answer.append(f"{day}{again} {total}{d:+d}={total + d}.")
        total += d
    return tuple(numbers), " ".join(question) + f" How many {thing} are left?", " ".join(answer) + f" #### {total}"


def side(numbers):
    """Which problems are trained on is decided by their numbers: one in ten is for testing, one in ten for validation, in
    whatever wording, and with the two factors in either order."""
    a, b, *rest = numbers
    return ("test", "validation", *["train"] * 8)[zlib.crc32(repr([min(a, b), max(a, b), *rest]).encode()) % 10]


def problems(rng, n, ops, which, wordy=False):
    """n problems of one side, with ops[0] to ops[1] additions and subtractions -> [(question, answer)]."""
    found = []
    while len(found) < n:
        numbers, question, answer = problem(rng, rng.randint(*ops), wordy)
        if side(numbers) == which:
            found.append((question, answer))
    return found


def story_rows(pairs, tokenizer, prompt_len, gen_length):
    """Tokens (B, T) int64 with the question left-padded to prompt_len and the answer filled with EOS up to gen_length;
    pad (B,); frozen (B, T) bool, True on padding and question: this is the SFT form, only answers are masked."""
    eos, rows, pad = tokenizer.special["<|eos|>"], [], []
    for question, answer in pairs:
        q, a = tokenizer.encode(TEMPLATE.replace("{}", question)), tokenizer.encode(answer)
        if len(q) > prompt_len or len(a) >= gen_length:
            raise ValueError(f"a problem has {len(q)} + {len(a)} tokens, more than --prompt-len {prompt_len} and --gen-length {gen_length} (EOS included) hold: "
                             "raise them, or lower --ops")
        pad.append(prompt_len - len(q))
        rows.append([eos] * pad[-1] + q + a + [eos] * (gen_length - len(a)))
    tokens = torch.tensor(rows)
    return tokens, torch.tensor(pad), (torch.arange(tokens.shape[1]) < prompt_len).expand_as(tokens)


def sum_rows(rng, B, T, tokenizer):
    """Rows of bare sums (B, T): arithmetic without a story around it."""
    rows = []
    for _ in range(B):
        sums = []
        for _ in range(T // 5):  # no sum has fewer than 5 tokens
            a, b, x, d = rng.randint(2, 9), rng.randint(2, 9), rng.randint(0, 99), rng.randint(1, 9)
            kind = rng.choice("*+-")
            x = min(x, 99 - d) if kind == "+" else max(x, d)
            sums.append({"*": f"{a}*{b}={a * b}.", "+": f"{x}+{d}={x + d}.", "-": f"{x}-{d}={x - d}."}[kind])
        rows.append(tokenizer.encode(" ".join(sums))[:T])
    return torch.tensor(rows, dtype=torch.int64).view(B, T)


def mask_sums(rng, tokens, tokenizer):
    """Masks for bare sums: all results up to a random one, and all behind it; half of the results show their first digit.
    What counts are the results. Departs from LLaDA, which masks every token with one probability.
    -> masked (B, T), weight (B, T) that sums to 1 in every row"""
    equal, dot = tokenizer.encode("=")[0], tokenizer.encode(".")[0]
    masked, wanted = torch.zeros(2, *tokens.shape, dtype=torch.bool)
    for r, row in enumerate(tokens.tolist()):
        starts = [i + 1 for i, token in enumerate(row) if token == equal and dot in row[i:]]
        for i in starts[:rng.randrange(len(starts)) + 1]:
            end = row.index(dot, i)
            wanted[r, i + (end - i > 1 and rng.random() < 0.5):end] = True
        masked[r, end:] = True
    return masked | wanted, wanted / wanted.sum(1, keepdim=True)


def mask_tail(rng, tokens, start, tokenizer):
    """Masks for answers, which begin at column start: all from a random token on, as it is while an answer is decoded. What
    counts is the rest of the sum that the token belongs to; every other row is cut behind its =, if it has one. Departs from LLaDA as well. -> as mask_sums"""
    equal, dot, eos = tokenizer.encode("=")[0], tokenizer.encode(".")[0], tokenizer.special["<|eos|>"]
    masked, wanted = torch.zeros(2, *tokens.shape, dtype=torch.bool)
    for r, row in enumerate(tokens.tolist()):
        ends = [start] + [i + 1 for i in range(start, len(row)) if row[i] == dot] + [row.index(eos, start) + 1]
        lo, hi = rng.choice([*zip(ends, ends[1:])])
        if r % 2 and equal in row[lo:hi]:
            lo = row.index(equal, lo) + 1
        lo = rng.randrange(lo, hi)
        masked[r, lo:] = wanted[r, lo:hi] = True
    return masked, wanted / wanted.sum(1, keepdim=True)

# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer: byte-level BPE, cut into pieces as LLaDA's, digits one by one

PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


def train_bpe(text, n):
    """-> {bytes: id}: the 256 bytes, then the most frequent pair of neighbours again and again, until there are n ids.
    Counts over distinct words, and updates the counts of a merge's own words only."""
    freq = Counter(regex.findall(PATTERN, text))
    words = [([bytes([b]) for b in w.encode()], f) for w, f in freq.items()]
    count, where = Counter(), defaultdict(set)

    def tally(i, sign):
        parts, f = words[i]
        for pair in zip(parts, parts[1:]):
            count[pair] += sign * f
            where[pair].add(i)

    for i in range(len(words)):
        tally(i, 1)
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < n and count:
        pair = max(count, key=lambda p: (count[p], p))
        if count[pair] < 2:
            break
        ranks.setdefault(pair[0] + pair[1], len(ranks))
        for i in where.pop(pair):
            tally(i, -1)
            parts, j = words[i][0], 0
            while j < len(parts) - 1:
                if (parts[j], parts[j + 1]) == pair:
                    parts[j:j + 2] = [pair[0] + pair[1]]
                j += 1
            tally(i, 1)
        del count[pair]
    return ranks


def build_tokenizer(text, vocab):
    ranks = train_bpe(text, vocab - 2)
    return Tokenizer(ranks, PATTERN, {"<|eos|>": len(ranks), "<|mask|>": len(ranks) + 1})

# ---------------------------------------------------------------------------------------------------------------------
# what is trained on. batch(step) draws everything from (seed, step): the step number is all that a resumed run needs

class Problems:
    def __init__(self, args):
        self.args = args
        # these three do not depend on --seed, so that runs can be compared
        corpus = problems(random.Random("corpus"), 3000, args.ops, "train", args.wordy)
        self.tokenizer = build_tokenizer("".join(TEMPLATE.replace("{}", q) + a for q, a in corpus), args.vocab)
        val = problems(random.Random("validation"), 256, args.ops, "validation", args.wordy)
        self.val = story_rows(val, self.tokenizer, args.prompt_len, args.gen_length)
        self.extra = {"problems": problems(random.Random("test"), 1000, args.ops, "test", args.wordy), "gen_length": args.gen_length, "block_length": args.block_length,
                      "known_order": "left_to_right", "template": TEMPLATE}

    def batch(self, step):
        args, rng = self.args, random.Random(f"{self.args.seed} {step}")
        g = torch.Generator().manual_seed(rng.getrandbits(32))
        # bare sums alone at first; then LLaDA's stories, with some sums among them, and some stories that are cut
        n_sums, T, parts = args.batch_size, args.prompt_len + args.gen_length, []
        if step >= args.sums * args.steps:
            n_sums = args.batch_size // 8
            pairs = problems(rng, args.batch_size - n_sums, args.ops, "train", args.wordy)
            longest = max(len(self.tokenizer.encode(TEMPLATE.replace("{}", q))) for q, _ in pairs)  # saves padding
            tokens, pad, frozen = story_rows(pairs, self.tokenizer, min(longest, args.prompt_len), args.gen_length)
            T, cut = tokens.shape[1], len(tokens) * 3 // 8
            parts = [(tokens[:cut], *mask_tail(rng, tokens[:cut], longest, self.tokenizer), pad[:cut]),
                     (tokens[cut:], *diffusion_noise(frozen[cut:], generator=g), pad[cut:])]
        sums = sum_rows(rng, n_sums, T, self.tokenizer)
        parts += [(sums, *mask_sums(rng, sums, self.tokenizer), torch.zeros(n_sums, dtype=torch.int64))]
        return [torch.cat(column) for column in zip(*parts)]  # tokens, masked, weight, pad


class Text:
    def __init__(self, args):
        self.args = args
        try:
            with open(args.data, encoding="utf-8") as f:
                text = f.read()
        except UnicodeDecodeError:
            raise ValueError(f"{args.data} is not UTF-8 text") from None
        except OSError as e:
            raise ValueError(f"cannot read {args.data}: {e.strerror}") from None
        cut = len(text) * 9 // 10  # the last tenth is for validation
        self.tokenizer = build_tokenizer(text[:cut], args.vocab)
        self.train, tail = (torch.tensor(self.tokenizer.encode(t), dtype=torch.int64) for t in (text[:cut], text[cut:]))
        T = args.prompt_len + args.gen_length
        if min(len(tail), len(self.train)) < T:
            raise ValueError(f"{args.data} is too short: its last tenth has {len(tail)} tokens, the rest {len(self.train)}, and a row needs {T}")
        val = tail[:len(tail) // T * T].view(-1, T)[:256]
        self.val = val, torch.zeros(len(val), dtype=torch.int64), torch.zeros_like(val, dtype=torch.bool)
        self.bytes_per_token = len(text[cut:].encode()) / len(tail)
        self.extra = {"prompts": [self.tokenizer.decode(r[:args.prompt_len]) for r in val[:: max(1, len(val) // 3)][:3].tolist()],
                      "gen_length": args.gen_length, "block_length": args.block_length}

    def batch(self, step):
        g = torch.Generator().manual_seed(random.Random(f"{self.args.seed} {step}").getrandbits(32))
        T = self.args.prompt_len + self.args.gen_length
        start = torch.randint(len(self.train) - T + 1, (self.args.batch_size, 1), generator=g)
        tokens = self.train[start + torch.arange(T)]
        return tokens, *diffusion_noise(torch.zeros_like(tokens, dtype=torch.bool), generator=g), None


@torch.no_grad()
def validate(model, val, device, amp):
    """Nats per token on held-out rows under the same masks at every call, so that runs can be compared."""
    tokens, pad, frozen = val
    masked, weight = diffusion_noise(frozen, generator=torch.Generator().manual_seed(0))
    loss = 0.0
    for rows in torch.arange(len(tokens)).split(64):
        part = (t[rows].to(device) for t in (tokens, masked, weight, pad))
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            loss += diffusion_loss(model, *part).item() * len(rows) / len(tokens)
    return loss


def exact_answers(path, n, device):
    """Answers n held-out problems with the saved model, as sample.py does, and prints how many are right."""
    model, tokenizer = load(path, device, torch.float32)
    extra, pairs = model.extra, model.extra["problems"][:n]
    prompts = [tokenizer.encode(extra["template"].replace("{}", q)) for q, _ in pairs]
    known = extra["known_order"]
    for cache, remasking in (("none", "low_confidence"), ("decode", "low_confidence"), ("none", known), ("greedy", known)):
        right, run, full = 0, 0, 0
        for i in tqdm(range(0, n, 50), f"{cache}, {remasking}", unit="batch", leave=False, disable=None):
            r = generate(model, prompts[i:i + 50], cache=cache, remasking=remasking, gen_length=extra["gen_length"], block_length=extra["block_length"])
            texts = [tokenizer.decode(cut(t[-extra["gen_length"]:], model.config)) for t in r.tokens]
            right += sum(is_right(text, answer) for text, (_, answer) in zip(texts, pairs[i:]))
            run, full = run + sum(r.positions_run), full + sum(r.positions_full)
        print(f"{cache:6}  {remasking:14}  {right} of {n} exact ({100 * right / n:.1f}%), {full / run:.2f}x fewer positions run")

# ---------------------------------------------------------------------------------------------------------------------
# flags

PRESETS = {
    "quick": dict(n_layer=4, n_head=4, n_embd=160, prompt_len=40, gen_length=32, block_length=32, ops=[1, 2], steps=2000, batch_size=64),
    "bundled": dict(n_layer=3, n_head=4, n_embd=256, prompt_len=64, gen_length=64, block_length=32, ops=[3, 5], steps=4000, batch_size=64, sums=0.08),
    "long": dict(n_layer=4, n_head=4, n_embd=256, prompt_len=64, gen_length=128, block_length=32, ops=[3, 6], wordy=True, steps=3000, batch_size=64, sums=0.08),
}
DEFAULTS = dict(out="toy.pt", preset="quick", eval=100, vocab=512, wordy=False, lr=0.01, lr_adam=0.003, sums=0.1, val_every=250, save_minutes=5.0, accumulate=1, seed=1, device="auto", amp="auto")
MINIMUM = dict(n_layer=1, n_head=1, n_embd=2, prompt_len=1, gen_length=2, block_length=1, vocab=258, steps=1, batch_size=1, val_every=1, threads=1, accumulate=1, save_minutes=0,
               eval=0, seed=0, lr=0, lr_adam=0, sums=0)
FREE_TO_CHANGE = ("out", "eval", "device", "threads", "amp", "accumulate", "save_minutes")  # by a resumed run


def parse_args(argv=None):
    """-> (flags, what FILE.train holds or None)."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, help="sizes and steps for the flags that are not given (quick)")
    p.add_argument("--data", metavar="FILE", help="train on this UTF-8 text instead of the word problems")
    p.add_argument("--out", metavar="FILE", help="the model, in bfloat16; FILE.train keeps what --resume needs (toy.pt)")
    p.add_argument("--resume", action="store_true", default=None, help="go on from FILE.train, with the flags it was started with")
    p.add_argument("--eval", type=int, metavar="N", help="held-out problems to answer at the end, 0 to 1000 (100)")
    g = p.add_argument_group("sizes (the preset's)")
    g.add_argument("--n-layer", type=int)
    g.add_argument("--n-head", type=int)
    g.add_argument("--n-embd", type=int)
    g.add_argument("--prompt-len", type=int, metavar="TOKENS", help="room for the question")
    g.add_argument("--gen-length", type=int, metavar="TOKENS", help="room for the answer")
    g.add_argument("--block-length", type=int, metavar="TOKENS", help="how sample.py decodes it; training knows no blocks")
    g.add_argument("--ops", type=int, nargs=2, metavar=("MIN", "MAX"), help="additions and subtractions in a problem")
    g.add_argument("--wordy", action="store_true", default=None, help="answers say again what is added or taken away, which makes them longer")
    g.add_argument("--vocab", type=int, metavar="TOKENS", help="258 or more (512)")
    g = p.add_argument_group("optimization")
    g.add_argument("--steps", type=int, help="(the preset's)")
    g.add_argument("--batch-size", type=int, metavar="ROWS", help="(the preset's)")
    g.add_argument("--accumulate", type=int, metavar="PARTS", help="run a batch in so many parts, one after the other, which saves memory (1)")
    g.add_argument("--lr", type=float, help="Muon's, for the matrices (0.01)")
    g.add_argument("--lr-adam", type=float, help="AdamW's, for embedding, head and norms (0.003)")
    g.add_argument("--sums", type=float, metavar="SHARE", help="share of the steps, at the start, that see bare sums only (0.1)")
    g.add_argument("--val-every", type=int, metavar="STEPS", help="validate and save (250)")
    g.add_argument("--save-minutes", type=float, metavar="MINUTES", help="save in between what --resume needs (5)")
    g.add_argument("--seed", type=int, help="(1)")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], help="(auto)")
    g.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    g.add_argument("--amp", choices=["auto", "on", "off"], help="bfloat16 autocast; auto: on CUDA, and on CPUs that multiply in it")
    args = p.parse_args(argv)
    resume, state = vars(args).pop("resume"), None
    given = {name: value for name, value in vars(args).items() if value is not None}
    if resume:
        state = load_state(given.get("out", DEFAULTS["out"]) + ".train")
        if fixed := sorted(set(given) - set(FREE_TO_CHANGE)):
            raise ValueError(f"--resume goes on with the flags that the run was started with: leave out --{fixed[0].replace('_', '-')}")
        args = argparse.Namespace(**{**DEFAULTS, **state["args"], **given})
    else:
        args = argparse.Namespace(**{**vars(args), **DEFAULTS, **PRESETS[given.get("preset", DEFAULTS["preset"])], **given})
    for name, low in MINIMUM.items():
        value, high = getattr(args, name), 1024 if name == "threads" else 2**31 - 1
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, and has to be {low} to {high}")
    if not 1 <= args.ops[0] <= args.ops[1] <= len(DAYS):
        raise ValueError(f"--ops is {args.ops[0]} {args.ops[1]}, and has to be MIN MAX with 1 <= MIN <= MAX <= {len(DAYS)}")
    if args.gen_length % args.block_length:
        raise ValueError(f"--gen-length {args.gen_length} is no multiple of --block-length {args.block_length}")
    if not os.access(os.path.dirname(os.path.abspath(args.out)), os.W_OK):
        raise ValueError(f"--out {args.out}: there is no such folder, or it cannot be written to")
    return args, state

# ---------------------------------------------------------------------------------------------------------------------
# training

def build(args, data, device):
    """-> the model, and its optimizers: Muon for the matrices of the blocks (LLaDA: AdamW for all), AdamW for embedding, head
    and norms."""
    special, T = data.tokenizer.special, args.prompt_len + args.gen_length
    vocab = max(special.values()) + 1
    config = Config(n_layer=args.n_layer, n_head=args.n_head, n_kv_head=args.n_head, n_embd=args.n_embd, n_ff=-(-args.n_embd * 8 // 96) * 32,
                    vocab_size=vocab, n_vocab=vocab, max_len=2 * T, mask_id=special["<|mask|>"], eos_id=special["<|eos|>"])
    if fault := config.fault():
        raise ValueError(fault)
    torch.manual_seed(args.seed)
    model = DiffusionLM(config).to(device)
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or not name.startswith("blocks")]
    return model, [torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.0),
                   torch.optim.AdamW(others, lr=args.lr_adam, betas=(0.9, 0.98), weight_decay=0.0)]


def matmul_peak(device, dtype, n):
    """Multiplications and additions a second in a product of n x n matrices: what a step is measured by."""
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)


def flops(config, T):
    """Multiplications and additions for a token in a row of T, there and back: 6 for each weight but the embedding's, and
    the attention's. The loss saves some of the last layer's."""
    c = config
    weights = c.n_layer * (2 * c.n_embd * (c.n_embd + c.n_kv_head * c.head_dim) + 3 * c.n_embd * c.n_ff) + c.n_embd * c.vocab_size
    return 6 * weights + 12 * c.n_layer * c.n_embd * T


def load_state(path):
    """What FILE.train keeps: flags, weights, optimizers, the number of steps taken. Random numbers need no state: those of
    a step are drawn from (seed, step)."""
    state = load_file(path)
    kinds = dict(args=dict, step=int, best=float, weights=dict, optimizers=list)
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path} is not what train_tiny.py keeps for --resume")
    flags = {**DEFAULTS, **PRESETS["quick"], "data": "", "threads": 0}
    state["args"] = {name: state["args"].get(name, DEFAULTS.get(name, state)) for name in flags}
    for name, value in state["args"].items():
        kind = (int, float) if isinstance(flags[name], float) else type(flags[name])
        if not isinstance(value, kind) and (value is not None or name not in ("data", "threads")) or name == "ops" and [*map(type, value)] != [int, int]:
            raise ValueError(f"{path} is of another train_tiny.py: what it keeps of --{name.replace('_', '-')} cannot be used, so start again without --resume")
    return state


def save_model(path, model, data):
    half = DiffusionLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.extra = data.extra
    save(path, half, data.tokenizer)


def train(args, data, model, optimizers, state, device, amp):
    """Trains up to args.steps, saving the model whenever its validation loss is the best so far, and what --resume needs.
    Of several processes each runs its rows of every batch, and the first one validates, saves and prints.
    -> True, or False if it was interrupted."""
    best, rates, (rank, world), parent = state.get("best", float("inf")), [args.lr, args.lr_adam], ranks(), os.getppid()
    net = model
    if world > 1:  # the same model, whose backward averages the gradients of all processes
        net = torch.nn.parallel.DistributedDataParallel(model)
        net.config = model.config
    stopped = []  # Ctrl-C and SIGTERM end the run between two steps: what is saved is a state that an unbroken run passes through
    defaults = [(number, signal.signal(number, lambda *_: stopped.append(True))) for number in (signal.SIGINT, signal.SIGTERM)]
    for path in (args.out, args.out + ".train") if rank == 0 else ():
        for left in glob.glob(glob.escape(path) + ".[0-9]*.tmp"):  # of a run that was killed while it saved
            os.remove(left)

    def keep(step):
        save_file(args.out + ".train", {"args": vars(args), "step": step, "best": best, "weights": model.state_dict(),
                                        "optimizers": [o.state_dict() for o in optimizers]})

    def check(name, value, step):
        if not math.isfinite(value):
            raise ValueError(f"the {name} is {value} at step {step}: lower --lr and start again; {args.out} keeps the best model so far")

    smooth, first, saved = None, state.get("step", 0), time.time()
    peak = matmul_peak(device, torch.bfloat16 if amp else torch.float32, 4096 if device == "cuda" else 1024)
    parts = torch.arange(args.batch_size).tensor_split(world * args.accumulate)[rank * args.accumulate:][:args.accumulate]
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30, disable=rank > 0)
    for step in bar:
        began = time.time()
        scale = min(1, (step + 1) / 100, 2 * (args.steps - step) / args.steps)  # warm up, hold, from the middle on down to 0
        for optimizer, rate in zip(optimizers, rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        batch, total = data.batch(step), 0.0
        for rows in parts:
            with net.no_sync() if world > 1 and rows is not parts[-1] else contextlib.nullcontext():
                with torch.autocast(device, torch.bfloat16, enabled=amp):
                    loss = diffusion_loss(net, *(t if t is None else t[rows].to(device) for t in batch)) * (len(rows) / args.batch_size)
                (loss * world).backward()  # as the gradients are averaged, and not summed, over the processes
            total = total + loss.detach()
        orphan = world > 1 and os.getppid() != parent  # torchrun is gone
        told = torch.stack([total, torch.tensor(float(bool(stopped or orphan)), device=device)])
        if world > 1:  # the loss of all rows; and all stop at the same step
            dist.all_reduce(told)
        loss, stop = told.tolist()
        check("loss", loss, step)
        if rank == 0 and (stop or time.time() - saved >= 60 * args.save_minutes):  # here, where the loss has shown that the weights are sound
            if stop and best == float("inf"):  # nothing validated yet: a model that hardly learned is better than none
                save_model(args.out, model, data)
            keep(step)
            saved = time.time()
        if stop:
            bar.close()
            if rank == 0:
                print(f"stopped after {step} steps; to go on: python train_tiny.py --resume --out {args.out}")
            return False
        check("gradient", torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item(), step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        speed = batch[0].numel() / (time.time() - began)
        bar.set_postfix_str(f"loss {smooth:.3f}, {speed:,.0f} tokens/s, {speed / world * flops(model.config, batch[0].shape[1]) / peak:.0%} of the matmul peak", refresh=False)
        if rank == 0 and ((step + 1) % args.val_every == 0 or step + 1 == args.steps):
            val = validate(model, data.val, device, amp)
            check("validation loss", val, step + 1)
            bar.write(f"step {step + 1}: validation {val:.4f} nats per token")
            if val < best:
                best = val
                save_model(args.out, model, data)
            keep(step + 1)
            saved = time.time()
    for number, default in defaults:
        signal.signal(number, default)
    if rank == 0:
        print(f"best validation {best:.4f} nats per token" + (f", {best / data.bytes_per_token:.4f} nats per byte" if args.data else "") + f": {args.out}")
    return True


def main(argv=None):
    args, state = parse_args(argv)
    device, (rank, world) = pick_device(args.device), ranks()
    if args.batch_size < world * args.accumulate:
        raise ValueError(f"--batch-size {args.batch_size} is too small for {world} processes with --accumulate {args.accumulate}: every part needs a row")
    if args.threads:
        torch.set_num_threads(args.threads)
    cpu = torch.cpu.get_capabilities()
    amp = args.amp == "on" or args.amp == "auto" and bool(device == "cuda" or cpu.get("amx_bf16") or cpu.get("avx512_bf16"))
    data = Text(args) if args.data else Problems(args)
    model, optimizers = build(args, data, device)
    if state:
        try:
            model.load_state_dict(state["weights"])
            for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{args.out}.train does not fit together: start again without --resume") from None
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.steps} steps of {args.batch_size} rows of {args.prompt_len + args.gen_length} tokens, "
              f"{device}, {f'{world} processes with ' if world > 1 else ''}{torch.get_num_threads()} threads, {'bfloat16 autocast' if amp else 'float32'}", flush=True)
    try:
        if world > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store(), rank=rank, world_size=world)
        done = train(args, data, model, optimizers, state or {}, device, amp)
        if world > 1:
            dist.destroy_process_group()
    except torch.OutOfMemoryError:
        raise ValueError("there is not enough memory for this: raise --accumulate, or lower --batch-size or the sizes") from None
    except RuntimeError as e:
        if "gloo" not in str(e) and not isinstance(e, dist.DistError):
            raise
        raise ValueError(f"another process of this run has ended, and the run with it; {args.out}.train keeps the last save: go on with train_tiny.py --resume --out {args.out}") from None
    if not done:
        return 130
    if rank > 0:
        return 0
    if args.eval and not args.data:
        exact_answers(args.out, min(args.eval, len(data.extra["problems"])), device)
    return 0


if __name__ == "__main__":
    launch(main)
