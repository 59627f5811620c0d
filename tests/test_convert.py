"""scripts/convert.py and scripts/fake_llada.py: folders of the Hugging Face kind, good and bad, to checkpoints.

python -m pip install -r requirements-llada.txt && python -m pytest tests/test_convert.py"""
import fcntl
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import scripts.convert as c
from dkv_min import generate
from model import LLADA_8B, load
from sample import main as sample_main
from scripts.fake_llada import main as fake
from scripts.fake_llada import shard_of

safetensors = pytest.importorskip("safetensors.torch", reason="the converter's tests need the packages of requirements-llada.txt")


def shrink(folder, rows=400):
    """The stand-in's 126,464 rows cut to some hundred, so that a test moves kilobytes: special tokens at its end."""
    for file in folder.glob("*.safetensors"):
        tensors = safetensors.load_file(file)
        safetensors.save_file({n: t[:rows].clone() if len(t) == 126464 else t for n, t in tensors.items()}, file)
    edit(folder / "config.json", vocab_size=rows, embedding_size=rows, mask_token_id=396, eos_token_id=391)
    doc = json.loads((folder / "tokenizer.json").read_text())
    kept = {t: i for t, i in doc["model"]["vocab"].items() if i < 380}
    added = {t["content"]: 390 + k for k, t in enumerate(t for t in doc["added_tokens"] if "reserved" not in t["content"] and t["content"] not in ("[gMASK]", "<role>", "</role>", "<|arithmetic_start|>", "<|arithmetic_end|>"))}
    doc["added_tokens"] = [{**t, "id": added[t["content"]]} for t in doc["added_tokens"] if t["content"] in added]
    doc["model"] |= {"vocab": kept | added, "merges": [m for m in doc["model"]["merges"] if "".join(m) in kept]}
    (folder / "tokenizer.json").write_text(json.dumps(doc))
    edit(folder / "config.json", mask_token_id=added["<|mdm_mask|>"], eos_token_id=added["<|endoftext|>"])


def edit(path, **values):
    doc = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in doc.items() if v != "absent"}))


def theirs(folder):
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in safetensors.load_file(f).items()}


@pytest.fixture(scope="session")
def llada_dir(tmp_path_factory):
    """The real numbers of rows and special tokens."""
    folder = tmp_path_factory.mktemp("hf") / "fake"
    assert fake([str(folder), "--width", "16", "--heads", "2"]) == 0
    return folder


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "small"
    fake([str(folder), "--heads", "4", "--kv-heads", "2", "--qkv-bias", "--layers", "3", "--width", "32"])
    shrink(folder)
    return folder


@pytest.fixture
def small(small_dir, tmp_path):
    return pathlib.Path(shutil.copytree(small_dir, tmp_path / "small"))


def run(*args, code=0, env=None, **how):
    p = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=200, env=os.environ | (env or {}), **how)
    assert p.returncode == code and "Traceback" not in p.stderr, p.stdout + p.stderr
    return p


def test_the_authors_tiny_llada(tmp_path):
    """The weights of the golden traces through the files: the very numbers that tests/test_golden.py runs."""
    data = dict(np.load(pathlib.Path(__file__).parent / "golden.npz"))
    weights = {k[7:]: torch.from_numpy(v) for k, v in data.items() if k.startswith("weight.")}
    (tmp_path / "config.json").write_bytes(data["config"].tobytes())
    files = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(weights)}
    for f in set(files.values()):
        safetensors.save_file({n: w for n, w in weights.items() if files[n] == f}, tmp_path / f)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    p = run(ROOT / "scripts" / "convert.py", tmp_path, "--out", tmp_path / "out.pt")
    assert "30 tensors, 190,912 parameters, float32" in p.stdout and "has no tokenizer" in p.stdout
    model, tokenizer = load(tmp_path / "out.pt")
    names = c.their_names(model.config)
    assert tokenizer is None and all(torch.equal(model.state_dict()[names[n]], w) for n, w in weights.items())
    doc = json.loads(data["cases"].tobytes())
    f = doc["forwards"][0]
    assert (model(torch.tensor(f["input_ids"])) - torch.from_numpy(data["logits." + f["logits"]])).abs().max() < 1e-3
    case = next(k for k in doc["cases"] if k["algorithm"] == "decode" and len(k["prompt"]) == 1 and not k["order"])
    a = case["args"]
    p = run(ROOT / "sample.py", "--ckpt", tmp_path / "out.pt", "--ids", ",".join(map(str, case["prompt"][0])), "--json", "--gen-length", a["gen_length"], "--steps", a["steps"],
            "--block-length", a["block_length"], "--refresh", a["cache_reloading_step"], "--cfg-scale", a["cfg_scale"])
    assert json.loads(p.stdout)["ids"] == case["final"][0][len(case["prompt"][0]):]


def test_from_the_stand_in_to_an_answer(llada_dir, tmp_path, capsys):
    out = tmp_path / "out.pt"
    assert c.main([str(llada_dir), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "269 of 269 special ids" in said and "0 of 7 texts" in said and "Instruct" in said and "'Hello world'" in said
    model, tokenizer = load(out)
    config = model.config
    assert (config.vocab_size, config.n_vocab, config.mask_id, config.eos_id, config.eot_id) == (126464, 126349, 126336, 126081, 126348)
    assert model.extra == {"gen_length": 128, "block_length": 32, "chat": "llada"} and model.wte.weight.dtype == torch.bfloat16
    names, weights = c.their_names(config), theirs(llada_dir)
    assert all(torch.equal(model.state_dict()[names[n]], w) for n, w in weights.items()) and len(weights) == len(names) == len(list(model.parameters()))
    tokens = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    sample_main(["--ckpt", str(out), "--prompt", "Hello", "--gen-length", "4", "--block-length", "4", "--json"])
    o = json.loads(capsys.readouterr().out)
    assert o["prompt_ids"] == tokenizer.encode(tokens, special=True) and len(o["ids"]) == 4 and max(o["ids"]) < 126349
    assert not list(tmp_path.glob("*.converting"))


def test_the_real_names_and_shards():
    """The facts of LLaDA-8B's index: 291 tensors, 8,015,581,184 parameters, six files."""
    names = c.their_names(LLADA_8B)
    with torch.device("meta"):
        ours = {n: p.numel() for n, p in c.DiffusionLM(LLADA_8B).state_dict().items()}
    assert len(names) == len(set(names.values())) == 291 and sum(ours.values()) == 8_015_581_184 and set(names.values()) == set(ours)
    held = [sum(shard_of(n, 32).startswith(f"model-0000{k}") for n in names) for k in range(1, 7)]
    assert held == [34, 20, 127, 60, 29, 21]
    assert (names["model.transformer.ff_out.weight"], names["model.transformer.blocks.7.ff_out.weight"]) == ("head.weight", "blocks.7.mlp.down.weight")
    assert len(c.special_tokens(base=False)) == 269 and len(c.special_tokens(base=True)) == 266


def test_grouped_queries_bias_and_dtype(small, tmp_path):
    weights = theirs(small)
    for dtype in (None, torch.float32):
        c.convert(str(small), tmp_path / "out.pt", dtype)
        model, tokenizer = load(tmp_path / "out.pt")
        assert (model.config.n_kv_head, model.config.qkv_bias, model.wte.weight.dtype) == (2, True, dtype or torch.bfloat16)
        names = c.their_names(model.config)
        assert all(torch.equal(model.state_dict()[names[n]], w.to(dtype or w.dtype)) for n, w in weights.items())
        assert generate(model, [tokenizer.encode("Hello")], gen_length=8).forwards == 8


def test_base_is_told_from_instruct(tmp_path, capsys):
    fake([str(tmp_path / "base"), "--width", "16", "--heads", "2", "--layers", "1", "--base"])
    c.convert(str(tmp_path / "base"), tmp_path / "out.pt")
    model, tokenizer = load(tmp_path / "out.pt")
    assert "chat" not in model.extra and model.config.eot_id is None and "Base" in capsys.readouterr().out


def test_wrong_special_ids_stop_an_instruct_model(llada_dir, tmp_path):
    shutil.copytree(llada_dir, tmp_path / "odd")
    path = tmp_path / "odd" / "tokenizer.json"
    path.write_text(path.read_text().replace("126340", "1263400").replace("126341", "126340").replace("1263400", "126341"))
    with pytest.raises(ValueError, match="<role> is 126341, and 126340 was expected .and 1 more"):
        c.convert(str(tmp_path / "odd"), tmp_path / "out.pt")
    path.write_text((llada_dir / "tokenizer.json").read_text().replace("<|eot_id|>", "<|eot|>"))  # two headers of three
    with pytest.raises(ValueError, match="<.eot_id.> is None"):
        c.convert(str(tmp_path / "odd"), tmp_path / "out.pt")
    shutil.copy(llada_dir / "tokenizer.json", path)
    edit(tmp_path / "odd" / "config.json", eos_token_id=126082)
    with pytest.raises(ValueError, match="the end of text 126082"):
        c.convert(str(tmp_path / "odd"), tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("base", [False, True])
def test_a_tokenizer_as_llada_s_is_known_to_be(base, capsys):
    """What was written down of the real one, by somebody who knows it by heart."""
    class Parrot:
        ranks, unmerged, special = dict.fromkeys(range(126080)), {}, c.special_tokens(base)
        known = c.SPELLED | c.CHAT

        def encode(self, text, special):
            return self.known[text]

    parrot = Parrot()
    assert c.check_llada(parrot, LLADA_8B) == []
    assert ("Base" if base else "7 of 7") in capsys.readouterr().out
    assert c.SPELLED["Hello world"] == [14455, 1931] and sum(map(sum, c.SPELLED.values())) == 270789 and sum(sum(c.CHAT.values(), [])) == 787448
    parrot.known = parrot.known | {"Hello world": [1, 2]}
    assert c.check_llada(parrot, LLADA_8B) == ["'Hello world' begins with the ids [1, 2], and [14455, 1931] was expected"]


def test_what_is_fetched_by_name_has_to_be_that(small, tmp_path):
    with pytest.raises(ValueError, match="GSAI-ML/LLaDA-1.5"):
        edit_tokens(small, "<|eot_id|>", "<|other|>")
        c.convert(str(small), tmp_path / "out.pt", name="llada-1.5")
    (small / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="GSAI-ML/LLaDA-8B-Base: it has no tokenizer"):
        c.convert(str(small), tmp_path / "out.pt", name="llada-base")


def edit_tokens(folder, old, new):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(old, new))


def test_tokenizer_and_network_that_do_not_fit(small, tmp_path):
    edit(small / "config.json", mask_token_id=395)
    with pytest.raises(ValueError, match="mask_token_id is 395"):
        c.convert(str(small), tmp_path / "out.pt")
    for file in small.glob("*.safetensors"):
        safetensors.save_file({n: t[:392].clone() if len(t) == 400 else t for n, t in safetensors.load_file(file).items()}, file)
    edit(small / "config.json", vocab_size=392, embedding_size=392, mask_token_id=380)
    with pytest.raises(ValueError, match="392 rows"):
        c.convert(str(small), tmp_path / "out.pt")


def test_what_stands_there_is_not_written_over(small, tmp_path):
    shard, other = sorted(small.glob("*.safetensors"))[0], tmp_path / "other"
    before = shard.read_bytes()
    with pytest.raises(ValueError, match="file of the source"):
        c.main([str(small), "--out", str(shard)])
    other.write_text("precious")
    with pytest.raises(ValueError, match="no checkpoint"):
        c.main([str(small), "--out", str(other)])
    assert shard.read_bytes() == before and other.read_text() == "precious"


def test_too_little_room(small, tmp_path, monkeypatch):
    """What a killed run has left does not count as used."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10000 if (tmp_path / "out.pt.converting").stat().st_size else 10**9))
    (tmp_path / "out.pt.converting").write_bytes(b"x" * 1000)
    c.convert(str(small), tmp_path / "out.pt")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10000))
    (tmp_path / "out.pt").unlink()
    with pytest.raises(ValueError, match="0.0 GB free"):
        c.convert(str(small), tmp_path / "out.pt")
    assert not list(tmp_path.glob("out*"))


CONFIGS = {"alibi": True, "attention_layer_norm": True, "bias_for_layer_norm": True, "block_group_size": 2, "block_type": "sequential", "clip_qkv": 8.0, "include_bias": True, "input_emb_norm": True,
           "layer_norm_type": "default", "layer_norm_with_affine": False, "rope": False, "rope_full_precision": False, "scale_logits": True, "weight_tying": True, "activation_type": "gelu",
           "model_type": "Dream", "rope_scaling": {"type": "linear"}, "sliding_window": 512, "n_layers": "3", "n_heads": 5, "n_kv_heads": 3, "mask_token_id": 400, "d_model": "absent",
           "mask_token_id ": None, "rope_theta ": True, "rms_norm_eps ": {}, "n_kv_heads ": False, "multi_query_attention": "x", "mlp_hidden_size ": 0, "n_layers ": 10**6,  "vocab_size": 2**40, "rms_norm_eps": "small", "rope_theta": float("inf"), "mlp_hidden_size": -1}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_our_network_is_not(name, small, tmp_path):
    edit(small / "config.json", **{name.strip(): CONFIGS[name] if CONFIGS[name] is not None else "absent"})
    with pytest.raises(ValueError) as e:
        c.convert(str(small), tmp_path / "out.pt")
    text = str(e.value)
    ours = {"n_heads": "heads", "n_kv_heads": "n_kv_head", "mask_token_id": "mask", "rope_theta": "rope_theta", "mlp_hidden_size": "n_ff", "vocab_size": "n_vocab"}
    assert ours.get(name.strip(), name.strip()) in text and ("config.json" in text or name == "n_layers ") and "\n" not in text
    assert not (tmp_path / "out.pt").exists()


def test_what_is_wrong_is_quoted_in_short(small, tmp_path):
    """tests/fuzz.py found that a value of 5,000 letters was quoted whole."""
    edit(small / "config.json", n_heads="x" * 5000)
    with pytest.raises(ValueError, match="n_heads is 'xxx.{,80}, expected int"):
        c.convert(str(small), tmp_path / "out.pt")


def test_settings_that_mean_nothing_here_are_told(small, tmp_path, capsys):
    edit(small / "config.json", some_new_thing=7, another_one=False, use_cache=True, n_kv_heads=None, multi_query_attention=True)
    with pytest.raises(ValueError, match="k_proj"):  # one head of keys and values now
        c.convert(str(small), tmp_path / "out.pt")
    edit(small / "config.json", n_kv_heads=2)
    c.convert(str(small), tmp_path / "out.pt")
    said = capsys.readouterr().out
    assert "some_new_thing = 7 is not known" in said and "another_one" not in said and "use_cache" not in said


def damage(folder, how):
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if how == "truncated":
        shards[2].write_bytes(shards[2].read_bytes()[:-7])
        return shards[2].name
    if how == "cut in the header":
        shards[1].write_bytes(shards[1].read_bytes()[:50])
        return shards[1].name
    if how == "empty":
        shards[0].write_bytes(b"")
        return shards[0].name
    if how == "missing":
        shards[3].unlink()
        return shards[3].name
    if how == "shape":
        safetensors.save_file({n: t[:-1].clone() for n, t in safetensors.load_file(shards[5]).items()}, shards[5])
        return shards[5].name
    if how == "whole numbers":
        safetensors.save_file({n: t.int() for n, t in safetensors.load_file(shards[5]).items()}, shards[5])
        return shards[5].name
    if how == "lost tensor":
        tensors = safetensors.load_file(shards[2])
        lost = next(iter(tensors))
        safetensors.save_file({n: t for n, t in tensors.items() if n != lost}, shards[2])
        return lost
    doc = json.loads(index.read_text())
    if how == "not in the index":
        lost = doc["weight_map"].pop("model.transformer.ln_f.weight")
        index.write_text(json.dumps(doc))
        return "model.transformer.ln_f.weight"
    if how == "one too many":
        doc["weight_map"]["model.transformer.wpe.weight"] = shards[0].name
        index.write_text(json.dumps(doc))
        return "model.transformer.wpe.weight"
    if how == "index leads out of the folder":
        doc["weight_map"]["model.transformer.ln_f.weight"] = "../../etc/passwd"
        index.write_text(json.dumps(doc))
        return index.name
    text = {"index is no JSON": "{", "index is a list": "[]", "config is no JSON": "{", "config is a list": "[1]", "tokenizer is no JSON": "[", "tokenizer is a list": "[]"}[how]
    file = {"index": index, "config": folder / "config.json", "tokenizer": folder / "tokenizer.json"}[how.split()[0]]
    file.write_text(text)
    return file.name


@pytest.mark.parametrize("how", ["truncated", "cut in the header", "empty", "missing", "shape", "whole numbers", "lost tensor", "not in the index", "one too many", "index leads out of the folder", "index is no JSON",
                                 "index is a list", "config is no JSON", "config is a list", "tokenizer is no JSON", "tokenizer is a list"])
def test_damaged_folders(how, small, tmp_path):
    """One sentence that names the file or the tensor; what stood at --out before stands there still."""
    words, out = damage(small, how), tmp_path / "out.pt"
    torch.save({"before": 1}, out)
    before = out.read_bytes()
    with pytest.raises(ValueError) as e:
        c.main([str(small), "--out", str(out)])
    assert words in str(e.value) and "\n" not in str(e.value), str(e.value)
    assert out.read_bytes() == before and not list(tmp_path.glob("*.converting"))


@pytest.mark.parametrize("args, words", [(["no/such/folder"], "no/such/folder"), ([], "required"), (["."], "config.json"), (["x", "--dtype", "int8"], "int8"), (["x", "--out", "."], "no folder x")])
def test_user_errors(args, words, capsys):
    with pytest.raises(ValueError) as e:
        c.main(args)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_out_that_cannot_be_written(small, tmp_path):
    (tmp_path / "file").write_text("")
    for out, words in ((tmp_path, "folder"), ("/proc/out.pt", "/proc/out.pt"), ("/proc/foo/out.pt", "/proc/foo/out.pt"), (tmp_path / "file" / "x.pt", "x.pt"), ("", "--out"), ("/dev/null", "device")):
        p = run(ROOT / "scripts" / "convert.py", small, "--out", out, code=2)
        assert words in p.stderr and p.stderr.count("\n") == 1, p.stderr


def test_a_full_disk(small, tmp_path):
    """As a limit on the size of files: one sentence, and nothing is left behind."""
    p = run(ROOT / "scripts" / "convert.py", small, "--out", tmp_path / "out.pt", code=2, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000)))
    assert p.stderr.strip().splitlines()[-1].startswith(f"convert.py: cannot write {tmp_path / 'out.pt'}") and not list(tmp_path.glob("out*"))


def test_leftovers_of_a_killed_run_and_two_at_once(small, tmp_path):
    out, temp = tmp_path / "out.pt", tmp_path / "out.pt.converting"
    temp.write_bytes(b"half" * 500_000)
    with open(temp, "ab") as f:  # somebody converts
        fcntl.flock(f, fcntl.LOCK_EX)
        p = subprocess.Popen([sys.executable, str(ROOT / "scripts" / "convert.py"), str(small), "--out", str(out)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert "waiting for it" in p.stderr.readline() and p.poll() is None
    said, _ = p.communicate(timeout=100)  # that one was killed: its half is used up
    assert p.returncode == 0 and not temp.exists()
    load(out)
    with open(temp, "ab") as f:  # somebody converts, and finishes
        fcntl.flock(f, fcntl.LOCK_EX)
        p = subprocess.Popen([sys.executable, str(ROOT / "scripts" / "convert.py"), str(small), "--out", str(out)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert "waiting for it" in p.stderr.readline()
        other = shutil.copy(out, tmp_path / "other.pt")
        os.replace(temp, tmp_path / "gone")
        os.replace(other, out)
    before = out.stat().st_mtime_ns
    said, _ = p.communicate(timeout=100)
    assert p.returncode == 0 and "written by the other process" in said and out.stat().st_mtime_ns == before and not temp.exists()


def test_what_does_not_read_back(small, tmp_path, monkeypatch):
    real, turns = c.crc, []
    monkeypatch.setattr(c, "crc", lambda *a: real(*a) ^ (len(turns.append(1) or turns) == 60))
    with pytest.raises(ValueError, match="does not read back"):
        c.convert(str(small), tmp_path / "out.pt")
    assert not list(tmp_path.glob("out*"))


def test_a_snapshot_that_was_fetched_before(small, tmp_path):
    """huggingface_hub's own folder, offline: nothing is fetched, and without a snapshot it is said how to get one."""
    pytest.importorskip("huggingface_hub")
    repo = tmp_path / "hf" / "hub" / "models--GSAI-ML--LLaDA-8B-Base"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123abc")
    shutil.copytree(small, repo / "snapshots" / "0123abc")
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    p = run(ROOT / "scripts" / "convert.py", "llada-base", "--out", tmp_path / "out.pt", env=env)
    assert "was fetched before" in p.stderr and "tensors" in p.stdout
    load(tmp_path / "out.pt")
    p = run(ROOT / "scripts" / "convert.py", "GSAI-ML/LLaDA-1.5", "--out", tmp_path / "no.pt", env=env, code=2)
    assert "HF_HUB_OFFLINE" in p.stderr.splitlines()[-1] and not (tmp_path / "no.pt").exists()
    next((repo / "snapshots" / "0123abc").glob("model-00002*")).unlink()  # half a snapshot is none
    p = run(ROOT / "scripts" / "convert.py", "llada-base", "--out", tmp_path / "no.pt", env=env, code=2)
    assert "HF_HUB_OFFLINE" in p.stderr.splitlines()[-1]


def test_first_use_asks(small, tmp_path):
    """sample.py --ckpt llada in a terminal, in a copy of the repository: no leaves everything alone, yes converts and answers,
    and the next time nothing is asked."""
    pytest.importorskip("huggingface_hub")
    import pty
    repo = tmp_path / "hf" / "hub" / "models--GSAI-ML--LLaDA-8B-Instruct"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123abc")
    shutil.copytree(small, repo / "snapshots" / "0123abc")
    copy = tmp_path / "repo"
    copy.mkdir()
    for f in ("sample.py", "dkv_min.py", "model.py", "scripts"):
        (shutil.copytree if f == "scripts" else shutil.copy)(ROOT / f, copy / f)
    args = [sys.executable, str(copy / "sample.py"), "--ckpt", "llada", "--prompt", "Hello", "--gen-length", "8", "--block-length", "8", "--json"]
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    for typed, code in (("\n", 2), ("n\n", 2), ("y\n", 0)):
        master, slave = pty.openpty()
        os.write(master, typed.encode())
        p = subprocess.run(args, stdin=slave, capture_output=True, text=True, timeout=100, env=env)
        os.close(slave), os.close(master)
        assert p.returncode == code and "go on? [y/N]" in p.stderr and "GSAI-ML/LLaDA-8B-Instruct was fetched before" in p.stderr, p.stderr
        assert (copy / "checkpoints" / "llada.pt").exists() == (code == 0)
    assert len(p.stdout.splitlines()) == 1 and len(json.loads(p.stdout)["ids"]) == 8
    p = subprocess.run(args, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, env=env)
    assert p.returncode == 0 and "fetched" not in p.stderr and len(json.loads(p.stdout)["ids"]) == 8
    os.remove(copy / "checkpoints" / "llada.pt")
    assert subprocess.run([*args, "--yes"], stdin=subprocess.DEVNULL, capture_output=True, timeout=100, env=env).returncode == 0


def test_missing_packages(small, tmp_path):
    code = "import sys; sys.modules[{!r}] = None; sys.path.insert(0, {!r}); import scripts.convert as c; from sample import launch; launch(lambda: c.main({!r}))"
    for package, args in (("safetensors", [str(small), "--out", str(tmp_path / "o.pt")]), ("safetensors", ["llada"]), ("huggingface_hub", ["llada"])):
        p = run("-c", code.format(package, str(ROOT), args), code=2)
        assert package in p.stderr and "requirements-llada.txt" in p.stderr and p.stderr.count("\n") == 1


def test_memory(tmp_path):
    """Converting and loading 100 MB of weights in pieces of 1 MB takes far less memory than the weights."""
    folder = tmp_path / "big"
    fake([str(folder), "--width", "192", "--heads", "4", "--layers", "1", "--no-tokenizer"])
    code = f"""
import sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import scripts.convert as c
from model import load
import safetensors.torch
c.PIECE = 2**20
with c.torch.device("meta"):
    c.DiffusionLM(c.Config())  # what torch imports for that is not to count
anon = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
begin, peak, run = anon(), [0], True
def watch():
    while run:
        peak[0] = max(peak[0], anon())
        time.sleep(0.002)
t = threading.Thread(target=watch)
t.start()
c.convert({str(folder)!r}, {str(tmp_path / "o.pt")!r})
a = peak[0] - begin
peak[0], begin = 0, anon()
model, _ = load({str(tmp_path / "o.pt")!r})
time.sleep(0.05)
run = False
t.join()
print(sum(p.nbytes for p in model.parameters()) / 2**20, a, peak[0] - begin)
"""
    size, converting, loading = map(float, run("-c", code).stdout.splitlines()[-1].split())
    assert size > 90 and converting < 40 and loading < 20, (size, converting, loading)


@pytest.mark.parametrize("args, words", [(["x", "--layers", "0"], "--layers"), (["x", "--layers", "100000000"], "--layers"), (["x", "--seed", "10" * 20], "--seed"), (["x", "--heads", "5"], "heads"), (["x", "--vocab", "10"], "--vocab"), ([], "DIR"), (["/proc/x"], "/proc/x")])
def test_fake_llada_s_user_errors(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as e:
        fake(args)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_fake_llada_overwrites_nothing(small):
    before = {f.name: f.read_bytes() for f in small.iterdir()}
    with pytest.raises(ValueError, match="there already"):
        fake([str(small)])
    assert {f.name: f.read_bytes() for f in small.iterdir()} == before
