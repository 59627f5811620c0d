"""Models for the tests. All of them are hermetic: random or golden weights, no network, CPU."""
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that `python -m pytest` works from anywhere

from model import Config, DiffusionLM  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts pytest in the background has Ctrl-C ignored
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes that tests start


def random_model(seed=0, dtype=torch.float64, **config):
    """Random weights large enough that tokens matter to each other. In float64, so that rounding decides no tie."""
    settings = dict(n_layer=3, n_head=4, n_kv_head=4, n_embd=32, n_ff=64, vocab_size=48, n_vocab=44, max_len=64, mask_id=40, eos_id=1, eot_id=2)
    g = torch.Generator().manual_seed(seed)
    model = DiffusionLM(Config(**settings | config)).to(dtype)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / p.shape[1] ** 0.5 * 1.5)
    return model.eval().requires_grad_(False)


def random_prompts(lengths, seed=0):
    """Ids 3..39: no mask, no end of text."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40, (n,), generator=g).tolist() for n in lengths]


@functools.cache
def server():
    return subprocess.Popen([sys.executable, str(ROOT / "tests" / "forks.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # ends with our end of the pipe


def forked(n, script, *flags, patch="", stdin=b"", cwd="."):
    """A command line in n processes that tests/forks.py forks, which saves the seconds in which torch is imported. patch: Python
    that is executed first. -> exit codes, stdout and stderr of the n processes"""
    server().stdin.write(json.dumps(dict(n=n, script=script, flags=[*map(str, flags)], patch=patch, stdin=stdin.decode("latin-1"), cwd=str(cwd))) + "\n")
    server().stdin.flush()
    found = json.loads(server().stdout.readline())
    assert "Traceback" not in "".join(found["err"]), found
    return found["codes"], found["out"], found["err"]


@pytest.fixture(scope="session")
def model():
    return random_model()
