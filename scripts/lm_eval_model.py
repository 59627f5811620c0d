"""lm_eval's tasks, with every checkpoint, cache and decoding rule of ours. The flags are lm_eval's:

python scripts/lm_eval_model.py --model dkv_min --tasks gsm8k --batch_size 8 \\
    --model_args ckpt=llada,cache=decode,refresh=8,gen_length=256,block_length=32
"""
import os
import sys
from types import SimpleNamespace

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from caches import LOOPS
from dkv_min import generate
from sample import parse_args
from support.cli import launch, load_checkpoint, load_guider, pick_device
from support.evaluate import CHATS, chat_text, nll, text_of
from support.plan import lengths, plan
from support.prompts import draws
from support.settings import loop_settings, need

try:  # lm_eval's way to add a model: register it, then call its command line
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError:
    LM, register_model = object, lambda name: lambda model: model
    cli_evaluate = lambda: need(False, "this needs lm_eval: install requirements-eval.txt")

SET = {name for loop in LOOPS.values() for name in loop_settings(loop, {})} - {"guider"}

@register_model("dkv_min")
class DkvMin(LM):
    """Model args are sample.py's flags and what its --set takes: gen_length=256,delay=false,
    window=[8,64]. But cache is none if left out, and device and batch size are lm_eval's own flags.

    mc_num           samples of the bound on a likelihood: a multiple of 16, or less than that
    is_check_greedy  loglikelihood also decodes greedily: a forward for each token of the answer
    bos              text of a token before each context: for Dream-Base <|beginoftext|>
    """
    tokenizer_name = None  # LM's is a property
    def __init__(self, mc_num=128, is_check_greedy=True, bos="", device="auto", **flags):
        super().__init__()
        need(type(mc_num) is int and mc_num > 0, f"mc_num is {mc_num!r}, and has to be 1 or more")
        flags = {"cache": "none", "device": device.replace("cuda:0", "auto")} | flags  # its default
        args = self.args = parse_args([
            f"--set={name}={str(value).lower().strip('[]')}" if name in SET else
            f"--{name.replace('_', '-')}" + f"={value}" * (value is not True)
            for name, value in flags.items()])
        need(args.cache in LOOPS, "cache all is for sample.py: name one")
        device, dtype = pick_device(args.device), getattr(torch, args.dtype, args.dtype)
        self.model, self.tokenizer = load_checkpoint(args.ckpt, device, dtype, args.yes)
        need(self.tokenizer, f"{args.ckpt} has no tokenizer, so it cannot read text")
        self.guider = args.guider and load_guider(args.guider, self.tokenizer, device, dtype)
        self.mc_num, self.greedy, self.bos = mc_num, is_check_greedy, bos
        self.chat, self.tokenizer_name = self.model.extra.get("chat"), os.path.basename(args.ckpt)
        self.G = lengths(args, self.model.extra)[0]
        self.how(self.G, 0.0)  # what is wrong is said before the work

    def how(self, G, given):
        """-> generate's settings for answers of G tokens. given: the temperature if args has 0."""
        args = vars(self.args) | dict(gen_length=G, temperature=self.args.temperature or given)
        return plan(SimpleNamespace(**args), self.model.config, self.model.extra, self.guider)[0][0]

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        need(self.chat in CHATS, "this checkpoint has no template: leave out --apply_chat_template")
        return chat_text(chat_history, self.chat, add_generation_prompt)

    def encode(self, text):
        """-> ids. The name of a special token is text, but where a template begins the text."""
        templated = self.chat in CHATS and text.startswith(CHATS[self.chat][0].split("|>")[0])
        return self.tokenizer.encode(self.bos, True) + self.tokenizer.encode(text, templated)

    def fit(self, prompts, room):
        """-> the prompts, cut from the left where they and their answers exceed max_len."""
        cut = [p[-max(self.model.config.max_len - n, 1):] for p, n in zip(prompts, room)]
        if cut != prompts:
            print("note: some prompts are too long, and are cut from the left", file=sys.stderr)
        return cut

    def generate_until(self, requests):
        """-> texts, up to the end of text or of turn, or to one of the task's `until`."""
        kwargs, texts = [normalize_gen_kwargs(r.args[1], self.G) for r in requests], {}
        kinds = [(k["max_gen_toks"], k.get("temperature", 0.0)) for k in kwargs]
        prompts = self.fit([self.encode(r.args[0]) for r in requests], [G for G, _ in kinds])
        for kind in dict.fromkeys(kinds):  # usually one
            how, rows = self.how(*kind), [i for i, other in enumerate(kinds) if other == kind]
            for j in tqdm(range(0, len(rows), self.args.batch_size), "generate", unit="batch"):
                part = rows[j:j + self.args.batch_size]
                result = generate(self.model, [prompts[i] for i in part], **how,
                                  generator=[draws(self.args.seed, i) for i in part])
                for i, ids in zip(part, result.tokens):
                    texts[i] = text_of(ids[len(prompts[i]):], self.model, self.tokenizer)
                    for stop in filter(None, kwargs[i]["until"]):
                        texts[i] = texts[i].partition(stop)[0]
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return [texts[i] for i in range(len(requests))]

    def loglikelihood(self, requests):
        """-> pairs: log likelihood in nats, and whether greedy decoding gives the answer. Forwards
        run everything, so the cache does not matter. Of the settings only cfg_scale does."""
        contexts = [self.encode(r.args[0].rstrip()) for r in requests]  # blanks go to the answer
        answers = [self.encode("".join(r.args))[len(c):] for c, r in zip(contexts, requests)]
        need(all(answers), "a task asks for the likelihood of an answer without a token")
        contexts = self.fit([c or [self.model.config.eos_id] for c in contexts], map(len, answers))
        found, how = [], dict(cfg_scale=self.args.cfg_scale)
        for i, (r, c, a) in enumerate(zip(tqdm(requests, "loglikelihood"), contexts, answers)):
            loss = nll(self.model, c + a, len(c), draws(self.args.seed, i), self.mc_num, **how)
            greedy = self.greedy and generate(self.model, [c], gen_length=len(a), **how).tokens[0]
            found.append((-loss, greedy == c + a))
            self.cache_hook.add_partial("loglikelihood", r.args, found[i])
        return found

    def loglikelihood_rolling(self, requests):
        raise ValueError("there is no perplexity: the bound is on the likelihood of an answer")

if __name__ == "__main__":
    launch(cli_evaluate)
