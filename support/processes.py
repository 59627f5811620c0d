"""Several processes, as torchrun starts them: which one this is, and which one speaks to the user.
And `sample.py --out`: a file of answers that resumes where it stopped, written by all of them."""
import contextlib
import functools
import json
import os
import sys
import time

import torch.distributed as dist
from filelock import FileLock, Timeout

from support.checkpoint import first_line

def ranks():
    """-> the number of this process and how many there are; 0 and 1 without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

@functools.cache
def store():
    """The keys and counters that the processes of a torchrun share. torchrun keeps them."""
    return next(dist.rendezvous("env://"))[0]

def first_to_speak():
    """Whether this process reports its error: only the first does, the others' follow from it."""
    try:
        return ranks()[1] == 1 or store().add("spoken", 1) == 1
    except (RuntimeError, ValueError):  # torchrun has ended
        return True

@contextlib.contextmanager
def only_writer(path):
    """Refuses a file that another run writes. Of several processes the first holds the lock."""
    if path is None or ranks()[0] > 0:
        yield
        return
    folder, name = os.path.split(os.path.realpath(path))
    lock = FileLock(os.path.join(folder, f".{name}.lock"), timeout=0)
    try:
        lock.acquire()
    except OSError as e:
        busy = "another run is writing it: wait for it, or give another file"
        reason = busy if isinstance(e, Timeout) else first_line(e)
        raise ValueError(f"cannot write --out {path}: {reason}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # on Windows release() removes it, and nobody else can
            os.remove(lock.lock_file)
        lock.release()

def continue_file(path, heads, per_prompt):
    """Opens an --out after the answers that it already has. heads: the beginnings of all lines.
    -> open file, number of prompts that have all their answers"""
    f = open(path, "a+b")
    f.seek(0)
    ends = [0]  # of the whole lines
    for n, line in enumerate(f):
        head = json.dumps(heads[n])[:-1].encode() if n < len(heads) else b""
        # a run was killed while it wrote this line
        if head and not line.endswith(b"\n") and line[:len(head)] == head[:len(line)]:
            break
        known = None
        with contextlib.suppress(ValueError, RecursionError):
            known = json.loads(line)
        if not head or not isinstance(known, dict) or known != known | heads[n]:
            raise ValueError(f"line {n + 1} of --out {path} does not answer these prompts with "
                             "these settings: give another file")
        ends.append(ends[-1] + len(line))
    there = (len(ends) - 1) // per_prompt
    f.truncate(ends[there * per_prompt])
    return f, there

def answer_file(path, heads, prompts, batch_size, answer):
    """Writes the answers that the file lacks, batch by batch. Each of several processes takes the
    next free batch, so that a slow one holds up nobody; the first one writes all, in order.
    heads: the beginnings of all lines. answer(first, show, share): that of sample.py."""
    resume = f"the same command resumes after the answers in --out {path}"
    rank, world = ranks()
    keys = store() if world > 1 else dist.HashStore()

    def wait_for(key):
        while not keys.check([key]):
            time.sleep(0.02)  # waiting in the store would ignore signals
        return keys.get(key)

    def take(batches):
        while (i := keys.add("taken", 1) - 1) < len(batches):
            yield batches[i]

    def write_next(wait):
        while to_write and (wait or keys.check([f"batch {to_write[0]}"])):
            f.write(wait_for(f"batch {to_write[0]}"))
            f.flush()
            os.fsync(f.fileno())
            keys.delete_key(f"batch {to_write.pop(0)}")

    def show(objects):
        keys.set(f"batch {objects[0]['index']}", "".join(json.dumps(o) + "\n" for o in objects))
        if rank == 0:
            write_next(wait=False)

    try:
        if rank == 0:
            f, there = continue_file(path, heads, len(heads) // prompts)
            keys.set("there", str(there))
        there = int(wait_for("there"))  # prompts that have their answers
        to_write = [*range(there, prompts, batch_size)]
        answer(there, show, take)
        if rank == 0:
            write_next(wait=True)
            f.close()
            keys.set("done", "")
        wait_for("done")  # so that a process is left to report if the first one dies
    except OSError as e:
        raise ValueError(f"cannot write --out {path}: {first_line(e)}; "
                         "its answers are kept") from None
    except dist.DistError:
        raise ValueError(f"torchrun ended before its processes; {resume}") from None
    except (KeyboardInterrupt, SystemExit):
        if first_to_speak():
            print(f"stopped; {resume}", file=sys.stderr)
        raise
    if rank == 0:
        before = f", {there} of them before" if there else ""
        print(f"{path}: {prompts} prompts answered{before}")
    return 0
