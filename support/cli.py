"""What the command lines share: bounds of flags, messages, exit codes, devices, checkpoints, and
output files that are checked before the work."""
import argparse
import os
import re
import signal
import subprocess
import sys

import torch

from model import load
from support.checkpoint import first_line, read
from support.processes import first_to_speak, ranks
from support.settings import loop_settings

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HUB = {"llada": "GSAI-ML/LLaDA-8B-Instruct", "llada-base": "GSAI-ML/LLaDA-8B-Base",
       "llada-1.5": "GSAI-ML/LLaDA-1.5", "illada": "GSAI-ML/iLLaDA-8B-Instruct",
       "dream": "Dream-org/Dream-v0-Instruct-7B", "dream-base": "Dream-org/Dream-v0-Base-7B",
       "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
       "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct"}  # what scripts/convert.py fetches by these names

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)

def printable(text):
    """Escapes control characters, so that model output cannot drive the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text)

def check_bounds(args, **bounds):
    """Raises ValueError for a flag outside its bounds. bounds: name=low or name=(low, high)."""
    for name, bound in bounds.items():
        low, high = bound if isinstance(bound, tuple) else (bound, float("inf"))
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            needed = f"{low} to {high}" if isinstance(bound, tuple) else f"at least {low}"
            raise ValueError(f"--{name.replace('_', '-')} is {value}, and has to be {needed}")

def loop_flags(args, loops):
    """-> {setting: value} of the texts NAME=VALUE. The loop of one of the caches has to have it."""
    known = {s for cache in args.caches for s in loop_settings(loops[cache], {})}
    known = sorted(known - {"guider"})  # which --guider names
    has = f"which has {', '.join(known) or 'no settings'}"
    run = "the demo" if args.cache == "demo" else f"--cache {args.cache}"
    words, found = {"true": True, "false": False, "none": None, "never": "never"}, {}
    for given in args.set + [f"delay={args.delay}".lower()] * (args.delay is not None):
        s, _, text = given.partition("=")
        if s not in known:
            raise ValueError(f"setting {given!r:.60} has no effect with {run}, {has}: leave it out")
        kind = words.get if text in words else str if s == "accept" else (
            int if text.lstrip("-").isdecimal() else float)
        try:  # guided's window is two numbers
            found[s] = [*map(int, text.split(","))] if "," in text else kind(text)
        except ValueError:
            raise ValueError(f"setting {given!r:.60} of {run}, {has}, needs a value: a number, "
                             "true, false, none or, of refresh, never") from None
    return found

def check_out(path, flag="--out", only=None):
    """Raises ValueError for an output file that cannot be written, before the work is done.
    With only="checkpoint" it also protects an existing file that is not a checkpoint."""
    if not os.path.basename(path) or os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{flag} {str(path)!r} is empty, a folder or a device: give a file name")
    try:
        probe = f"{path}.{os.getpid()}.tmp"  # the name that atomic_write uses
        open(probe, "wb").close()
        os.remove(probe)
        if os.path.exists(path):
            open(path, "ab").close()
    except OSError as e:
        raise ValueError(f"cannot write {flag} {path}: {first_line(e)}") from None
    for name in (path, f"{path}.train") if only == "checkpoint" else ():
        try:
            if os.path.exists(name) and os.path.getsize(name) and "weights" not in read(name):
                raise ValueError
        except (ValueError, TypeError):
            raise ValueError(f"{flag} {path} would replace {name}, which is not a checkpoint: give "
                             "another name, or delete that file") from None

def pick_device(name):
    """--device auto|cpu|cuda|cuda:N|mps -> "cpu", "cuda" or "mps". cuda:N becomes the current
    device. Of several processes each gets its own GPU."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise ValueError(f"--device is {name!r:.40}, and has to be auto, cpu, cuda, cuda:N or mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch finds no Apple GPU here, so use --device cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch finds no CUDA device here, so use --device cpu")
    if name in ("cpu", "mps") or not torch.cuda.is_available():
        return "cpu" if name == "auto" else name
    n, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"]) if ranks()[1] > 1 else 0
    local = int(name[5:] or local)
    if local >= n:
        raise ValueError(f"there are only {n} GPUs, numbered from 0, and number {local} is needed: "
                         "give another --device, or fewer processes")
    torch.cuda.set_device(local)
    return "cuda"

def load_checkpoint(name, device, dtype, yes=False):
    """-> model, tokenizer. name: a bundled model, one of HUB, which is fetched and converted on
    first use if the user agrees, or a path. dtype: "auto", None (as stored) or a torch.dtype."""
    bundled = ("tiny", "guider", *HUB)
    path = os.path.join(ROOT, "checkpoints", f"{name}.pt") if name in bundled else name
    if not os.path.exists(path):
        if name not in HUB:
            raise ValueError(f"there is no {path}: give --ckpt tiny, {', '.join(HUB)} or a path")
        fetch(name, yes)
    model, tokenizer = load(path, device, dtype)
    if dtype == "auto" and device == "cpu" and sum(p.numel() for p in model.parameters()) >= 1e9:
        print("note: on a CPU a model of this size takes seconds a step", file=sys.stderr)
    return model, tokenizer

def load_guider(name, tokenizer, device, dtype, yes=False):
    """-> a causal model that reads the ids of this tokenizer. Raises ValueError for another one."""
    guider, its = load_checkpoint(name, device, dtype, yes)
    if not guider.config.causal:
        raise ValueError(f"--guider {name} is not a causal model: give one of train_tiny.py "
                         "--causal, or a Qwen2.5")
    if not (its and tokenizer) or its.ranks != tokenizer.ranks or any(
            tokenizer.special.get(text, i) != i for text, i in its.special.items()):
        raise ValueError(f"--guider {name} has another vocabulary than --ckpt: a Qwen2.5 fits "
                         "Dream, and train_tiny.py --causal --like FILE makes one that fits FILE")
    return guider

def fetch(name, yes):
    """Runs scripts/convert.py, which says on stderr what goes wrong. stdout is for answers."""
    command = [sys.executable, f"{ROOT}/scripts/convert.py", name] + ["--ask"] * (not yes)
    with subprocess.Popen(command, stdout=sys.stderr or subprocess.DEVNULL) as child:
        try:
            child.wait()
        except SystemExit:  # SIGTERM. Ctrl-C reaches the child by itself
            child.terminate()
            raise
    if child.returncode < 0:
        raise ValueError(f"converting {name} was killed, perhaps for its memory: try again")
    if child.returncode:
        sys.exit(child.returncode)

def launch(main):
    """Runs a script's main and exits. A user's error is one sentence on stderr and exit code 2."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a character
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # as Ctrl-C, but ends a chat too
    try:
        code = main()
        print(end="", flush=True)
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as e:
        fault = str(e)
    except (RuntimeError, MemoryError) as e:
        if not re.search("MemoryError|out of memory|ALLOC_FAILED|allocate memory", repr(e)):
            raise
        fault = "there is not enough memory for this: lower --batch-size, or the lengths"
    except OSError as e:  # stdout cannot be written; without strerror it is lm_eval's data
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(e, BrokenPipeError):  # not a fault: the reader has closed the pipe
            sys.exit(0)
        fault = f"cannot write the output: {e.strerror}" if e.strerror else first_line(e)
    signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun's must not cut the sentence off
    if first_to_speak():
        bar = "\n" * (ranks()[1] > 1)  # leaves the line of a dead process's progress bar
        fault = printable(fault).replace("\n", "\\n")  # it may quote a file
        print(f"{bar}{os.path.basename(sys.argv[0])}: {fault}", file=sys.stderr)
    sys.exit(2)
