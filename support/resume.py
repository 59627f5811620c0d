"""How a training run is stopped and resumed, from FILE.train, and what its failures print."""
import contextlib
import glob
import math
import os
import reprlib
import signal

import torch

from support.checkpoint import atomic_write, read

@contextlib.contextmanager
def interrupts():
    """Collects Ctrl-C and SIGTERM in a list, so that a run ends between two steps."""
    seen = []
    before = {number: signal.signal(number, lambda *_: seen.append(True))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def check_finite(name, value, step, out, best):
    """Raises ValueError for a loss or gradient that is not finite. A finite best: out is saved."""
    if not math.isfinite(value):
        kept = f"; {out} keeps the best model so far" if math.isfinite(best) else ""
        raise ValueError(f"the {name} is {value} at step {step}: lower --lr and start again{kept}")

@contextlib.contextmanager
def failures_in_a_sentence(out, resume):
    """resume: the command that resumes the run."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ValueError("there is not enough memory for this: raise --accumulate, or lower "
                         "--batch-size or the sizes") from None
    except RuntimeError as e:
        if "gloo" not in str(e) and not isinstance(e, torch.distributed.DistError):
            raise
        raise ValueError("another process of this run has ended, and with it the run; "
                         f"{out}.train keeps the last save: resume with {resume}") from None

def remove_temps(path):
    """Removes the temporary files of a process that was killed while it wrote."""
    for name in (path, path + ".train"):
        for temp in glob.glob(glob.escape(name) + ".[0-9]*.tmp"):
            os.remove(temp)

def save_state(args, text, step, best, model, optimizers):
    """Random numbers need no state: those of a step are drawn from (seed, step)."""
    flags = vars(args) | {name: path and os.path.abspath(path) for name, path in
                          (("data", args.data), ("like", args.like))}
    state = {"args": flags, "text": text, "step": step, "best": best,
             "weights": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    with atomic_write(args.out + ".train") as f:
        torch.save(state, f)

def load_state(path):
    """-> what save_state wrote, the flags as a command line."""
    state, names = read(path), ("args", "step", "best", "weights", "optimizers")
    found = [state.get(name) for name in names] if isinstance(state, dict) else names
    if not all(map(isinstance, found, (dict, int, float, dict, list))):
        raise ValueError(f"{path} is not what train_tiny.py keeps for --resume")
    words = []
    for name, value in state["args"].items():
        flag, listed = f"--{name}".replace("_", "-"), type(value) is list
        if value is not None and value is not False:
            short = value if type(value) is str else reprlib.repr(value)  # it may be endless
            words += [flag, *map(reprlib.repr, value)] if listed else (
                [flag] if value is True else [f"{flag}={short}"])
    return state | {"args": words}

def restore(state, model, optimizers, path):
    try:
        model.load_state_dict(state["weights"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} does not fit together: start again without --resume") from None
