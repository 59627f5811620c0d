"""Train a toy masked diffusion model, on two CPU cores or on a GPU.

python train_tiny.py                      word problems, preset quick, nine minutes -> toy.pt
python train_tiny.py --preset bundled     the model that the repository ships
python train_tiny.py --data my.txt        any UTF-8 text instead
python train_tiny.py --resume             resume from toy.pt.train: after Ctrl-C, kill -9, power cut
python train_tiny.py --causal --like toy.pt --out guider.pt    an autoregressive guider for toy.pt
torchrun --standalone --nproc_per_node=2 train_tiny.py    two processes, each with half of a batch

Then python sample.py --ckpt toy.pt answers with it. The loss is LLaDA's (model.py); the recipe
departs from LLaDA's in three ways: bare sums come first, some problems are masked from a random
point on (support/problems.py), and Muon trains the matrices (build, below).
"""
import argparse
import contextlib
import math
import os
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from model import Config, DiffusionLM, causal_loss, diffusion_loss, diffusion_noise, every_token
from model import load, save
from support.arithmetic import matmul_peak, work
from support.cli import Parser, check_bounds, check_out, launch, pick_device
from support.evaluate import answer_problems
from support.fast_cpu import autocast_pays
from support.problems import DAYS, Problems
from support.processes import ranks, store
from support.resume import check_finite, failures_in_a_sentence, interrupts
from support.resume import load_state, remove_temps, restore, save_state
from support.text import Text

# --------------------------------------------------------------------------------------------------
# flags

# quick has 1.4 million parameters. bundled has 2.7 million: it made checkpoints/tiny.pt
PRESETS = {
    "quick": dict(n_layer=4, n_head=4, n_embd=160, prompt_len=40, gen_length=32, block_length=32,
                  ops=[1, 2], steps=2000, batch_size=64),
    "bundled": dict(n_layer=3, n_head=4, n_embd=256, prompt_len=64, gen_length=64, block_length=32,
                    ops=[3, 5], steps=4000, batch_size=64, sums=0.08),
}
DEFAULTS = dict(out="toy.pt", preset="quick", eval=100, vocab=512, lr=0.01, lr_adam=0.003, sums=0.1,
                val_every=250, save_minutes=5.0, accumulate=1, seed=1, device="auto", amp="auto",
                data=None, threads=None, causal=False, like=None)
# 258 tokens: the 256 bytes, the end of the text and the mask
MINIMUM = dict(n_layer=1, n_head=1, n_embd=2, prompt_len=1, gen_length=2, block_length=1, vocab=258,
               steps=1, batch_size=1, val_every=1, accumulate=1, save_minutes=0, eval=0, seed=0,
               lr=0, lr_adam=0, sums=0)
BOUNDS = {name: (low, 2**31 - 1) for name, low in MINIMUM.items()} | {"threads": (1, 1024)}
# what a resumed run may change; data: only for the same text at another place
FREE = {"out", "data", "eval", "device", "threads", "amp", "accumulate", "save_minutes"}

def read_flags(argv):
    """-> {name: value} of the flags that a command line gives."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, help="sizes and steps, unless given (quick)")
    p.add_argument("--data", metavar="FILE", help="train on this UTF-8 text, not on word problems")
    p.add_argument("--causal", action="store_true", default=None,
                   help="an autoregressive model, which predicts the next token")
    p.add_argument("--like", metavar="FILE", help="tokenizer, problems and lengths of this model")
    p.add_argument("--out", metavar="FILE", help="the model; FILE.train is for --resume (toy.pt)")
    p.add_argument("--resume", action="store_true", default=None, help="resume from FILE.train")
    p.add_argument("--eval", type=int, metavar="N", help="problems to answer at the end (100)")
    g = p.add_argument_group("sizes (the preset's)")
    for flag in ("--n-layer", "--n-head", "--n-embd"):
        g.add_argument(flag, type=int)
    g.add_argument("--prompt-len", type=int, metavar="TOKENS", help="room for the question")
    g.add_argument("--gen-length", type=int, metavar="TOKENS", help="room for the answer")
    g.add_argument("--block-length", type=int, metavar="TOKENS", help="for sample.py, not training")
    g.add_argument("--ops", type=int, nargs=2, metavar=("MIN", "MAX"), help="steps in a problem")
    g.add_argument("--vocab", type=int, metavar="TOKENS", help="258 or more (512)")
    g = p.add_argument_group("optimization")
    g.add_argument("--steps", type=int, help="(the preset's)")
    g.add_argument("--batch-size", type=int, metavar="ROWS", help="(the preset's)")
    g.add_argument("--accumulate", type=int, metavar="PARTS", help="split a batch, for memory (1)")
    g.add_argument("--lr", type=float, help="Muon's, for the matrices (0.01)")
    g.add_argument("--lr-adam", type=float, help="AdamW's, for embedding, head, norms (0.003)")
    g.add_argument("--sums", type=float, metavar="SHARE", help="first steps: sums only (0.1)")
    g.add_argument("--val-every", type=int, metavar="STEPS", help="validate and save (250)")
    g.add_argument("--save-minutes", type=float, metavar="MINUTES", help="save FILE.train (5)")
    g.add_argument("--seed", type=int, help="(1)")
    g.add_argument("--device", metavar="auto|cpu|cuda|cuda:N|mps", help="(auto)")
    g.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    g.add_argument("--amp", choices=["auto", "on", "off"],
                   help="bfloat16 autocast; auto: on CUDA, and on CPUs that multiply in it")
    # no flag has a default up there, so that this finds those that were given
    return {name: value for name, value in vars(p.parse_args(argv)).items() if value is not None}

def parse_args(argv=None):
    """-> flags, what FILE.train holds or {}"""
    given, kept, state = read_flags(argv), {}, {}  # kept: those that a resumed run began with
    if given.pop("resume", False):
        path = given.get("out", DEFAULTS["out"]) + ".train"
        state = load_state(path)
        try:
            kept = read_flags(state["args"])
        except ValueError as e:
            raise ValueError(f"{path} is from another version of train_tiny.py ({e}): "
                             "start again without --resume") from None
        free = FREE if "data" in kept else FREE - {"data"}  # problems are not read from a file
        if fixed := sorted(set(given) - free):
            raise ValueError("--resume takes the flags that the run was started with: "
                             f"leave out --{fixed[0].replace('_', '-')}")
    # each of these has the last word over those before it
    preset = PRESETS[(kept | given).get("preset", DEFAULTS["preset"])]
    args = argparse.Namespace(**DEFAULTS | preset | kept | given)
    if args.like is not None:
        if fixed := {"prompt_len", "gen_length", "block_length", "ops", "vocab"} & set(given):
            raise ValueError(f"--like has the last word on lengths, problems and tokens: leave out "
                             f"--{min(fixed).replace('_', '-')}")
        vars(args).update(like(args))
    check_bounds(args, **BOUNDS)
    if not 1 <= args.ops[0] <= args.ops[1] <= len(DAYS):
        raise ValueError(f"--ops is {args.ops[0]} {args.ops[1]}, and has to be MIN MAX with "
                         f"1 <= MIN <= MAX <= {len(DAYS)}")
    if args.gen_length % args.block_length:
        raise ValueError(f"--gen-length {args.gen_length} is not a multiple of "
                         f"--block-length {args.block_length}")
    return args, state

def like(args):
    """-> the lengths, and the steps of a problem, of the model --like."""
    model, tokenizer = load(args.like, "meta")
    G, questions = model.extra.get("gen_length"), [q for q, _ in model.extra.get("problems", [])]
    if not G or tokenizer is None or not {"<|eos|>", "<|mask|>"} <= tokenizer.special.keys():
        raise ValueError(f"--like {args.like} is not a model of train_tiny.py")
    days = [sum(question.count(day) for day in DAYS) for question in questions] or args.ops
    if not questions and args.data is None:
        raise ValueError(f"--like {args.like} was trained on a text: give it with --data")
    return dict(gen_length=G, prompt_len=model.config.max_len // 2 - G, ops=[min(days), max(days)],
                block_length=model.extra.get("block_length", G))

# --------------------------------------------------------------------------------------------------
# model and optimizers

def build(args, data, device):
    """-> the model and its optimizers: Muon for the matrices of the blocks, AdamW for embedding,
    head and norms (LLaDA: AdamW for all)."""
    special = data.tokenizer.special
    vocab = max(special.values()) + 1  # fewer than args.vocab if the text is short
    # the MLP is 8/3 as wide as the model, rounded up to 32: SwiGLU has three matrices, not two
    n_ff = -(-args.n_embd * 8 // 96) * 32
    max_len = 2 * (args.prompt_len + args.gen_length)  # so that longer answers can be tried
    config = Config(n_layer=args.n_layer, n_head=args.n_head, n_kv_head=args.n_head,
                    n_embd=args.n_embd, n_ff=n_ff, max_len=max_len, vocab_size=vocab,
                    n_vocab=vocab, mask_id=special["<|mask|>"], eos_id=special["<|eos|>"],
                    causal=args.causal, shift=args.causal)
    if fault := config.fault():
        raise ValueError(fault)
    torch.manual_seed(args.seed)  # for the weights: batches have generators of their own
    model = DiffusionLM(config).to(device)
    # Muon is for matrices only, and not for the embedding and the head, whose rows are tokens
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return model, [torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.0),
                   torch.optim.AdamW(others, lr=args.lr_adam, betas=(0.9, 0.98), weight_decay=0.0)]

def save_model(path, model, data):
    # the weights stay in float32 while they are trained: the file gets a copy in bfloat16
    half = DiffusionLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.extra = data.extra  # lengths, template, problems: what sample.py needs
    save(path, half, data.tokenizer)

# --------------------------------------------------------------------------------------------------
# training

@torch.no_grad()
def validate(model, val, device, amp):
    """Nats per token on held-out rows. The masks are the same at every call, and in every run."""
    tokens, pad, frozen = val                                          # (B, T), (B,), (B, T)
    masked, weight = every_token(frozen) if model.config.causal else diffusion_noise(
        frozen, generator=torch.Generator().manual_seed(0))
    loss, loss_of = 0.0, causal_loss if model.config.causal else diffusion_loss
    for rows in torch.arange(len(tokens)).split(64):  # weighted by their number
        part = (t[rows].to(device) for t in (tokens, masked, weight, pad))
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            loss += loss_of(model, *part).item() * len(rows) / len(tokens)
    return loss

def set_rates(optimizers, args, step):
    """Warms up, holds, and falls from the middle on down to 0."""
    scale = min(1, (step + 1) / 100, 2 * (args.steps - step) / args.steps)
    for optimizer, rate in zip(optimizers, (args.lr, args.lr_adam)):
        for group in optimizer.param_groups:
            group["lr"] = rate * scale

def backward(net, batch, args, device, amp):
    """Runs this process's rows of a batch, in parts, and adds up the gradients
    -> what these rows contribute to the loss of the batch, () float32"""
    (rank, world), n, total = ranks(), args.accumulate, 0.0
    loss_of = causal_loss if args.causal else diffusion_loss
    # every process draws the whole batch, and takes its own rows
    parts = torch.arange(args.batch_size).tensor_split(world * n)[rank * n:][:n]
    for rows in parts:
        # processes exchange gradients once, after the last part
        waits = world > 1 and rows is not parts[-1]
        with net.no_sync() if waits else contextlib.nullcontext():
            part = [t if t is None else t[rows].to(device) for t in batch]  # None: no padding
            with torch.autocast(device, torch.bfloat16, enabled=amp):
                loss = loss_of(net, *part) * (len(rows) / args.batch_size)
            # DDP takes the mean over the processes: this makes it the sum
            (loss * world).backward()
        total = total + loss.detach()  # on the device: reading it would wait
    return total

def train(args, data, model, optimizers, state, device, amp):
    """Each of several processes runs its rows of every batch; the first one validates, saves the
    best model and prints. -> the steps taken, fewer after an interrupt; the best loss"""
    first, best, smooth = state.get("step", 0), state.get("best", math.inf), None
    (rank, world), parent, net, saved = ranks(), os.getppid(), model, time.time()
    if world > 1:  # the same model, whose backward averages the gradients of all processes
        net = torch.nn.parallel.DistributedDataParallel(model)
        net.config = model.config
    # the ceiling that the progress bar compares with
    peak = matmul_peak(device, torch.bfloat16 if amp else torch.float32,
                       4096 if device == "cuda" else 1024)

    with interrupts() as stopped:
        bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step",
                   mininterval=0.5 if sys.stderr.isatty() else 30, disable=rank > 0)
        for step in bar:
            began, batch = time.time(), data.batch(step)  # of the step's own random numbers
            set_rates(optimizers, args, step)
            loss = backward(net, batch, args, device, amp)  # the model itself changes below
            orphan = world > 1 and os.getppid() != parent  # torchrun has ended
            # the parts of the loss are added up; if one process has to stop, all do, at this step
            both = torch.stack([loss, torch.tensor(float(bool(stopped) or orphan), device=device)])
            if world > 1:
                dist.all_reduce(both)
            loss, stop = both.tolist()
            check_finite("loss", loss, step, args.out, best)
            # a finite loss shows that the weights are sound: now they may be saved
            if rank == 0 and (stop or time.time() - saved >= 60 * args.save_minutes):
                if stop and best == math.inf:  # not yet validated: this model is better than none
                    save_model(args.out, model, data)
                save_state(args, data.checksum, step, best, model, optimizers)
                saved = time.time()
            if stop:
                return step, best  # these gradients are dropped: the resumed run has them again
            # DDP has made the gradients the same everywhere, and so the steps are
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            check_finite("gradient", norm.item(), step, args.out, best)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            # a mean of about 50 losses; 6 operations: see work()
            (B, T), seconds = batch[0].shape, time.time() - began
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            share = 6 * work(model.config, B, T, T, T) / seconds / world / peak
            bar.set_postfix_str(f"loss {smooth:.3f}, {B * T / seconds:,.0f} tokens/s, "
                                f"{share:.0%} of the matmul peak", refresh=False)
            # the model is saved only when it is the best so far, the state every time
            if rank == 0 and ((step + 1) % args.val_every == 0 or step + 1 == args.steps):
                val = validate(model, data.val, device, amp)
                check_finite("validation loss", val, step + 1, args.out, best)
                bar.write(f"step {step + 1}: validation {val:.4f} nats per token")
                if val < best:  # a later model may be worse
                    best = val
                    save_model(args.out, model, data)
                save_state(args, data.checksum, step + 1, best, model, optimizers)
                saved = time.time()
    return args.steps, best

def answer(path, n, device):
    """Answers n held-out problems with the saved model and prints how many are right."""
    model, tokenizer = load(path, device, torch.float32)
    known, n = model.extra["known_order"], min(n, len(model.extra["problems"]))
    # each cache after the run without one in the same order
    runs = [("none", "low_confidence"), ("decode", "low_confidence"), ("none", known),
            ("greedy", known)]
    if model.config.causal:
        runs = [("none", None), ("autoregressive", None)]
    width = max(len(cache) for cache, _ in runs)
    for cache, order in runs:
        found = answer_problems(model, tokenizer, n=n, cache=cache, remasking=order)
        right, fewer = sum(found.right), found.positions_full / found.positions_run
        print(f"{cache:{width}}  {order or '':14}  {right} of {n} exact ({100 * right / n:.1f}%), "
              f"{fewer:.2f}x fewer positions run")

# --------------------------------------------------------------------------------------------------
# the run

def main(argv=None):
    args, state = parse_args(argv)
    device, (rank, world) = pick_device(args.device), ranks()
    # what is wrong is said before the work
    if rank == 0:
        check_out(args.out, only="checkpoint")
        remove_temps(args.out)
    if args.batch_size < world * args.accumulate:
        raise ValueError(f"--batch-size {args.batch_size} is too small for {world} processes with "
                         f"--accumulate {args.accumulate}: every part needs a row")
    if args.threads:  # else torch's choice
        torch.set_num_threads(args.threads)
    amp = args.amp == "on" or args.amp == "auto" and autocast_pays(device)
    # data, model, optimizers; a resumed run continues with the weights and moments of FILE.train
    tokenizer = load(args.like, "meta")[1] if args.like else None
    data = Problems(args, tokenizer) if args.data is None else Text(
        args, state.get("text"), tokenizer)
    model, optimizers = build(args, data, device)
    if state:
        restore(state, model, optimizers, args.out + ".train")
    if rank == 0:
        several = f"{world} processes with " if world > 1 else ""
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.steps} steps of "
              f"{args.batch_size} rows of {args.prompt_len + args.gen_length} tokens, {device}, "
              f"{several}{torch.get_num_threads()} threads, "
              f"{'bfloat16 autocast' if amp else 'float32'}", flush=True)
    resume = f"python train_tiny.py --resume --out {args.out}"
    with failures_in_a_sentence(args.out, resume):
        if world > 1:
            backend = "nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, store=store(), rank=rank, world_size=world)
        steps, best = train(args, data, model, optimizers, state, device, amp)
        if world > 1:
            dist.destroy_process_group()
    if steps < args.steps:
        if rank == 0:
            print(f"stopped after {steps} steps; to resume: {resume}")
        return 130  # as after Ctrl-C everywhere
    if rank == 0:
        # per byte, models with other tokenizers can be compared
        a_byte = f", {best / data.bytes_per_token:.4f} nats per byte" if args.data else ""
        print(f"best validation {best:.4f} nats per token{a_byte}: {args.out}")
        if args.eval and not args.data:
            answer(args.out, args.eval, device)
    return 0

if __name__ == "__main__":
    launch(main)
