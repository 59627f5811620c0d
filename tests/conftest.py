"""Models and processes for the tests. All are hermetic: small weights, no network, CPU."""
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

import pytest
import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).parent.parent
ENDLESS = functools.reduce(lambda x, _: [x, x], range(40), ["ha"])  # 2**40 of them, in 40 lists
REFUSED = json.loads((ROOT / "tests" / "refused.json").read_text(encoding="utf-8"))
sys.path.insert(0, str(ROOT))  # so that `python -m pytest` works from anywhere

from model import Config, DiffusionLM, save  # noqa: E402
from support.tokenizer import build_tokenizer  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores Ctrl-C
# the models are tiny: a second thread costs more than it brings, and a fork would lack it
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes that tests start

def random_model(seed=0, dtype=torch.float64, **config):
    """Weights so large that tokens matter to each other. Float64: rounding decides no tie."""
    small = dict(n_layer=3, n_head=4, n_kv_head=4, n_embd=32, n_ff=64, vocab_size=48, n_vocab=44,
                 max_len=64, mask_id=40, eos_id=1, eot_id=2)
    g = torch.Generator().manual_seed(seed)
    model = DiffusionLM(Config(**small | config)).to(dtype)
    for name, p in model.named_parameters():
        if "norm" not in name:
            scale = 1.5 / p.shape[1] ** 0.5 if p.dim() == 2 else 1.0
            p.data.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * scale)
    return model.eval().requires_grad_(False)

def random_prompts(lengths, seed=0):
    """Ids 3..39: no mask, no end of text."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40, (n,), generator=g).tolist() for n in lengths]

def byte_model():
    """Random weights and a tokenizer of bytes: what it writes is anything, and often an escape."""
    model = random_model(dtype=torch.float32, vocab_size=260, n_vocab=258, mask_id=257, eos_id=256,
                         eot_id=None)
    model.head.weight.data[27] *= 3
    model.extra = {"template": "{}\n"}
    return model, build_tokenizer("some text ", 258)

def answers(path):
    """-> the objects of an --out, without the times"""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in path.read_text().splitlines()]

@pytest.fixture(scope="session")
def model():
    return random_model()

@pytest.fixture(scope="session")
def wordy(tmp_path_factory):
    path = tmp_path_factory.mktemp("wordy") / "wordy.pt"
    save(path, *byte_model())
    return path

# command lines in forked processes, so that torch is imported once and not by each of them

@functools.cache
def scripts():
    """-> {name: module}"""
    import sample
    import scripts.convert
    import train_tiny
    from support import problems
    problems.build_tokenizer = functools.cache(problems.build_tokenizer)
    problems.Problems(train_tiny.parse_args([])[0])  # forks inherit its tokenizer
    return {"train_tiny.py": train_tiny, "sample.py": sample, "convert.py": scripts.convert}

def fork(job, out, err, stdin=os.devnull, cwd="."):
    """-> the id of a process that calls job, with these files as its stdout, stderr and stdin."""
    if pid := os.fork():
        return pid
    code, write = 1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        try:
            for path, fd, flags in ((stdin, 0, os.O_RDONLY), (out, 1, write), (err, 2, write)):
                os.dup2(os.open(path, flags, 0o600), fd)
            sys.stdin = open(0, closefd=False)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)
            os.chdir(cwd)
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())  # a killed fork leaves the shared one locked
            job()
            sys.stdout.flush()
            code = 0
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
    finally:  # SIGTERM raises SystemExit in the lines above too, and a fork must not become pytest
        os._exit(code)

def start(script, flags, out, err, env={}, patch="", stdin=os.devnull, cwd="."):
    """-> the id of a process that runs the script with these flags. It executes patch first."""
    from support.cli import launch
    modules = scripts()

    def job():
        os.environ.update(env)
        sys.argv = [script, *map(str, flags)]
        exec(patch, {name[:-3]: module for name, module in modules.items()}
             | {"rank": int(env.get("RANK", 0))})
        launch(lambda: modules[script].main(sys.argv[1:]))
    return fork(job, out, err, stdin, cwd)

def ended(pid):
    """-> the exit code of a process, -9 after a kill -9, None while it runs."""
    there, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if there else None

def forked(n, script, *flags, patch="", stdin=b"", cwd="."):
    """A command line in n processes -> their exit codes, stdout and stderr. Of several processes it
    does what torchrun does: they know of each other, and all are ended when one has failed."""
    world, codes, late = [{}], [None] * n, None
    if n > 1:
        keeper = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world = [dict(WORLD_SIZE=str(n), RANK=str(r), LOCAL_RANK=str(r), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(keeper.port), TORCHELASTIC_RUN_ID="test",
                      TORCHELASTIC_USE_AGENT_STORE="True") for r in range(n)]
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "in").write_bytes(stdin)
        pids = [start(script, flags, f"{folder}/out{r}", f"{folder}/err{r}", env, patch,
                      f"{folder}/in", cwd) for r, env in enumerate(world)]
        while None in codes:
            codes = [ended(pid) if code is None else code for pid, code in zip(pids, codes)]
            if any(codes) and (late is None or time.time() > late):
                for pid in [pid for pid, code in zip(pids, codes) if code is None]:
                    os.kill(pid, signal.SIGTERM if late is None else signal.SIGKILL)
                late = time.time() + 30
            time.sleep(0.01)
        out, err = ([pathlib.Path(folder, f"{name}{r}").read_text(errors="replace")
                     for r in range(n)] for name in ("out", "err"))
    assert "Traceback" not in "".join(err), err
    return codes, out, err
