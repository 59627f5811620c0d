"""The network, the loss, the checkpoint file, the tokenizer, and the packed products of a CPU."""
import copy
import functools
import io
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F
from conftest import ENDLESS, REFUSED, ROOT, random_model

import model as m
from dkv_min import KVCache, generate
from support import fast_cpu
from support.tokenizer import Tokenizer, build_tokenizer

assert_close = functools.partial(torch.testing.assert_close, rtol=0)

@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("the cat sat on the mat and the dog sat on the cat 1234 " * 20, 270)

def tokens(B=2, T=20):
    return torch.randint(3, 40, (B, T), generator=torch.Generator().manual_seed(1))

def loss_and_gradients(model, B=2, pad=None, amp=False):
    noise = m.diffusion_noise(torch.arange(20).expand(B, 20) < 8,
                              generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = m.diffusion_loss(model.requires_grad_(True), tokens(B), *noise, pad)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

@pytest.mark.parametrize("causal", [False, True])
def test_a_part_of_the_positions_is_a_part_of_the_whole(causal):
    """With unchanged tokens the cached K/V are right, in any order of positions."""
    model = random_model(shift=causal, causal=causal)
    x, cache, some = tokens(), KVCache(model, 2, 20), torch.tensor([[5, 2, 11], [0, 19, 4]])
    whole = model(x, cache=cache)
    expected = whole.take_along_dim(some[..., None], 1)
    assert_close(model(x, rows=some), expected, atol=1e-12)
    rows = torch.tensor([[2, 0], [1, 1]])
    assert_close(model(x.gather(1, some), some, cache), expected, atol=1e-12)
    assert_close(model(x.gather(1, some), some, cache, rows),
                 expected.take_along_dim(rows[..., None], 1), atol=1e-12)
    padded = torch.stack([torch.cat([x.new_zeros(n), x[i], x.new_zeros(5 - n)])
                          for i, n in enumerate((5, 2))])
    pad = torch.tensor([5, 2])
    found = model(padded, pad=pad, seen=torch.arange(25) < pad[:, None] + 20)
    assert found.isfinite().all()
    assert_close(torch.stack([found[0, 5:], found[1, 2:22]]), whole, atol=1e-12)
    for n in (1, 2, 19) if causal else ():  # each row is the last one of a shorter text
        assert_close(whole[:, n - 1], model(x[:, :n])[:, -1], atol=1e-12)

@pytest.mark.parametrize("pad", [None, torch.tensor([0, 4, 7])])
def test_training_in_bfloat16_on_a_cpu(pad):
    """Its attention is written out; loss and gradients are those of float32."""
    (loss, gradients), (loss_amp, gradients_amp) = (loss_and_gradients(
        random_model(dtype=torch.float32).train(), 3, pad, amp) for amp in (False, True))
    assert loss_amp == pytest.approx(loss, rel=0.02)
    assert torch.cosine_similarity(gradients, gradients_amp, dim=0) > 0.99

def test_noise_and_loss(model):
    g, frozen = torch.Generator().manual_seed(0), torch.arange(40).expand(4000, -1) < 10
    masked, weight = m.diffusion_noise(frozen, generator=g)
    assert not (masked & frozen).any()
    assert abs(masked[:, 10:].float().mean() - 0.5) < 0.02  # t is uniform
    # 1/p makes the masks an unbiased count of the free positions: a row's weights sum to 1
    assert abs((masked * weight).sum(1).mean() - 1) < 0.02
    x = tokens()
    masked, weight = m.diffusion_noise(torch.arange(20).expand(2, -1) < 6, generator=g)
    logp = F.log_softmax(model(torch.where(masked, 40, x)).float(), -1)
    # weight is 1/p over the 14 free positions of a row; the mean is over 2 rows
    by_hand = sum(-logp[b, q, x[b, q]] * weight[b, q] / 2 for b, q in masked.nonzero())
    assert abs(m.diffusion_loss(model, x, masked, weight) - by_hand) < 1e-4
    # of a causal model: each of the 14 tokens counts alike, and is told by the row before it
    causal, free = random_model(shift=True, causal=True), torch.arange(20).expand(2, -1) >= 6
    logp = F.log_softmax(causal(x).float(), -1)
    by_hand = sum(-logp[b, q - 1, x[b, q]] / 14 / 2 for b, q in free.nonzero())
    assert abs(m.causal_loss(causal, x, *m.every_token(~free)) - by_hand) < 1e-4

def packed_layers(model):
    return sum(getattr(layer, "packed", None) is not None for layer in model.modules())

@pytest.fixture
def packs(monkeypatch):
    """Packs small matrices too, on any CPU whose torch can."""
    monkeypatch.setattr(fast_cpu, "smallest_that_pays", lambda: 0)
    if not packed_layers(fast_cpu.pack(random_model(dtype=torch.float32))):
        pytest.skip("this torch has no packed products on this CPU")

@pytest.mark.parametrize("dtype, n_kv_head, bias", [
    (torch.float32, 4, False), (torch.float32, 2, True), (torch.bfloat16, 4, True)])
@pytest.mark.parametrize("n, m_rows", [(1, 1), (3, 2), (8, 8), (13, 9)])
def test_packed_products_are_the_same(packs, dtype, n_kv_head, bias, n, m_rows):
    """Logits and K/V, also where the number of rows is not a multiple of eight."""
    plain, found = random_model(dtype=dtype, n_kv_head=n_kv_head, qkv_bias=bias), []
    packed, g = fast_cpu.pack(copy.deepcopy(plain)), torch.Generator().manual_seed(n)
    pos, rows = (torch.stack([torch.randperm(most, generator=g)[:k] for _ in range(2)])
                 for most, k in ((20, n), (n, m_rows)))
    for model in (plain, packed, packed, packed):  # numbers of rows that come again are not padded
        cache = KVCache(model, 2, 20)
        found.append((model(tokens(), cache=cache),
                      model(1 + tokens().gather(1, pos), pos, cache, rows),
                      cache.k[:, :, :20], cache.v[:, :, :20]))  # not the spare column
    assert found[0][1].shape == (2, m_rows, 48)
    for a, b in [pair for other in found[1:] for pair in zip(found[0], other)]:
        most = 1e-5 if dtype == torch.float32 else 0.05
        assert_close(b, a, atol=a.abs().max().item() * most)

@pytest.mark.parametrize("change, left", [
    (lambda p: p.to(torch.float64), 0), (lambda p: p.half().float(), 0), (lambda p: p.train(), 0),
    (lambda p: p.load_state_dict(random_model(1).state_dict()), 0),
    (lambda p: p.load_state_dict(random_model(1).float().state_dict(), assign=True), 0),
    (lambda p: p.head.weight.neg_(), 21), (lambda p: p.eval(), 22),
    (lambda p: setattr(p.head.weight, "data", -p.head.weight), 21),
    (lambda p: setattr(p.head, "weight", torch.nn.Parameter(-p.head.weight)), 21)])
def test_packed_weights_that_change(packs, change, left):
    """Whatever is done to the weights, the products are those of the weights as they are."""
    plain = random_model(dtype=torch.float32)
    packed = fast_cpu.pack(copy.deepcopy(plain))
    with torch.no_grad():
        change(plain)
        change(packed)
        assert_close(packed(tokens()), plain(tokens()), atol=1e-4)
    assert packed_layers(packed) == left

def test_a_packed_model_is_a_model(packs, tmp_path):
    """It trains, is saved, copied and pickled as one that is not packed."""
    plain, a, b = random_model(dtype=torch.float32), tmp_path / "a.pt", tmp_path / "b.pt"
    generate(plain, [[3]], gen_length=4, cache="decode")
    m.save(a, plain)
    packed = m.load(a)[0]
    assert packed_layers(packed) == 22 and not packed_layers(plain)  # only load packs
    m.save(b, packed)
    assert a.read_bytes() == b.read_bytes()
    assert packed.state_dict().keys() == plain.state_dict().keys()
    with torch.inference_mode():
        for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert_close(twin(tokens()), plain(tokens()), atol=1e-4)
    # in eval mode: the packed copies are still there
    assert_close(loss_and_gradients(plain)[1], loss_and_gradients(packed)[1], atol=1e-5)

@pytest.mark.parametrize("dtype, name, value", [
    (torch.float64, "ops.mkldnn", torch.ops.mkldnn), (torch.float32, "ops.mkldnn", None),
    (torch.float32, "backends.mkldnn.is_available", lambda: False)])
def test_nothing_is_packed_where_it_cannot_be(packs, dtype, name, value, monkeypatch, tmp_path):
    plain = random_model(dtype=dtype)
    m.save(tmp_path / "a.pt", plain)
    monkeypatch.setattr("torch." + name, value)
    loaded = m.load(tmp_path / "a.pt")[0]
    assert not packed_layers(loaded) and torch.equal(loaded(tokens()), plain(tokens()))

@pytest.mark.parametrize("vendor, has, smallest, trains, picks", [
    ("AuthenticAMD", "avx512_bf16", 0, True, torch.float32), ("", "", None, False, torch.float32),
    ("GenuineIntel", "amx_bf16", 2**18, True, torch.bfloat16)])
def test_what_pays_on_which_cpu(monkeypatch, vendor, has, smallest, trains, picks):
    monkeypatch.setattr(fast_cpu, "open", lambda *_, **__: io.StringIO(f"vendor_id : {vendor}\n"),
                        raising=False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {has: True})
    assert fast_cpu.smallest_that_pays() == smallest
    assert smallest == 0 or not packed_layers(fast_cpu.pack(random_model(dtype=torch.float32)))
    assert fast_cpu.autocast_pays("cpu") == trains and fast_cpu.autocast_pays("cuda")
    assert fast_cpu.pick_dtype(2e7, torch.float16, "cpu") == picks
    assert fast_cpu.pick_dtype(2e6, torch.bfloat16, "cpu") == torch.float32
    assert fast_cpu.pick_dtype(2e9, torch.float16, "cpu") == torch.float16

def test_bfloat16_on_a_cpu_without_avx512():
    """oneDNN packs no bfloat16 there: the README's Python example once ended in a traceback."""
    script = """import dkv_min, model, support.fast_cpu
support.fast_cpu.smallest_that_pays = lambda: 0
tiny, _ = model.load("checkpoints/tiny.pt")
r = dkv_min.generate(tiny, [[3]], cache="decode", gen_length=8)
print(tiny.wte.weight.dtype, r.forwards)"""
    p = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                       env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert (p.stdout, p.returncode) == ("torch.bfloat16 8\n", 0), p.stderr

def test_tokenizer(tokenizer):
    eos, again = tokenizer.special["<|eos|>"], Tokenizer.from_state(tokenizer.state())
    for text in ("the cat 12", "  é\n\t中文 \U0001f600", "<|mask|> is text", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.special.values())
        assert again.encode(text) == ids
    assert len(tokenizer.encode("2048")) == 4  # digits one by one
    assert tokenizer.decode([eos, 10**9, -1, 255]) == "<|eos|>\ufffd"
    assert tokenizer.encode("a<|eos|>", special=True) == [*tokenizer.encode("a"), eos]
    # a pattern that gives up: a panic in tiktoken is not an Exception, and once was a traceback
    hard = Tokenizer(tokenizer.ranks, r"(?:(?=a)a+)+!|.", tokenizer.special)
    assert len(hard.encode("aa")) == 2
    with pytest.raises(ValueError, match="gives up"):
        hard.encode("a" * 60)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(tmp_path, tokenizer, dtype):
    model, path = random_model(dtype=dtype), tmp_path / "a.pt"
    model.extra = {"note": "kept"}
    m.save(path, model, tokenizer)
    again, t = m.load(path)
    assert (again.config, again.extra) == (model.config, model.extra)
    assert not again.training and again.wte.weight.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert t.state() == tokenizer.state()
    for wanted in (torch.float32, "auto"):
        other = m.load(path, dtype=wanted)[0]
        assert_close(other(tokens()), model.float()(tokens()), atol=1e-4)
    m.save(path, model)
    assert m.load(path)[1] is None
    assert list(tmp_path.iterdir()) == [path]  # no temporary file

def test_saving_fails_without_harm(tmp_path, monkeypatch):
    """On a full disk torch raises a RuntimeError of its own, which said: unexpected pos 276992."""
    class FullDisk(io.FileIO):
        def write(self, data):
            raise OSError(28, "No space left on device")
    path = tmp_path / "a.pt"
    path.write_bytes(b"as it was")
    with pytest.raises(ValueError, match="cannot write"):
        m.save(tmp_path / "no" / "such" / "folder.pt", random_model())
    monkeypatch.setattr("support.checkpoint.open", lambda path, *_, **__: FullDisk(path, "w"),
                        raising=False)
    with pytest.raises(ValueError, match="a.pt: No space left on device$"):
        m.save(path, random_model())
    assert path.read_bytes() == b"as it was" and list(tmp_path.iterdir()) == [path]

RUN = b"\x80\x02cbuiltins\nprint\nX\x08\x00\x00\x00code ran\x85R."
BOMB = b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R."  # two gigabytes of zeros
CHANGES = [  # words of the sentence, a part of the saved dict, what is put there (...: nothing)
    ("norm.weight is missing", "weights", {"norm.weight": ...}),
    ("foo", "weights", dict(foo=torch.ones(1))),
    ("head.weight", "weights", {"head.weight": torch.ones(2, 2)}),
    ("head.weight", "weights", {"head.weight": torch.ones(1).expand(48, 32)}),
    ("norm.weight", "weights", {"norm.weight": torch.ones(32, dtype=torch.bfloat16)}),
    ("norm.weight", "weights", {"norm.weight": torch.ones(32).long()}),
    ("config", "", dict(config=...)), ("not a checkpoint of dkv-min", "", dict(format="other"))]

def changed(part, update):
    def make(good, bad):
        data = torch.load(good, weights_only=True)
        new = (data[part] if part else data) | update
        new = {name: ENDLESS if value == "ENDLESS" else value
               for name, value in new.items() if value is not ...}
        torch.save(data | {part: new} if part else new, bad)
    return make

def rezip(change, compression=zipfile.ZIP_STORED):
    """change: name of a record -> {name: content} of the records that replace it."""
    def make(good, bad):
        with zipfile.ZipFile(good) as a, zipfile.ZipFile(bad, "w", compression) as b:
            for path in a.namelist():
                folder, name = path.split("/", 1)
                for new, content in change.get(name, {name: a.read(path)}).items():
                    b.writestr(f"{folder}/{new}", content)
    return make

FILES = [  # files that are damaged or not checkpoints at all
    ("there is no file", lambda good, bad: None), ("directory", lambda good, bad: bad.mkdir()),
    ("truncated", lambda good, bad: bad.write_bytes(b"")),
    ("truncated", lambda good, bad: bad.write_bytes(b"hello" * 100)),
    ("truncated", lambda good, bad: bad.write_bytes(good.read_bytes()[:20000])),
    ("not a checkpoint of dkv-min", lambda good, bad: torch.save(torch.ones(3), bad)),
    ("compressed", rezip({}, zipfile.ZIP_DEFLATED)),
    ("data/3: file not found", rezip({"data/3": {}})),
    ("more than tensors", rezip({"data.pkl": {"data.pkl": RUN}})),
    # these took gigabytes, did not end or printed a warning when the campaigns brought them up
    ("more than tensors", rezip({"data.pkl": {"data.pkl": BOMB}})),
    ("more than tensors", rezip({"data.pkl": {"DATA.PKL": BOMB}})),
    ("entries", rezip({"data.pkl": {"data.pkl": b"\x80\x02" + b"]" * 3_000_000 + b"."}})),
    ("more than tensors", lambda good, bad: torch.save(
        torch.load(good, weights_only=True), bad, pickle_protocol=4))]

@pytest.mark.parametrize("words, make", FILES + [
    (words, changed(*change)) for words, *change in CHANGES + REFUSED["checkpoints"]])
def test_bad_files_are_refused_in_one_sentence(tmp_path, tokenizer, words, make, capfd):
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    m.save(good, random_model(dtype=torch.float32), tokenizer)
    make(good, bad)
    with pytest.raises(ValueError) as e:
        m.load(bad)
    said = str(e.value)
    assert words in said and "bad.pt" in said and "\n" not in said and "internal" not in said, said
    assert "code ran" not in capfd.readouterr().out
