"""Runs train_tiny.py, sample.py and scripts/convert.py as a command line does, but in forked processes, so that torch is
imported once and not by each of them. What forks must not compute itself: a fork would miss torch's threads.

python tests/forks.py        reads JSON lines of requests on stdin, see run(), and answers each with a line"""
import functools
import json
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
import traceback

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tqdm import tqdm  # noqa: E402

import sample  # noqa: E402
import scripts.convert  # noqa: E402
import train_tiny  # noqa: E402

SCRIPTS = {"train_tiny.py": train_tiny, "sample.py": sample, "convert.py": scripts.convert}


train_tiny.build_tokenizer = functools.cache(train_tiny.build_tokenizer)
train_tiny.Problems(train_tiny.parse_args([])[0])  # so that the forks have it


def start(script, flags, out, err, env={}, patch="", stdin=os.devnull, cwd="."):
    """-> the id of a process that runs the script with these flags. patch: Python that is executed first."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        for path, fd in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), fd)
        os.dup2(os.open(stdin, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
        os.chdir(cwd)
        os.environ.update(env)
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # its own one is shared with forks, and stays locked by one that was killed while it held it
        sys.argv = [script, *map(str, flags)]
        exec(patch, {"sample": sample, "train_tiny": train_tiny, "rank": int(env.get("RANK", 0))})
        module = SCRIPTS[script]
        sample.launch(lambda: module.main(sys.argv[1:]))
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid):
    """-> the exit code of a process, -9 if a kill -9 was it, or None while it runs."""
    there, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if there else None


def run(n, script, flags, patch="", stdin="", cwd="."):
    """Does what torchrun does, n > 1: starts n processes that know of each other, and ends them all when one has failed.
    stdin: what they read there, in latin-1."""
    env = dict(WORLD_SIZE=str(n), TORCHELASTIC_RUN_ID="test", TORCHELASTIC_USE_AGENT_STORE="True", MASTER_ADDR="127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        if n > 1:
            keeper = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            env["MASTER_PORT"] = str(keeper.port)
        with open(f"{folder}/in", "w", encoding="latin-1", newline="") as f:
            f.write(stdin)
        paths = [(f"{folder}/out{r}", f"{folder}/err{r}") for r in range(n)]
        pids = [start(script, flags, *paths[r], env | dict(RANK=str(r), LOCAL_RANK=str(r)) if n > 1 else {}, patch, f"{folder}/in", cwd) for r in range(n)]
        codes, told = [None] * n, 0
        while None in codes:
            codes = [ended(pid) if code is None else code for pid, code in zip(pids, codes)]
            if any(codes) and not told or told and time.time() > told + 30:
                for pid, code in zip(pids, codes):
                    if code is None:
                        os.kill(pid, signal.SIGKILL if told else signal.SIGTERM)
                told = told or time.time()
            time.sleep(0.01)
        texts = [[open(path, errors="replace").read() for path in pair] for pair in paths]
    return dict(codes=codes, out=[out for out, _ in texts], err=[err for _, err in texts])


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
