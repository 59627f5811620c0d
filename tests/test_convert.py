"""scripts/convert.py and fake_hub.py: folders of the Hugging Face kind, good and bad."""
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import ROOT, ended, fork, forked
from filelock import FileLock

import scripts.convert as c
from dkv_min import generate
from model import LLADA_8B, load
from scripts.fake_hub import main as fake
from scripts.fake_hub import shard_of, their_config
from support import cli, fast_cpu

safetensors = pytest.importorskip("safetensors.torch", reason="the converter's tests need the "
                                  "packages of requirements-llada.txt")
CONVERT, INDEX = str(ROOT / "scripts" / "convert.py"), "model.safetensors.index.json"
REFUSED = json.loads((ROOT / "tests" / "refused.json").read_text(encoding="utf-8"))
MAINS = {"convert.py": c.main, "fake_hub.py": fake}

def edit(path, **values):
    """Set fields of a JSON file. "absent" removes one."""
    doc = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in doc.items() if v != "absent"}))

def relist(index, change):
    """Change which file has which tensor in an index, change(files) -> files."""
    edit(index, weight_map=change(json.loads(index.read_text())["weight_map"]))

def rewrite(files, change):
    """Change the tensors of shards, change(name, tensor) -> (name, tensor); False drops it."""
    for file in files:
        pairs = [change(n, t) for n, t in safetensors.load_file(file).items()]
        safetensors.save_file({pair[0]: pair[1].clone() for pair in pairs if pair}, file)

@pytest.fixture(scope="session")
def llada_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "fake"
    assert fake([str(folder), "--width", "16", "--heads", "2"]) == 0
    return folder

@pytest.fixture(scope="session")
def small_dir(tmp_path_factory):
    """The same with 400 rows, so that a test moves kilobytes. Special tokens are at their end."""
    folder = tmp_path_factory.mktemp("hf") / "small"
    fake([str(folder), *"--kv-heads 2 --qkv-bias --layers 3 --width 32 --vocab 380".split()])
    rewrite(folder.glob("*.safetensors"), lambda n, t: (n, t[:400] if len(t) == 126464 else t))
    doc = json.loads((folder / "tokenizer.json").read_text())
    ids = {"<|startoftext|>": 390, "<|endoftext|>": 391, "[CLS]": 392, "<|mdm_mask|>": 393,
           "<|start_header_id|>": 394, "<|end_header_id|>": 395, "<|eot_id|>": 396}
    vocab = {t: i for t, i in doc["model"]["vocab"].items() if i < 380} | ids
    edit(folder / "tokenizer.json", model=doc["model"] | {"vocab": vocab}, added_tokens=[
        t | {"id": ids[t["content"]]} for t in doc["added_tokens"] if t["content"] in ids])
    edit(folder / "config.json", vocab_size=400, embedding_size=400, mask_token_id=393,
         eos_token_id=391)
    return folder

@pytest.fixture
def small(small_dir, tmp_path):
    return pathlib.Path(shutil.copytree(small_dir, tmp_path / "small"))

@pytest.fixture
def hub(small, tmp_path, monkeypatch):
    """huggingface_hub's own folder as after fetching Instruct, without a network. -> the snapshot,
    the environment of processes that see it"""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hf" / "hub" / "models--GSAI-ML--LLaDA-8B-Instruct"
    snapshot = pathlib.Path(shutil.copytree(small, repo / "snapshots" / "0123abc"))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    return snapshot, {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}

def refused(*words, run):
    """run() raises a ValueError of one line with these words. -> the line"""
    with pytest.raises(ValueError) as e:
        run()
    line = str(e.value)
    assert all(word in line for word in words) and "\n" not in line, line
    return line

def fails(folder, *words, **how):
    """Converting this folder is refused, and no file is left."""
    line = refused(*words, run=lambda: c.convert(str(folder), folder.parent / "out.pt", **how))
    assert not list(folder.parent.glob("out*"))
    return line

def same_weights(model, folder, dtype=None):
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= safetensors.load_file(file)
    names, state = c.their_names(model.config), model.state_dict()
    assert names.keys() == weights.keys() and {*names.values()} == state.keys()
    return all(torch.equal(state[names[n]], w.to(dtype or w.dtype)) for n, w in weights.items())

def test_from_the_stand_in_to_an_answer(llada_dir, tmp_path):
    out = tmp_path / "out.pt"
    codes, said, _ = forked(1, "convert.py", llada_dir, "--out", out)
    for words in "269 of 269 special ids", "0 of 7 texts", "Instruct", "'Hello world'":
        assert words in said[0] and codes == [0]
    model, tokenizer = load(out)
    for name in "vocab_size n_vocab mask_id eos_id eot_id".split():
        assert getattr(model.config, name) == getattr(LLADA_8B, name)
    assert model.extra == {"gen_length": 128, "block_length": 32, "chat": "llada"}
    assert model.wte.weight.dtype == torch.bfloat16 and same_weights(model, llada_dir)
    _, said, _ = forked(1, "sample.py", "--ckpt", out, "--prompt", "Hello", "--gen-length", 4,
                        "--block-length", 4, "--json")
    o, chat = json.loads(said[0]), list(c.LLADA["chat"])[0]
    assert o["prompt_ids"] == tokenizer.encode(
        chat.replace("What is paged attention?", "Hello"), special=True)
    assert len(o["ids"]) == 4 and max(o["ids"]) < 126349
    assert [*tmp_path.iterdir()] == [out]

def test_the_real_names_and_shards(tmp_path):
    """The facts of LLaDA-8B's index: 291 tensors, 8,015,581,184 parameters, six files."""
    names = c.their_names(LLADA_8B)
    with torch.device("meta"):
        ours = {n: p.numel() for n, p in c.DiffusionLM(LLADA_8B).state_dict().items()}
    assert len(names) == len(set(names.values())) == 291 and set(names.values()) == set(ours)
    assert sum(ours.values()) == 8_015_581_184
    files = [shard_of(n, 32) for n in names]
    assert [files.count(f"model-0000{k}-of-00006.safetensors") for k in range(1, 7)] == [
        34, 20, 127, 60, 29, 21]
    (tmp_path / "config.json").write_text(json.dumps(their_config(LLADA_8B)))
    expected = vars(LLADA_8B) | {"n_vocab": 126464, "eot_id": None}
    assert c.read_config(tmp_path / "config.json") == (c.Config(**expected), [])

@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_grouped_queries_bias_and_dtype(dtype, small, tmp_path, monkeypatch):
    monkeypatch.setattr(c, "PIECE", 1000)  # a tensor is many pieces
    c.convert(str(small), tmp_path / "out.pt", dtype)
    model, tokenizer = load(tmp_path / "out.pt")
    found = model.config.n_kv_head, model.config.qkv_bias, model.wte.weight.dtype
    assert found == (2, True, dtype or torch.bfloat16)
    assert same_weights(model, small, dtype)
    assert generate(model, [tokenizer.encode("Hello")], gen_length=8).forwards == 8

def test_what_is_noted(small, tmp_path, capsys):
    """Unknown settings, mixed dtypes, and that there is no tokenizer."""
    edit(small / "config.json", some_new_thing=7, another_one=False, use_cache=True,
         n_kv_heads=None, multi_query_attention=True)
    fails(small, "k_proj")  # one head of keys and values now
    edit(small / "config.json", n_kv_heads=2)
    rewrite([small / "model-00003-of-00006.safetensors"], lambda n, t: (n, t.half()))
    (small / "tokenizer.json").unlink()
    c.convert(str(small), tmp_path / "out.pt")
    said = capsys.readouterr().out
    assert "some_new_thing = 7 is ignored" in said and "stored as float16 are written as" in said
    assert "another_one" not in said and "use_cache" not in said
    assert "has no tokenizer" in said and load(tmp_path / "out.pt")[1] is None

@pytest.mark.parametrize("old, new, eos, words", [
    ("126340", "126341", 126081, "<role> is 126341, expected 126340 (and 1 m"),
    ("<|eot_id|>", "<|eot|>", 126081, "<|eot_id|> is None"),
    ("<role>", "<role>", 126082, "the end of text 126082")])
def test_wrong_special_ids_stop_an_instruct_model(old, new, eos, words, llada_dir, tmp_path):
    folder = pathlib.Path(shutil.copytree(llada_dir, tmp_path / "odd"))
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(old, "SWAP").replace(new, old).replace("SWAP", new))
    edit(folder / "config.json", eos_token_id=eos)
    fails(folder, words)

@pytest.mark.parametrize("base", [False, True])
def test_a_tokenizer_as_llada_s_is_known_to_be(base, capsys):
    """A stand-in that spells the known texts as other people's copies of the real one do."""
    known = c.LLADA["spelled"] | c.LLADA["chat"]
    assert sum(sum(known.values(), [])) == 270789 + 787448  # not changed by accident
    parrot = types.SimpleNamespace(ranks=range(126080), unmerged={}, special=c.special_tokens(base),
                                   encode=lambda text, special: known[text])
    assert c.check_llada(parrot, LLADA_8B) == []
    assert ("Base" if base else "7 of 7") in capsys.readouterr().out
    known["Hello world"] = [1, 2]
    assert c.check_llada(parrot, LLADA_8B) == [
        "'Hello world' begins with the ids [1, 2], expected [14455, 1931]"]

def test_tokenizers_that_do_not_fit(small):
    """To the network, or to the name that was fetched."""
    edit(small / "config.json", mask_token_id=395)
    fails(small, "mask_token_id is 395")
    edit(small / "config.json", mask_token_id=393)
    path = small / "tokenizer.json"
    path.write_text(path.read_text().replace("<|eot_id|>", "<|other|>"))
    fails(small, "GSAI-ML/LLaDA-1.5", name="llada-1.5")
    rewrite(small.glob("*.safetensors"), lambda n, t: (n, t[:392] if len(t) == 400 else t))
    edit(small / "config.json", vocab_size=392, embedding_size=392, mask_token_id=380)
    fails(small, "392 rows")
    path.unlink()
    fails(small, "GSAI-ML/LLaDA-8B-Base: it has no tokenizer", name="llada-base")

@pytest.mark.parametrize("name, value, words", REFUSED["configs"])
def test_configs_of_another_network(name, value, words, small):
    """tests/campaigns/fuzz.py found that a value of 5,000 letters was quoted whole."""
    edit(small / "config.json", **{name: value})
    line = fails(small, words)
    assert "config.json" in line or value == 10**6
    assert len(line) < 200 + len(str(small))

def test_names_with_another_prefix(small):
    """A LoRA training puts base_model.model. before every name."""
    first, prefix = "model.transformer.blocks.0.attn_norm.weight", "base_model.model."
    rewrite(small.glob("*.safetensors"), lambda n, t: (prefix + n, t))
    relist(small / INDEX, lambda files: {prefix + n: files[n] for n in files})
    fails(small, "39 tensors of the files and 39 of the network do not match: the files have "
          f"{prefix}{first}, and {first} is expected; remove the prefix {prefix}")
    relist(small / INDEX, lambda files: {n.removeprefix(prefix + "model."): files[n]
                                         for n in files})
    line = fails(small, "the files have transformer.blocks.0.attn_norm.weight, and " + first)
    assert "prefix" not in line

DAMAGE = {
    "cut": lambda path, size: path.write_bytes(path.read_bytes()[:size]),
    "write": lambda path, text: path.write_text(text),
    "remove": lambda path, _: path.unlink(),
    "shorten": lambda path, _: rewrite([path], lambda n, t: (n, t[:-1])),
    "to int": lambda path, _: rewrite([path], lambda n, t: (n, t.int())),
    "drop": lambda path, name: rewrite([path], lambda n, t: n != name and (n, t)),
    "list": lambda path, more: relist(path, lambda files: {
        n: f for n, f in (files | more).items() if f})}

@pytest.mark.parametrize("file, how, value, words", REFUSED["damage"])
def test_damaged_folders(file, how, value, words, small, tmp_path):
    """One sentence names the file or the tensor, and the file that was at --out stays there."""
    DAMAGE[how](small / file, value)
    out = tmp_path / "out.pt"
    torch.save({"format": "dkv-min 1", "weights": {}}, out)
    before = out.read_bytes()
    refused(words, run=lambda: c.main([str(small), "--out", str(out)]))
    assert out.read_bytes() == before and list(tmp_path.glob("out*")) == [out]

@pytest.mark.parametrize("script, args, words", [(s, *case) for s in MAINS for case in REFUSED[s]])
def test_user_errors(script, args, words, small, tmp_path, monkeypatch):
    """One sentence, and no file is made, changed or removed."""
    def files():
        return {f: f.is_file() and f.read_bytes() for f in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    before = files()
    refused(words, run=lambda: MAINS[script](shlex.split(args)))
    assert files() == before

def test_too_little_room(small, tmp_path, monkeypatch):
    """The file that a killed run has left does not count as used. The message said 0.0 GB."""
    usage, left = shutil.disk_usage(tmp_path), tmp_path / "out.pt.converting"
    monkeypatch.setattr(shutil, "disk_usage",
                        lambda path: usage._replace(free=12000 if left.exists() else 10**9))
    left.write_bytes(b"x" * 1000)
    c.convert(str(small), tmp_path / "out.pt")
    os.remove(tmp_path / "out.pt")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=12000))
    fails(small, "needs 125.8 KB", "has 12.0 KB free")
    assert [c.amount(n) for n in (16.1e9, 33e6, 12)] == ["16.1 GB", "33.0 MB", "0.0 KB"]

def test_a_full_disk(small, tmp_path):
    """A limit on the size of files acts as one: one sentence, and no file is left."""
    pytest.importorskip("resource", reason="Windows has no such limit")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))"
    codes, _, said = forked(1, "convert.py", small, "--out", tmp_path / "out.pt", patch=limit)
    last = said[0].strip().splitlines()[-1]
    assert last == f"convert.py: cannot write {tmp_path / 'out.pt'}: File too large"
    assert codes == [2] and not list(tmp_path.glob("out*"))

def test_a_file_that_does_not_read_back(small, monkeypatch):
    def damaged(path, read=c.read):
        data = read(path)
        data["weights"]["blocks.1.mlp.up.weight"][3, 3] += 1
        return data
    monkeypatch.setattr(c, "read", damaged)
    fails(small, "does not read back", "blocks.1.mlp.up.weight")

def test_two_at_once(small, tmp_path):
    """The second process waits for the first. It uses up what a killed one has left, and does not
    convert again if the first one has finished."""
    out, temp, lock = (tmp_path / f"out.pt{end}" for end in ("", ".converting", ".lock"))
    for finished in (False, True):
        with FileLock(lock):
            p = subprocess.Popen([sys.executable, CONVERT, str(small), "--out", str(out)],
                                 text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
            assert "waiting for it" in p.stderr.readline() and p.poll() is None
            if finished:
                os.replace(shutil.copy(out, tmp_path / "other.pt"), out)
                before = out.stat().st_mtime_ns
            else:
                temp.write_bytes(b"half" * 500_000)
        said, _ = p.communicate(timeout=100)
        assert p.returncode == 0 and list(tmp_path.glob("out*")) == [out] and load(out)
        assert ("written by the other process" in said) == finished
    assert out.stat().st_mtime_ns == before

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(tmp_path, monkeypatch):
    """Converting and loading 100 MB of weights in pieces of 1 MB takes far less memory than they
    have. Loading does not pack the weights here, as for a model of several gigabytes. The tokenizer
    is recognized as the base model's."""
    def anonymous(pid):
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        return sum(int(n) for n in re.findall(r"RssAnon:\s*(\d+)", status)) / 1024
    folder, out, taken = tmp_path / "big", tmp_path / "o.pt", []
    fake([str(folder), "--width", "192", "--layers", "1", "--base"])
    monkeypatch.setattr(c, "PIECE", 2**20)
    monkeypatch.setattr(fast_cpu, "pack", lambda model: model)
    with torch.device("meta"):
        c.DiffusionLM(c.Config())  # imports parts of torch, which do not count
    for i, job in enumerate((lambda: c.convert(str(folder), out), lambda: c.load(out))):
        seen = [anonymous(os.getpid())]
        pid = fork(job, tmp_path / f"said.{i}", tmp_path / "err")
        while (code := ended(pid)) is None:
            seen.append(anonymous(pid))
            time.sleep(0.002)
        assert code == 0, (tmp_path / "err").read_text()
        taken.append(max(seen) - seen[0])
    assert out.stat().st_size > 90 * 2**20 and taken[0] < 40 and taken[1] < 20, taken
    model, said = load(out)[0], (tmp_path / "said.0").read_text()
    assert "266 of 266 special ids" in said and "Base" in said
    assert "chat" not in model.extra and model.config.eot_id is None

def test_a_snapshot_that_was_fetched_before(hub, tmp_path, capsys):
    """Offline, a complete snapshot is used. Without one the message says how to get it."""
    out = tmp_path / "out.pt"
    assert c.main(["llada", "--out", str(out)]) == 0
    assert "was fetched before" in capsys.readouterr().err and load(out)[0].extra["chat"] == "llada"
    next(hub[0].glob("model-00002*")).unlink()  # not complete any more
    for source in ("GSAI-ML/LLaDA-1.5", "llada"):
        refused("HF_HUB_OFFLINE", run=lambda: c.main([source, "--out", str(tmp_path / "no.pt")]))
    assert not (tmp_path / "no.pt").exists()

@pytest.mark.parametrize("typed, words", [
    ("", "nothing was f"), ("n\n", "nothing was f"), (None, "add --yes"), ("YES\n", None)])
def test_ask_user(typed, words, monkeypatch, capsys):
    """None: stdin is not a terminal."""
    stdin = io.StringIO(typed)
    stdin.isatty = lambda: typed is not None
    monkeypatch.setattr(sys, "stdin", stdin)
    refused(words, run=c.ask_user) if words else c.ask_user()
    assert ("[y/N]" in capsys.readouterr().err) == (typed is not None)

def test_first_use_asks(hub, tmp_path, monkeypatch):
    """sample.py --ckpt llada in a copy of the repository converts and answers, if somebody in a
    terminal says yes. The next time it does not ask."""
    pty, (_, env), copy = pytest.importorskip("pty"), hub, tmp_path / "repo"
    for f in ("scripts", "support", "sample.py", "dkv_min.py", "model.py"):
        (shutil.copytree if (ROOT / f).is_dir() else shutil.copy)(ROOT / f, copy / f)
    args = [copy / "sample.py", "--ckpt", "llada", "--prompt", "Hello", "--gen-length", "8",
            "--block-length", "8", "--json"]
    master, slave = pty.openpty()
    os.write(master, b"y\n")
    p = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True,
                       timeout=200, stdin=slave, env=os.environ | env)
    os.close(slave), os.close(master)
    said = ["LLaDA-8B-Instruct was fetched before", "continue? [y/N]"]
    assert p.returncode == 0 and all(words in p.stderr for words in said), p.stderr
    assert len(p.stdout.splitlines()) == 1 and len(json.loads(p.stdout)["ids"]) == 8
    monkeypatch.setattr(cli, "ROOT", str(copy))
    monkeypatch.setattr(cli, "fetch", None)  # the next time
    cli.load_checkpoint("llada", "cpu", None)

@pytest.mark.parametrize("package, source", [
    ("safetensors", "small"), ("safetensors", "llada"), ("huggingface_hub", "llada")])
def test_missing_packages(package, source, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    refused(package, "requirements-llada.txt", run=lambda: c.main([source, "--out", "o.pt"]))
