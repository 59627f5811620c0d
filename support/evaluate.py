"""Asks a model something and judges its answer: the one place that applies a checkpoint's
template, the one that answers its held-out problems and counts, and an answer's likelihood."""
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dkv_min import forward, generate

# the tokens of a conversation: its begin; before a turn; with the turn's text; after the turn
CHATS = {
    "llada": ("<|startoftext|>", "<|start_header_id|>{}<|end_header_id|>", "\n\n", "<|eot_id|>"),
    "chatml": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", "<|im_start|>",
               "{}\n", "<|im_end|>\n")}

def encode(turns, tokenizer, extra, raw=False):
    """The ids that the model is given. turns: texts of the user and of the model, alternately, the
    user's first and last. In a template special tokens are tokens; in a turn they are text."""
    chat = extra.get("chat")
    if chat in CHATS and not raw:
        begin, *before, after = CHATS[chat]
        ids = tokenizer.encode(begin, special=True)
        for i, text in enumerate([*turns, None]):
            mark, head = (part.format("assistant" if i % 2 else "user") for part in before)
            said = text or ""
            ids += tokenizer.encode(mark, special=True)
            ids += tokenizer.encode(head + (said.strip() if chat == "llada" else said))
            ids += tokenizer.encode(after, special=True) if text is not None else []
        return ids
    template = "{}" if raw else extra.get("template", "{}")  # the toy's: a question and a newline
    parts = [text + "\n" if i % 2 else template.replace("{}", text) for i, text in enumerate(turns)]
    return tokenizer.encode("".join(parts))

def chat_text(messages, chat, ask=True):
    """Messages with role and content -> the text whose ids encode gives, special tokens spelled.
    ask: a turn of the model begins after them; else the last one is the beginning of its turn."""
    begin, mark, head, after = CHATS[chat]
    begin = "" if messages[0]["role"] in begin else begin  # they have their own system message
    said = str.strip if chat == "llada" else str
    turns = [(mark + head).format(m["role"]) + said(m["content"]) for m in messages]
    return begin + after.join(turns + [(mark + head).format("assistant")] * ask)

def cut(ids, config):
    """The ids up to the first end of text or of turn."""
    ends = [i for i, t in enumerate(ids) if t in (config.eos_id, config.eot_id)]
    return ids[:ends[0]] if ends else ids

def text_of(ids, model, tokenizer):
    return tokenizer.decode(cut(ids, model.config)) if tokenizer else None

def is_right(text, answer):
    """Exact match of the whole worked answer: a right result may follow wrong sums."""
    return text.strip() == answer

def answer_problems(model, tokenizer, first=0, n=None, batch_size=50, **settings):
    """Answers n of the checkpoint's problems, from number `first` on, with these settings of
    generate. The lengths are the checkpoint's unless given. Random numbers belong to a problem, so
    that the batch size changes no answer. -> right (list of bool) and ids (list of lists), an entry
    a problem; and sums: of Result's fields, but positions_full of one token a step, no cache"""
    lengths = {name: model.extra[name] for name in ("gen_length", "block_length")}
    if settings.get("cache") in ("autoregressive", "guided"):
        del lengths["block_length"]  # they have no blocks
    settings = lengths | settings
    pairs = model.extra["problems"][first:][:n]
    found = SimpleNamespace(right=[], ids=[], steps=0, positions_run=0, positions_full=0,
                            forwards=0, guider_forwards=0, seconds=0.0)
    label = f"{settings.get('cache', 'none')}, {settings.get('remasking') or 'low_confidence'}"
    quiet = True if len(pairs) <= batch_size else None  # None: a bar in a terminal only
    starts = range(0, len(pairs), batch_size)
    for i in tqdm(starts, label, unit="batch", leave=False, disable=quiet):
        part = pairs[i:i + batch_size]
        prompts = [encode([question], tokenizer, model.extra) for question, _ in part]
        draws = [torch.Generator().manual_seed(first + i + j) for j in range(len(part))]
        result = generate(model, prompts, generator=draws, **settings)
        ids = [tokens[-settings["gen_length"]:] for tokens in result.tokens]
        found.ids += ids
        found.right += [is_right(text_of(t, model, tokenizer), a) for t, (_, a) in zip(ids, part)]
        for name in ("forwards", "guider_forwards", "seconds"):
            vars(found)[name] += getattr(result, name)
        found.steps += sum(result.steps)
        found.positions_run += sum(result.positions_run)
        found.positions_full += settings["gen_length"] * sum(map(len, result.tokens))
    return found

def nll(model, ids, P, generator, mc_num=128, cfg_scale=0.0):
    """-> LLaDA's bound on the negative log likelihood of ids from P on, in nats, as its
    get_log_likelihood.py estimates it from mc_num samples. For one token it is exact and takes one.
    A causal model's is exact too. Forwards run everything: no cache has an effect."""
    config, L, device = model.config, len(ids) - P, model.wte.weight.device
    B = 1 if config.causal or L == 1 else min(mc_num, 16)  # rows of a draw
    n_draws = mc_num // B if L > 1 and not config.causal else 1
    x, rows = torch.tensor([ids] * B), torch.arange(P, len(ids)).expand(B, L)
    x, rows, loss = x.to(device), rows.to(device), 0.0
    for _ in range(n_draws):
        # masks of the rows: from a random number on, spread evenly over 1..L
        k = torch.randint(1, L + 1, (1,), generator=generator) + torch.arange(B) * L / B
        n = (k.round().long() - 1) % L + 1                                     # (B,)
        masked = torch.rand(B, L, generator=generator).argsort(1) < n[:, None]
        masked = masked.to(device) | config.causal                             # (B, L)
        seen = x if config.causal else x.masked_fill(F.pad(masked, (P, 0)), config.mask_id)
        s = SimpleNamespace(x=seen, P=P, T=len(ids), pad=None, config=config, cfg_scale=cfg_scale)
        logits = forward(model, s, None, rows, None)                           # (B, L, V)
        ce = F.cross_entropy(logits.mT, x[:, P:], reduction="none")            # (B, L)
        loss += (ce * masked * L / masked.sum(1, keepdim=True)).sum().item() / B
    return loss / n_draws
