"""Several processes, as torchrun starts them: who is who, and who speaks; and `sample.py --out`, a file of answers that goes on
where it was stopped and that they write together. Both sample.py and train_tiny.py use it."""
import contextlib
import functools
import json
import os
import sys
import time

import torch.distributed as dist


def ranks():
    """-> the number of this process and how many there are, as torchrun says; 0 and 1 without it."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if "TORCHELASTIC_RUN_ID" in os.environ else (0, 1)


@functools.cache
def store():
    """What the processes of a torchrun share: a few keys and counters, kept by torchrun."""
    return next(dist.rendezvous("env://"))[0]


def first_to_speak():
    """Whether this process tells the user what is wrong: of several the first, as what the others meet is mostly its consequence."""
    try:
        return ranks()[1] == 1 or store().add("spoken", 1) == 1
    except (RuntimeError, ValueError):  # torchrun is gone
        return True


def agree(a, b):
    return a[:len(b)] == b[:len(a)]


def continue_file(path, heads):
    """Opens an --out behind the answers that it has already. heads: what the lines of the whole file begin with.
    -> open file, number of whole lines in it"""
    import fcntl  # not on Windows
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"--out {path} is a folder or a device: give the name of a file")
    try:
        f = open(path, "a+b")
    except OSError as e:
        raise ValueError(f"cannot write --out {path}: {e.strerror}") from None
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"another run is writing --out {path}: wait for it, or give another file") from None
    f.seek(0)
    n = end = 0
    for line in f:
        if not line.endswith(b"\n") and n < len(heads) and agree(line, json.dumps(heads[n])[:-1].encode()):  # killed in the middle of it
            break
        try:
            known = json.loads(line)
        except (ValueError, RecursionError):
            known = None
        if n == len(heads) or not isinstance(known, dict) or known != known | heads[n]:
            raise ValueError(f"line {n + 1} of --out {path} is no answer to these prompts with these settings: give another file")
        n, end = n + 1, end + len(line)
    f.truncate(end)
    return f, n


def answer_file(path, heads, prompts, batch_size, answer):
    """Writes the answers that the file lacks, batch by batch. Of several processes each takes the next batch that is free, so
    that a slow one holds up nobody, and the first writes what all have answered, in order.
    heads: what the lines begin with, several for each of the prompts; answer(first, show, share): as in sample.py"""
    rank, world = ranks()
    f, there, per_prompt = None, 0, len(heads) // prompts  # there: prompts that are answered already
    if rank == 0:
        f, n = continue_file(path, heads)
        there = n // per_prompt
        if n % per_prompt:
            f.seek(0)
            f.truncate(sum(len(next(f)) for _ in range(there * per_prompt)))

    def write(text):
        f.write(text)
        f.flush()
        os.fsync(f.fileno())

    def take(batches):
        while (i := store().add("taken", 1) - 1) < len(batches):
            yield batches[i]

    def fetch(key):
        while not store().check([key]):
            time.sleep(0.02)  # rather than to wait in the store, where no signal is heard
        return store().get(key)

    def write_next(wait):
        while to_write and (wait or store().check([f"batch {to_write[0]}"])):
            write(fetch(f"batch {to_write[0]}"))
            store().delete_key(f"batch {to_write.pop(0)}")

    def show(objects):
        text = "".join(json.dumps(o) + "\n" for o in objects).encode()
        if world == 1:
            return write(text)
        store().set(f"batch {objects[0]['index']}", text)
        if rank == 0:
            write_next(wait=False)

    try:
        with f or contextlib.nullcontext():
            if world > 1:
                if rank == 0:
                    store().set("there", str(there))
                there = int(fetch("there"))
            to_write = [*range(there, prompts, batch_size)]
            answer(there, show, iter if world == 1 else take)
            if rank > 0:
                fetch("done")  # so that somebody is there to say it if the first one dies
            elif world > 1:
                write_next(wait=True)
                store().set("done", "")
    except OSError as e:
        raise ValueError(f"cannot write --out {path}: {e.strerror}; what it holds is kept") from None
    except dist.DistError:
        raise ValueError(f"torchrun has ended before its processes; the same command goes on behind what --out {path} holds") from None
    except (KeyboardInterrupt, SystemExit):
        if first_to_speak():
            print(f"stopped; the same command goes on behind what --out {path} holds", file=sys.stderr)
        raise
    if rank == 0:
        print(f"{path}: {prompts} prompts answered" + (f", {there} of them before" if there else ""))
    return 0
