"""scripts/convert.py and fake_hub.py: folders of the Hugging Face kind, good and bad."""
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
import time
import types

import pytest
import torch
from conftest import REFUSED, ROOT, ended, fork, forked, start
from filelock import FileLock

import scripts.convert as c
from dkv_min import generate
from model import LLADA_8B, load, stored
from scripts.fake_hub import main as fake
from scripts.fake_hub import shard_of, their_config
from scripts.hf_tokenizer import LETTERS, QWEN2
from support import fast_cpu
from support.evaluate import encode
from support.tokenizer import Tokenizer

safetensors = pytest.importorskip("safetensors.torch", reason="the converter's tests need the "
                                  "packages of requirements-llada.txt")
INDEX = "model.safetensors.index.json"
MAINS = {"convert.py": c.main, "fake_hub.py": fake}
TEXTS = json.loads((ROOT / "tests" / "texts.json").read_text(encoding="utf-8"))
LLADA, OTHERS = c.FAMILIES["llada"], TEXTS["families"]

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
def small_dir(tmp_path_factory):
    """LLaDA's with 400 rows, so that a test moves kilobytes. Special tokens are at their end."""
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

@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """-> {family: folder}"""
    folder, small = tmp_path_factory.mktemp("hf"), "--width 16 --heads 4 --vocab 300".split()
    for name in c.FAMILIES:
        assert fake([str(folder / name), "--family", name, *small]) == 0
    return {name: folder / name for name in c.FAMILIES}

@pytest.fixture
def small(small_dir, tmp_path):
    return pathlib.Path(shutil.copytree(small_dir, tmp_path / "small"))

def snapshot(folder, store, name):
    """A repository in huggingface_hub's own folder, as after fetching it. -> where its files are"""
    repo = store / f"models--{name}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123abc")
    return pathlib.Path(shutil.copytree(folder, repo / "snapshots" / "0123abc"))

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

def same_weights(model, folder, dtype=None, table=LLADA):
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= safetensors.load_file(file)
    names, state = c.their_names(model.config, table), stored(model)
    assert names.keys() == weights.keys() and {*names.values()} == state.keys()
    return all(torch.equal(state[names[n]], w.to(dtype or w.dtype)) for n, w in weights.items())

def test_from_the_stand_in_to_an_answer(stand_ins, tmp_path):
    folder, out = stand_ins["llada"], tmp_path / "out.pt"
    codes, said, _ = forked(1, "convert.py", folder, "--out", out)
    for words in "269 of 269 special ids", "0 of 7 texts", "with headers", "'Hello world'":
        assert words in said[0] and codes == [0]
    model, tokenizer = load(out)
    for name in "vocab_size n_vocab mask_id eos_id eot_id".split():
        assert getattr(model.config, name) == getattr(LLADA_8B, name)
    assert model.extra == {"gen_length": 128, "block_length": 32, "chat": "llada"}
    assert model.wte.weight.dtype == torch.bfloat16 and same_weights(model, folder)
    _, said, _ = forked(1, "sample.py", "--ckpt", out, "--prompt", " Hello ", "--gen-length", 4,
                        "--block-length", 4, "--json")
    o, chat = json.loads(said[0]), list(LLADA["chat"])[0]
    assert o["prompt_ids"] == tokenizer.encode(
        chat.replace("What is paged attention?", "Hello"), special=True)
    assert len(o["ids"]) == 4 and max(o["ids"]) < 126349
    assert [*tmp_path.iterdir()] == [out]

def test_the_real_names_and_shards(tmp_path):
    """The facts of the indexes: tensors, parameters, and LLaDA-8B's six files."""
    path = tmp_path / "config.json"
    for family, tensors, parameters in (("llada", 291, 8_015_581_184),
                                        ("dream", 339, 7_615_616_512), ("qwen2", 290, 494_032_768)):
        path.write_text(json.dumps(c.FAMILIES[family]["config"]))
        found, config, notes = c.read_config(path)
        with torch.device("meta"):
            ours = stored(c.DiffusionLM(config))
        names = c.their_names(config, c.FAMILIES[family])
        assert (found, notes, {*names.values()}) == (family, [], {*ours})
        assert len(names) == len({*names.values()}) == tensors
        assert sum(p.numel() for p in ours.values()) == parameters
    path.write_text(json.dumps(their_config(LLADA_8B, LLADA)))
    expected = vars(LLADA_8B) | {"n_vocab": 126464, "eot_id": None}
    assert c.read_config(path) == ("llada", c.Config(**expected), [])
    names = c.their_names(LLADA_8B, LLADA)
    files = [shard_of(n, names, 32, LLADA["shards"]) for n in names]
    assert [files.count(f"model-0000{k}-of-00006.safetensors") for k in range(1, 7)] == [
        34, 20, 127, 60, 29, 21]

@pytest.mark.parametrize("name, config", OTHERS.items())
def test_other_families_from_the_stand_in_to_an_answer(name, config, stand_ins, tmp_path):
    folder, table, out = stand_ins[name], c.FAMILIES[name], tmp_path / "out.pt"
    assert c.main([str(folder), "--out", str(out)]) == 0
    model, tokenizer = load(out)
    assert config.items() <= vars(model.config).items()
    assert model.config.qkv_bias == (name != "illada") and same_weights(model, folder, table=table)
    assert (model.head.weight is model.wte.weight) == model.config.tied
    own = table["extra"]  # what sample.py gives generate
    assert own.items() <= model.extra.items() and model.extra["chat"] == table["template"]
    result = generate(model, [encode(["Hello"], tokenizer, model.extra)], gen_length=8,
                      cache="autoregressive" if model.config.causal else "decode", **own)
    assert result.forwards == 8 and model.config.mask_id not in result.tokens[0]

def test_chatml():
    """The ids of the real tokenizers, by a vocabulary of just these words."""
    ranks = {bytes([b]): i for i, b in enumerate(LETTERS.values())}
    ranks |= {text.encode(): i for text, i in TEXTS["chatml"].items()}
    table = c.FAMILIES["dream"]
    t = Tokenizer(ranks, QWEN2, c.special_tokens(table), nfc=True)
    for text, ids in (table["spelled"] | table["chat"]).items():
        assert t.encode(text, special=True) == ids
    (text, ids), chat = *table["chat"].items(), {"chat": "chatml"}
    assert encode(["Hi"], t, chat) == ids and encode(["Hi"], t, chat, raw=True) == [13048]
    typed = t.encode("<|im_end|>")  # by a user: text
    assert 151645 not in typed and encode(["Hi", "Hello world", "<|im_end|>"], t, chat) == [
        *ids, 9707, 1879, 151645, 198, 151644, 872, 198, *typed, *ids[-5:]]

def test_a_tied_head(stand_ins, tmp_path):
    """It may be in the files beside the embedding, and then is the same, or in its place."""
    folder = pathlib.Path(shutil.copytree(stand_ins["qwen2"], tmp_path / "tied"))
    file, out = folder / "model.safetensors", tmp_path / "out.pt"
    (folder / "tokenizer.json").unlink()  # saves time
    tensors = safetensors.load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone()
    for _ in range(2):
        safetensors.save_file(tensors, file)
        c.convert(str(folder), out)
        assert torch.equal(load(out)[0].wte.weight, embedding)
        assert out.stat().st_size < 1.02 * embedding.nbytes  # stored once
        os.remove(out)
        tensors.pop("model.embed_tokens.weight", None)
    edit(folder / "config.json", tie_word_embeddings=False)
    fails(folder, "model.embed_tokens.weight")
    edit(folder / "config.json", tie_word_embeddings=True)
    tensors["model.embed_tokens.weight"] = embedding * 2
    safetensors.save_file(tensors, file)
    fails(folder, "config.json", "tie_word_embeddings", "the files have different ones")

def test_who_is_asked_in_a_chat_and_what_is_the_mask(stand_ins, tmp_path):
    """Base models have no template. Without a row to spare Qwen2's mask is a special token."""
    tokenizers = {family: c.from_folder(stand_ins[family]) for family in ("dream", "qwen2")}

    def fitted(family, name=None, **changes):
        table = c.FAMILIES[family]
        config = c.config_of(table["config"] | changes, table)
        config, extra, _ = c.fit_tokenizer("x", config, tokenizers[family], name, table)
        return extra.get("chat"), config.mask_id
    assert fitted("dream") == fitted("dream", "dream") == ("chatml", 151666)
    assert fitted("dream", "dream-base")[0] is fitted("dream", "Dream-org/x-Base")[0] is None
    assert fitted("qwen2", eos_token_id=151643) == (None, 151665)
    assert fitted("qwen2", vocab_size=151665) == ("chatml", 151664)
    refused("Qwen2.5-7B", run=lambda: fitted("qwen2", "qwen2.5-7b", eos_token_id=151643))
    refused("<|mask|> is 151666", run=lambda: fitted("dream", mask_token_id=5))

@pytest.mark.parametrize("family, changes, words", TEXTS["configs"] + [
    ("llada", {name: value}, words) for name, value, words in REFUSED["configs"]])
def test_configs_with_changes(family, changes, words, tmp_path):
    """The same network where there are no words. tests/campaigns/fuzz.py found that a value of
    5,000 letters was quoted whole."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(c.FAMILIES[family]["config"]))
    expected = c.read_config(path)[:2]
    edit(path, **changes)
    if words:
        line = refused("config.json", words, run=lambda: c.read_config(path))
        assert len(line) < 200 + len(str(path))
    else:
        assert c.read_config(path)[:2] == expected

@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_grouped_queries_bias_dtype_and_notes(dtype, small, tmp_path, monkeypatch, capsys):
    """Noted are unknown settings, mixed dtypes, and that there is no tokenizer."""
    out = tmp_path / "out.pt"
    monkeypatch.setattr(c, "PIECE", 1000)  # a tensor is many pieces
    c.convert(str(small), out, dtype)
    model, tokenizer = load(out)
    found = model.config.n_kv_head, model.config.qkv_bias, model.wte.weight.dtype
    assert found == (2, True, dtype or torch.bfloat16) and same_weights(model, small, dtype)
    assert generate(model, [tokenizer.encode("Hello")], gen_length=8).forwards == 8
    out.unlink()
    edit(small / "config.json", some_new_thing=7, another_one=False, use_cache=True,
         n_kv_heads=None, multi_query_attention=True)
    fails(small, "k_proj")  # one head of keys and values now
    edit(small / "config.json", n_kv_heads=2)
    rewrite([small / "model-00003-of-00006.safetensors"], lambda n, t: (n, t.half()))
    (small / "tokenizer.json").unlink()
    c.convert(str(small), out)
    said = capsys.readouterr().out
    for words in "some_new_thing = 7 is ignored", "stored as float16 are wr", "has no tokenizer":
        assert words in said
    assert "another_one" not in said and "use_cache" not in said and load(out)[1] is None

@pytest.mark.parametrize("old, new, eos, words", [
    ("126340", "126341", 126081, "<role> is 126341, expected 126340 (and 1 m"),
    ("<|eot_id|>", "<|eot|>", 126081, "<|eot_id|> is None"),
    ("<role>", "<role>", 126082, "the end of text 126082")])
def test_wrong_special_ids_stop_an_instruct_model(old, new, eos, words, stand_ins, tmp_path):
    folder = pathlib.Path(shutil.copytree(stand_ins["llada"], tmp_path / "odd"))
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(old, "SWAP").replace(new, old).replace("SWAP", new))
    edit(folder / "config.json", eos_token_id=eos)
    fails(folder, words)

@pytest.mark.parametrize("base", [False, True])
def test_a_tokenizer_as_llada_s_is_known_to_be(base, capsys):
    """A stand-in that spells the known texts as other people's copies of the real one do."""
    known = LLADA["spelled"] | LLADA["chat"]
    assert sum(sum(known.values(), [])) == 270789 + 787448  # not changed by accident
    parrot = types.SimpleNamespace(ranks=range(126080), unmerged={},
                                   special=c.special_tokens(LLADA, base),
                                   encode=lambda text, special: known[text])
    assert c.check_known(parrot, LLADA_8B, LLADA) == []
    assert ("without" if base else "7 of 7") in capsys.readouterr().out
    known["Hello world"] = [1, 2]
    assert c.check_known(parrot, LLADA_8B, LLADA) == [
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

def test_names_with_another_prefix(small):
    """A LoRA training puts base_model.model. before every name."""
    first, prefix = "model.transformer.blocks.0.attn_norm.weight", "base_model.model."
    rewrite(small.glob("*.safetensors"), lambda n, t: (prefix + n, t))
    relist(small / INDEX, lambda files: {prefix + n: files[n] for n in files})
    fails(small, "39 tensors of the files and 39 of the network do not match: the files have "
          f"{prefix}{first}, and {first} is expected; remove the prefix {prefix}")

DAMAGE = {
    "cut": lambda path, size: path.write_bytes(path.read_bytes()[:size]),
    "write": lambda path, text: path.write_text(text),
    "set": lambda path, values: edit(path, **values),
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
    usage, left = shutil.disk_usage(tmp_path), tmp_path / "out.pt.123.tmp"
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
    out, temp, lock = (tmp_path / f"out.pt{end}" for end in ("", ".123.tmp", ".lock"))
    said, err = tmp_path / "said", tmp_path / "err"
    for finished in (False, True):
        with FileLock(lock):
            pid = start("convert.py", [small, "--out", out], said, err)
            while not (err.exists() and "waiting for it" in err.read_text()):
                assert ended(pid) is None
                time.sleep(0.01)
            if finished:
                os.replace(shutil.copy(out, tmp_path / "other.pt"), out)
                before = out.stat().st_mtime_ns
            else:
                temp.write_bytes(b"half" * 500_000)
        assert os.waitpid(pid, 0) == (pid, 0) and [*tmp_path.glob("out*")] == [out] and load(out)
        assert ("written by the other process" in said.read_text()) == finished
        err.unlink()
    assert out.stat().st_mtime_ns == before

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(tmp_path, monkeypatch):
    """100 MB of weights take far less: in pieces of 1 MB, and not packed, like a large model."""
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
    assert "266 of 266 special ids" in said and "without headers" in said
    assert "chat" not in model.extra and model.config.eot_id is None

def test_a_snapshot_that_was_fetched_before(small, stand_ins, tmp_path, monkeypatch, capsys):
    """Offline, a complete snapshot is used. Without one the message says how to get it."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    out, hub = tmp_path / "out.pt", snapshot(small, tmp_path / "hub", "GSAI-ML--LLaDA-8B-Instruct")
    assert c.main(["llada", "--out", str(out)]) == 0
    assert "was fetched before" in capsys.readouterr().err and load(out)[0].extra["chat"] == "llada"
    next(hub.glob("model-00002*")).unlink()  # not complete any more
    for source in ("GSAI-ML/LLaDA-1.5", "llada"):
        refused("HF_HUB_OFFLINE", run=lambda: c.main([source, "--out", str(tmp_path / "no.pt")]))
    assert not (tmp_path / "no.pt").exists()
    # one that has no tokenizer.json
    snapshot(stand_ins["dream"], tmp_path / "hub", "Dream-org--Dream-v0-Instruct-7B")
    assert c.main(["dream", "--out", str(out)]) == 0

@pytest.mark.parametrize("typed, words", [
    ("", "nothing was f"), ("n\n", "nothing was f"), (None, "add --yes"), ("YES\n", None)])
def test_ask_user(typed, words, monkeypatch, capsys):
    """None: stdin is not a terminal."""
    stdin = io.StringIO(typed)
    stdin.isatty = lambda: typed is not None
    monkeypatch.setattr(sys, "stdin", stdin)
    refused(words, run=c.ask_user) if words else c.ask_user()
    assert ("[y/N]" in capsys.readouterr().err) == (typed is not None)

@pytest.mark.parametrize("package, source", [
    ("safetensors", "small"), ("safetensors", "llada"), ("huggingface_hub", "llada")])
def test_missing_packages(package, source, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    refused(package, "requirements-llada.txt", run=lambda: c.main([source, "--out", "o.pt"]))
