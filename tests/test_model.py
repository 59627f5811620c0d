"""The network, the loss, the tokenizer and the checkpoint file.

python -m pytest tests/test_model.py"""
import contextlib
import zipfile

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model

import model as m
from dkv_min import KVCache, generate
from train_tiny import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("the cat sat on the mat and the dog sat on the cat 1234 " * 20, 270)


def tokens_for(model, B=2, T=20):
    return torch.randint(3, 40, (B, T), generator=torch.Generator().manual_seed(1))


def test_llada_is_one_setting():
    with torch.device("meta"):
        assert sum(p.numel() for p in m.DiffusionLM(m.LLADA_8B).parameters()) == 8_015_581_184


def test_rows_are_rows_of_the_whole(model):
    x, rows = tokens_for(model), torch.tensor([[3, 0, 19], [7, 7, 1]])
    difference = (model(x, rows=rows) - m.gather_rows(model(x), rows)).abs().max()
    assert difference < 1e-12, f"largest difference {difference}"


def test_running_some_positions_against_the_cache_of_all(model):
    """With unchanged tokens the cached K/V are the right ones, in any order of positions."""
    x, pos = tokens_for(model), torch.tensor([[5, 2, 11], [0, 19, 4]])
    cache = KVCache(model, 2, 20)
    whole = model(x, cache=cache)
    some = model(x.gather(1, pos), pos, cache)
    assert (some - m.gather_rows(whole, pos)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype, n_kv_head, bias", [(torch.float32, 4, False), (torch.float32, 2, True), (torch.bfloat16, 4, False)])
def test_packed_products_are_the_same(dtype, n_kv_head, bias):
    model, x = random_model(dtype=dtype, n_kv_head=n_kv_head, qkv_bias=bias), tokens_for(random_model())
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(generator=torch.Generator().manual_seed(2))
    plain = model(x)
    with pytest.raises(KeyError), m.packed(model):
        with m.packed(model):  # of two, one inside the other, the outer one packs and unpacks
            assert model.head.blocks is not None
        assert model.head.blocks is not None
        difference = (model(x) - plain).abs().max() / plain.abs().max()
        assert difference < (1e-5 if dtype == torch.float32 else 0.05), f"largest difference {difference}"
        raise KeyError
    assert all(layer.blocks is None for layer in model.modules() if isinstance(layer, m.Linear))
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("n, m_rows", [(1, 1), (3, 2), (8, 8), (13, 9)])
def test_packed_some_positions_run_twice_and_nothing_changes(n, m_rows):
    """Packed, n and m are filled up to a multiple of 8: logits, their number, and what the cache holds are as without."""
    model, x, found = random_model(dtype=torch.float32), tokens_for(random_model()), []
    g = torch.Generator().manual_seed(n)
    pos = torch.stack([torch.randperm(20, generator=g)[:n] for _ in range(2)])
    rows = torch.stack([torch.randperm(n, generator=g)[:m_rows] for _ in range(2)])
    counted = []
    hook = model.blocks[0].register_forward_hook(lambda block, args, out: counted.append(out.shape[1]))
    for context in (contextlib.nullcontext(), m.packed(model)):
        with context:
            cache = KVCache(model, 2, 20)
            model(x, cache=cache)
            found.append((model(1 + x.gather(1, pos), pos, cache, rows), cache.k, cache.v))
    hook.remove()
    assert counted == [20, n, 20, -(-n // 8) * 8]
    assert found[0][0].shape == found[1][0].shape == (2, m_rows, 48) and not torch.equal(found[0][1], torch.zeros_like(found[0][1]))
    for a, b in zip(*found):
        assert (a - b).abs().max() < 1e-4


def test_nothing_is_packed_where_it_does_not_pay(model):
    with m.packed(model), m.packed(object()):  # float64; no model at all
        assert model.head.blocks is None


def test_generate_sees_weights_that_change():
    """What is packed does not outlive a call."""
    model, how = random_model(dtype=torch.float32), dict(gen_length=8, cache="decode")
    before = generate(model, [[3, 4, 5]], **how).tokens
    model.head.weight.data.neg_()
    assert generate(model, [[3, 4, 5]], **how).tokens != before


@pytest.mark.parametrize("padded", [True, False])
def test_attention_in_training_on_a_cpu(padded):
    """bfloat16 with gradients goes another way than float32; both come to the same, there and back."""
    pad, losses, gradients = torch.tensor([0, 4, 7]) if padded else None, [], []
    x = tokens_for(random_model(), B=3)
    masked, weight = m.diffusion_noise(torch.arange(20).expand(3, 20) < 8, generator=torch.Generator().manual_seed(3))
    for amp in (False, True):
        model = random_model(dtype=torch.float32).train().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = m.diffusion_loss(model, x, masked, weight, pad)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_left_padding_changes_nothing(model):
    x = tokens_for(model, B=1, T=12)
    padded = torch.cat([torch.full((1, 5), 3), x], 1)
    difference = (model(padded, pad=torch.tensor([5]))[:, 5:] - model(x)).abs().max()
    assert difference < 1e-12, f"largest difference {difference}"


@pytest.mark.parametrize("n_kv_head, bias", [(4, False), (2, False), (1, True)])
def test_attention_against_plain_arithmetic(n_kv_head, bias):
    model = random_model(n_kv_head=n_kv_head, qkv_bias=bias, n_layer=1)
    a = model.blocks[0].attn
    for linear in (a.q, a.k, a.v):
        if bias:
            linear.bias.data.normal_(generator=torch.Generator().manual_seed(2))
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    angle = torch.arange(9).double()[:, None] * (10000.0 ** (-torch.arange(4).double() / 4))  # (T, hs/2)
    turn = torch.polar(torch.ones_like(angle), angle)

    def heads(linear, n):  # (B, n, T, hs), rotated as complex numbers x_i + j x_(i + hs/2)
        h = (x @ linear.weight.T + (linear.bias if bias else 0)).view(2, 9, n, 8).transpose(1, 2)
        return h, torch.cat([(torch.complex(h[..., :4], h[..., 4:]) * turn).real, (torch.complex(h[..., :4], h[..., 4:]) * turn).imag], -1)

    q, k, v = heads(a.q, 4)[1], heads(a.k, n_kv_head)[1], heads(a.v, n_kv_head)[0]
    k, v = (t.repeat_interleave(4 // n_kv_head, dim=1) for t in (k, v))
    y = ((q @ k.transpose(2, 3) / 8 ** 0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 9, 32) @ a.o.weight.T
    cos_sin = [r.expand(2, -1, -1) for r in m.rope(torch.arange(9)[None], 8, 10000.0)]
    difference = (a(x, cos_sin, None, lambda k, v: (k, v)) - y).abs().max()
    assert difference < 1e-5, f"largest difference {difference}"  # the angles are float32


def test_noise_and_loss(model):
    g = torch.Generator().manual_seed(0)
    frozen = torch.arange(40).expand(4000, -1) < 10
    masked, weight = m.diffusion_noise(frozen, generator=g)
    assert not (masked & frozen).any()
    assert abs(masked[:, 10:].float().mean() - 0.5) < 0.02  # t is uniform
    # 1/p makes the number of masks an unbiased count of the free positions: the weights of a row sum to 1 on average
    assert abs((masked * weight).sum(1).mean() - 1) < 0.02
    x, frozen = tokens_for(model), torch.arange(20).expand(2, -1) < 6
    masked, weight = m.diffusion_noise(frozen, generator=g)
    p = 1 / (weight * 14)
    logits = model(torch.where(masked, 40, x))
    by_hand = sum(-F.log_softmax(logits[b, q].float(), -1)[x[b, q]] / p[b, q] / 14 / 2 for b, q in masked.nonzero())
    assert abs(m.diffusion_loss(model, x, masked, weight) - by_hand) < 1e-4


def test_tokenizer(tokenizer):
    for text in ("the cat 12", "  é\n\t中文 \U0001f600", "<|mask|> is text", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.special.values())
    assert len(tokenizer.encode("2048")) == 4  # digits one by one
    assert tokenizer.decode([tokenizer.special["<|eos|>"], 10**9, -1, 255]) == "<|eos|>\ufffd"
    assert tokenizer.encode("the cat") == m.Tokenizer.from_state(tokenizer.state()).encode("the cat")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(tmp_path, tokenizer, dtype):
    model = random_model(dtype=dtype)
    model.extra = {"note": "kept"}
    m.save(tmp_path / "a.pt", model, tokenizer)
    again, t = m.load(tmp_path / "a.pt")
    assert again.config == model.config and again.extra == model.extra and not again.training and again.wte.weight.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert t.encode("the cat") == tokenizer.encode("the cat") and t.special == tokenizer.special
    x = tokens_for(model)
    assert torch.equal(m.load(tmp_path / "a.pt", dtype=torch.float32)[0](x), model.float()(x))
    m.save(tmp_path / "b.pt", model)
    assert m.load(tmp_path / "b.pt")[1] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt"]  # no temporary file left


class Explosive:
    def __reduce__(self):
        return print, ("code from the file was run",)


def rezip(path, target, compression):
    with zipfile.ZipFile(path) as a, zipfile.ZipFile(target, "w", compression) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name))


def test_a_pattern_that_gives_up(tokenizer):
    """Writing tests/fuzz.py brought up that a panic in tiktoken, which is no Exception, became a traceback."""
    t = m.Tokenizer(tokenizer.ranks, r"(?:(?=a)a+)+!|.", tokenizer.special)
    assert len(t.encode("aa")) == 2
    with pytest.raises(ValueError, match="gives up"):
        t.encode("a" * 60)


def test_bad_files_are_refused_in_one_sentence(tmp_path, capfd, tokenizer):
    model, good = random_model(dtype=torch.float32), tmp_path / "good.pt"
    m.save(good, model)
    data = torch.load(good, weights_only=True)

    def saved(change):
        copy = {**data, "weights": dict(data["weights"]), "config": dict(data["config"])}
        change(copy)
        torch.save(copy, tmp_path / "bad.pt")

    def raw(content):
        (tmp_path / "bad.pt").write_bytes(content)

    def without(name):
        with zipfile.ZipFile(good) as a, zipfile.ZipFile(tmp_path / "bad.pt", "w") as b:
            for record in a.namelist():
                if not record.endswith(name):
                    b.writestr(record, a.read(record))

    def index(content, name="data.pkl"):
        with zipfile.ZipFile(good) as a, zipfile.ZipFile(tmp_path / "bad.pt", "w") as b:
            for record in a.namelist():
                b.writestr(record.replace("data.pkl", name), content if record.endswith("data.pkl") else a.read(record))

    endless = ["ha"]
    for _ in range(40):
        endless = [endless, endless]
    bomb = b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R."  # asks for two gigabytes of zeros

    faults = {
        "missing": (lambda: (tmp_path / "bad.pt").unlink(missing_ok=True), "there is no file"),
        "empty": (lambda: raw(b""), "truncated"),
        "text": (lambda: raw(b"hello" * 100), "truncated"),
        "cut in half": (lambda: raw(good.read_bytes()[:20000]), "truncated"),
        "compressed": (lambda: rezip(good, tmp_path / "bad.pt", zipfile.ZIP_DEFLATED), "compressed"),
        "code": (lambda: torch.save({"format": "dkv-min 1", "x": Explosive()}, tmp_path / "bad.pt"), "more than tensors"),
        "foreign": (lambda: torch.save({"state_dict": {}}, tmp_path / "bad.pt"), "no checkpoint of dkv-min"),
        "a tensor": (lambda: torch.save(torch.ones(3), tmp_path / "bad.pt"), "no checkpoint of dkv-min"),
        "lost weight": (lambda: saved(lambda d: d["weights"].pop("norm.weight")), "norm.weight is missing"),
        "one weight too many": (lambda: saved(lambda d: d["weights"].update(foo=torch.ones(1))), "foo"),
        "wrong shape": (lambda: saved(lambda d: d["weights"].update({"head.weight": torch.ones(2, 2)})), "head.weight"),
        "two dtypes": (lambda: saved(lambda d: d["weights"].update({"norm.weight": torch.ones(32, dtype=torch.bfloat16)})), "norm.weight"),
        "one number for all": (lambda: saved(lambda d: d["weights"].update({"head.weight": torch.ones(1).expand(48, 32)})), "head.weight"),
        "many layers": (lambda: saved(lambda d: d["config"].update(n_layer=2**30)), "n_layer"),
        "end is no token": (lambda: saved(lambda d: d["config"].update(eos_id=46)), "n_vocab 44"),
        "end is the mask": (lambda: saved(lambda d: d["config"].update(eos_id=40)), "other than the mask"),
        "wrong extra": (lambda: saved(lambda d: d.update(extra={"problems": []})), "problems"),
        "empty pattern": (lambda: saved(lambda d: d.update(tokenizer={**tokenizer.state(), "pattern": ""})), "empty text"),
        "negative id": (lambda: saved(lambda d: d.update(tokenizer={**tokenizer.state(), "special": {"<|eos|>": -1}})), "does not fit"),
        "whole numbers": (lambda: saved(lambda d: d["weights"].update({"norm.weight": torch.ones(32, dtype=torch.int64)})), "norm.weight"),
        "wrong config": (lambda: saved(lambda d: d["config"].update(n_head=5)), "n_embd 32"),
        "config of text": (lambda: saved(lambda d: d["config"].update(n_layer="3")), "n_layer"),
        "unknown setting": (lambda: saved(lambda d: d["config"].update(colour=1)), "colour"),
        "huge": (lambda: saved(lambda d: d["config"].update(vocab_size=2**30, n_vocab=2**30)), "wte.weight"),
        "no config": (lambda: saved(lambda d: d.pop("config")), "config"),
        "bad tokenizer": (lambda: saved(lambda d: d.update(tokenizer={"ranks": "YQ== 1\n", "pattern": ".", "special": {}})), "tokenizer"),
        # found in writing and running tests/fuzz.py: the first five took gigabytes or did not end, the next three printed a warning or gave a traceback later, then one answered with the mask, and one
        # said that torch has an internal error
        "endless setting": (lambda: saved(lambda d: d["config"].update(n_layer=endless)), "n_layer"),
        "endless extra": (lambda: saved(lambda d: d.update(extra={"template": endless})), "template"),
        "gigabytes of nothing": (lambda: index(bomb), "more than tensors"),
        "the same in capitals": (lambda: index(bomb, "DATA.PKL"), "more than tensors"),
        "millions of lists": (lambda: index(b"\x80\x02" + b"]" * 3_000_000 + b"."), "entries"),
        "newer protocol": (lambda: torch.save(data, tmp_path / "bad.pt", pickle_protocol=4), "more than tensors"),
        "problems without answers": (lambda: saved(lambda d: d.update(extra={"problems": ["one?"]})), "does not fit"),
        "prompts of numbers": (lambda: saved(lambda d: d.update(extra={"prompts": [3]})), "texts"),
        "nothing to write": (lambda: saved(lambda d: d["config"].update(n_vocab=2, mask_id=0, eos_id=1, eot_id=None)), "no id to write"),
        "a record is gone": (lambda: without("data/3"), "data/3: file not found"),
        "a folder": (lambda: ((tmp_path / "bad.pt").unlink(), (tmp_path / "bad.pt").mkdir()), "directory"),
    }
    for name, (make, words) in faults.items():
        make()
        with pytest.raises(ValueError) as e:
            m.load(tmp_path / "bad.pt")
        assert words in str(e.value) and "bad.pt" in str(e.value) and "\n" not in str(e.value) and "internal" not in str(e.value), f"{name}: {e.value}"
    assert "was run" not in capfd.readouterr().out


def test_saving_fails_without_harm(tmp_path, monkeypatch):
    model = random_model()
    m.save(tmp_path / "a.pt", model)
    before = (tmp_path / "a.pt").read_bytes()

    def full(data, f):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="No space left"):
        m.save(tmp_path / "a.pt", model)
    assert (tmp_path / "a.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="cannot write"):
        m.save(tmp_path / "no" / "such" / "folder.pt", model)
