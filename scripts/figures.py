"""The four pictures of the README: what a run looks like, why the delay, quality against speed, gain against length.

python scripts/figures.py                                    draws assets/*.png from assets/figures.json, in seconds
python scripts/figures.py --measure                          measures what that file lacks (the better part of an hour)
python scripts/figures.py --measure --n 20 --dir /tmp/try    the same in the small, elsewhere
python scripts/figures.py --measure speed length             measures these anew: on an idle machine, they are times

    map      which positions each step runs, Decode and Greedy, one problem of the checkpoint
    settle   how much the keys and values of a position change around the step that decodes it, and how far cached ones drift
    speed    generated tokens/s of the runs of `quality`, one prompt at a time, in turn, medians
    length   bench.py --scale
    quality  exact answers of every run on the same problems (tradeoff.py's way), in processes; goes on where it was killed
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from dkv_min import KVCache, generate  # noqa: E402
from sample import HERE, Parser, launch, load_checkpoint, pick_device  # noqa: E402
from scripts.tradeoff import NEVER, collect, weigh, wilson  # noqa: E402
from scripts.watch import MARKS, marks_of  # noqa: E402

BEFORE, AFTER = 8, 16  # steps around the decoding
PARTS = ("map", "settle", "speed", "length", "quality")
REFRESHES = (2, 4, 8, NEVER)

# ---------------------------------------------------------------------------------------------------------------------
# measuring

def settings(model, **how):
    return dict(gen_length=model.extra["gen_length"], block_length=model.extra["block_length"]) | how


def known_order(model):
    return model.extra.get("known_order", "random")


def measure_map(model, prompts):
    found = []
    for name, how in (("Decode, refresh 8", dict(cache="decode", refresh=8)), ("Greedy, refresh 8, window 4", dict(cache="greedy", refresh=8, remasking=known_order(model)))):
        rows = []
        result = generate(model, prompts[:1], generator=torch.Generator().manual_seed(0), **settings(model, **how),
                          on_step=lambda i, *what: rows.append("".join(marks_of(*(t[0].tolist() for t in what), model.config.mask_id))))
        found.append(dict(name=name, rows=rows, run=result.positions_run[0], full=result.positions_full[0]))
    return dict(prompt_len=len(prompts[0]), block_length=model.extra["block_length"], runs=found)


def flat(cache):
    """Keys and values of every layer, one row of numbers a position: (2, n_layer, T, width), of the only prompt. RoPE turns the
    keys of a position always alike, so that it changes no cosine."""
    return torch.stack([cache.k, cache.v])[:, :, 0].flatten(3)


def fresh(model, x):
    """The keys and values that a full forward on x (1, T) gives."""
    cache = KVCache(model, 1, x.shape[1])
    model(x, None, cache, torch.zeros(1, 1, dtype=torch.int64, device=x.device))
    return flat(cache)


def start(model, ids):
    return torch.tensor([ids + [model.config.mask_id] * model.extra["gen_length"]], device=model.wte.weight.device)


def answers(model, x):
    """Columns (T,) of the answer up to its first end of text, that one included. What fills the rest says little."""
    column, G = torch.arange(x.shape[1]), model.extra["gen_length"]
    ends = ((x[0] == model.config.eos_id).cpu() & (column >= len(column) - G)).nonzero()
    return (column >= len(column) - G) & (column <= (ends[0] if len(ends) else len(column)))


def settling(model, ids):
    """An uncached run -> how similar K and V of each step are to those of the step before, (2, n_layer, steps - 1, T), and how
    many steps after the one that decodes the position that is, (steps - 1, T)."""
    x, seen, when = start(model, ids), [], torch.zeros(len(ids) + model.extra["gen_length"], dtype=torch.int64)

    def look(i, tokens, run, decoded):
        nonlocal x
        seen.append(fresh(model, x).cpu())  # of what this step was given
        when[decoded[0].cpu()] = i
        x = tokens

    generate(model, [ids], on_step=look, **settings(model, cache="none"))
    kv = torch.stack(seen, 2)                                                  # (2, n_layer, steps, T, width)
    return F.cosine_similarity(kv[:, :, 1:], kv[:, :, :-1], dim=-1), torch.arange(1, len(seen))[:, None] - when, answers(model, x)


def drifting(model, ids, delay):
    """Decode, never refreshed -> how similar cached K and V are to those of a full forward on the same tokens, (2, n_layer,
    steps, T), and how many steps ago they were computed, (steps, T); -1 where no token stands that was decoded since all ran."""
    x, age, known, ages, similar, last = start(model, ids), 0, None, [], [], []
    hook = model.register_forward_hook(lambda module, args, out: last.append(args[2]))

    def look(i, tokens, run, decoded):
        nonlocal x, age, known
        similar.append(F.cosine_similarity(flat(last[-1]), fresh(model, x), dim=-1).cpu())
        age, there = (age + 1) * ~run[0].cpu(), (x[0] != model.config.mask_id).cpu()
        if i % model.extra["block_length"] < 2:  # a block begins, and all are run
            known = there
        ages.append(age.where(there & ~known, -1))
        last.clear()
        x = tokens

    try:
        generate(model, [ids], on_step=look, **settings(model, cache="decode", refresh=NEVER, delay=delay))
    finally:
        hook.remove()
    return torch.stack(similar, 2), torch.stack(ages), answers(model, x)


def means(parts, keys):
    """Averages by key, over parts (values (2, n_layer, steps, T), keys (steps, T), columns that count (T,)) -> lists
    [K or V][layer][key], None where there is nothing, and how many values each is the mean of."""
    total, count = 0, 0
    for values, key, counts in parts:
        hits = torch.stack([(key == k) & counts for k in keys]).flatten(1).to(values.dtype)            # (keys, steps * T)
        total, count = total + values.flatten(2) @ hits.T, count + hits.sum(1)
    return [[[round(v, 5) if n else None for v, n in zip(layer, count.tolist())] for layer in kind] for kind in (total / count).tolist()], count.int().tolist()


def measure_settle(model, prompts):
    keys = {"similar": range(-BEFORE, AFTER + 1), "delay": range(model.extra["block_length"] - 1), "no delay": range(model.extra["block_length"] - 1)}
    parts = {name: [] for name in keys}
    for ids in tqdm(prompts, "settle", unit="prompt", disable=None):
        for name in keys:
            parts[name].append(settling(model, ids) if name == "similar" else drifting(model, ids, name == "delay"))
    found = dict(prompts=len(prompts))
    for name in keys:
        values, count = means(parts[name], keys[name])
        found[name] = dict(x=list(keys[name]), mean=values, count=count)
    return found


def quality_runs(model):
    """-> settings of every point; steps as a share of the tokens."""
    G, known = model.extra["gen_length"], known_order(model)
    blocks = G // model.extra["block_length"]
    share = {k: max(1, round(G / k / blocks)) * blocks / G for k in (2, 3, 4, 8)}  # steps have to be a multiple of the blocks
    refreshes = [r for r in REFRESHES if r < model.extra["block_length"] or r == NEVER]
    found = [dict(cache="none", remasking=order, steps=s) for order in ("low_confidence", known) for s in (1, *share.values())]
    found += [dict(cache="decode", remasking="low_confidence", refresh=8, steps=share[k]) for k in (2, 4)]
    for r in refreshes:
        for delay in (True, False):
            found += [dict(cache="decode", remasking="low_confidence", refresh=r, delay=delay)]
            found += [dict(cache="greedy", remasking=known, refresh=r, window=w, delay=delay) for w in (4, 0)]
    return found


def measure_quality(model, args, log):
    runs, n = quality_runs(model), args.n
    parts = collect(runs, n, args.batch_size, args.ckpt, pick_device(args.device), args.workers, log, dict(weights=weigh(model), runs=repr(runs)))
    rows = []
    for run, how in enumerate(runs):
        mine = [part for (r, _), part in parts.items() if r == run]
        right, ran, full = (sum(map(get, mine)) for get in (lambda part: sum(part["right"]), lambda part: part["ran"], lambda part: part["full"]))
        rows.append(dict(how=how, right=right, n=n, positions=ran / n, fewer=round(full / ran, 3)))
    return dict(n=n, gen_length=model.extra["gen_length"], rows=rows)


def measure_speed(model, prompts, repeats=3):
    runs, prompts = quality_runs(model), prompts[:4]
    times = [[] for _ in runs]
    with tqdm(total=len(runs) * (repeats + 1), desc="speed", unit="run", disable=None) as bar:
        for repeat in range(repeats + 1):  # the first is the warm-up
            for taken, how in zip(times, runs):
                seconds = sum(generate(model, [ids], **settings(model, **how | dict(steps=round(model.extra["gen_length"] * how.get("steps", 1))))).seconds for ids in prompts)
                taken += [seconds] if repeat else []
                bar.update()
    tokens = len(prompts) * model.extra["gen_length"]
    return dict(prompts=len(prompts), repeats=repeats, device=model.wte.weight.device.type, threads=torch.get_num_threads(), dtype=str(model.wte.weight.dtype)[6:], torch=torch.__version__,
                rows=[dict(how=how, tokens_per_s=round(tokens / statistics.median(taken), 2)) for how, taken in zip(runs, times)])


def measure_length(args, path):
    """bench.py --scale, in a process of its own -> its numbers."""
    code = subprocess.run([sys.executable, os.path.join(HERE, "scripts", "bench.py"), "--scale", *map(str, args.lengths), "--device", args.device, "--json", path], stdout=subprocess.DEVNULL).returncode
    if code:
        raise ValueError("bench.py --scale did not finish: what it says stands above")
    with open(path, encoding="utf-8") as f:
        found = json.load(f)
    os.remove(path)
    return found


def read_numbers(path):
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f))
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, TypeError):
        raise ValueError(f"{path} holds no numbers of this script: give another --dir, or delete it") from None


def write_numbers(path, numbers):
    """Whole or not at all, one line a part."""
    try:
        with open(f"{path}.tmp", "w", encoding="utf-8") as f:
            f.write("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(part)}" for name, part in numbers.items()) + "\n}\n")
        os.replace(f"{path}.tmp", path)
    except OSError as e:
        raise ValueError(f"cannot write {path}: {e.strerror}") from None


def measure(args):
    """Measures the parts that are named, or all that the file lacks; each is written down as soon as it is there."""
    path, log = os.path.join(args.dir, "figures.json"), os.path.join(args.dir, "quality.log")
    model, tokenizer = load_checkpoint(args.ckpt, pick_device(args.device), "auto")
    lacking = [name for name in ("problems", "gen_length", "block_length", "template") if name not in model.extra]
    if lacking or tokenizer is None:
        raise ValueError(f"{args.ckpt} brings no problems with known answers")
    args.n = min(args.n, len(model.extra["problems"]))
    numbers, about = read_numbers(path), dict(ckpt=os.path.basename(args.ckpt), weights=weigh(model), n=args.n)
    if numbers.setdefault("about", about) != about:
        raise ValueError(f"{path} has the numbers of {numbers['about']['ckpt']} with --n {numbers['about']['n']}: give the same ones or another --dir, or delete it")
    prompts = [tokenizer.encode(model.extra["template"].replace("{}", question)) for question, _ in model.extra["problems"][:args.n]]
    ways = dict(map=lambda: measure_map(model, prompts), settle=lambda: measure_settle(model, prompts[:50]), speed=lambda: measure_speed(model, prompts),
                length=lambda: measure_length(args, f"{path}.length"), quality=lambda: measure_quality(model, args, log))
    for name in args.measure or [name for name in PARTS if name not in numbers]:
        numbers[name] = ways[name]()
        write_numbers(path, numbers)
    if os.path.exists(log) and "quality" in numbers and (not args.measure or "quality" in args.measure):
        os.remove(log)  # its sums are written down
    print(f"{path}: {', '.join(name for name in PARTS if name in numbers)}")
    return 0

# ---------------------------------------------------------------------------------------------------------------------
# drawing. Colours: Okabe and Ito's, which the colour-blind can tell apart; so can a grey print, by marker and line

BLUE, SKY, ORANGE, RED, GREEN, GREY, BLACK = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#999999", "#000000"


def draw_map(plt, numbers):
    colours = {"*": RED, "#": BLUE, "o": "#A6D3F2", ".": "#EFEFEF", "_": "#FBE3A8"}
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    part = numbers["map"]
    fig, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True)
    for ax, run in zip(axes, part["runs"]):
        cells = [["*#o._".index(mark) for mark in row] for row in run["rows"]]
        steps, T = len(cells), len(cells[0])
        ax.imshow(cells, cmap=ListedColormap([colours[mark] for mark in "*#o._"]), vmin=0, vmax=4, aspect="auto", interpolation="nearest", extent=(0, T, steps + 0.5, 0.5))
        ax.axvline(part["prompt_len"], color=BLACK, lw=1)
        ax.set_xlabel("position (prompt | answer)")
        ax.set_title(f"{run['name']}: {run['run']:,} positions run,\n{run['full'] / run['run']:.2f} times fewer than the {run['full']:,} without a cache", fontsize=9.5)
    axes[0].set_ylabel("step")
    fig.legend(handles=[Patch(facecolor=colours[mark], edgecolor=GREY, lw=0.5, label=MARKS[mark][0]) for mark in "*#o._"], loc="lower center", ncol=5, frameon=False)
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    return fig


def draw_settle(plt, numbers):
    part = numbers["settle"]
    fig, axes = plt.subplots(2, 2, figsize=(9, 6.2), sharey=True, sharex="col")
    for kind, (left, right) in enumerate(axes):
        n_layer = len(part["similar"]["mean"][kind])
        for layer in range(n_layer):
            look = dict(color=[BLUE, ORANGE, GREEN, RED, SKY, GREY][layer % 6], marker="osD^v*"[layer % 6], ms=3.5, lw=1.3)
            name = f"layer {layer + 1} of {n_layer}"
            left.plot(part["similar"]["x"], part["similar"]["mean"][kind][layer], label=name, **look)
            right.plot(part["delay"]["x"], part["delay"]["mean"][kind][layer], label=name, **look)
            right.plot(part["no delay"]["x"], part["no delay"]["mean"][kind][layer], **look | dict(ls=":", mfc="white"))
        for ax in (left, right):
            ax.grid(alpha=0.3)
        left.axvline(0, color=GREY, lw=1, ls="--")
        left.set_ylabel(f"{('keys', 'values')[kind]}: cosine similarity")
    axes[0][0].set_title("No cache: each step's against the step before", fontsize=10)
    axes[0][1].set_title("Decode, never refreshed: cached against fresh", fontsize=10)
    axes[1][0].set_xlabel("steps since the step that decodes the token")
    axes[1][1].set_xlabel("age in the cache (steps)")
    axes[0][0].annotate("first step with the\ntoken as input", (1, part["similar"]["mean"][0][0][BEFORE + 1]), (4, 0.5), arrowprops=dict(arrowstyle="->", color=GREY), fontsize=9, va="center")
    axes[0][0].text(-0.3, 0.6, "decoded", rotation=90, ha="right", fontsize=9, color="#555555")
    axes[0][0].legend(fontsize=9, loc="lower left", frameon=False)
    fig.suptitle(f"means over the tokens of {part['prompts']} answers, end-of-text padding left out", fontsize=9, color="#555555")
    from matplotlib.lines import Line2D
    axes[0][1].legend(handles=[Line2D([], [], color=BLACK, label="with the delay"), Line2D([], [], color=BLACK, ls=":", label="without: a mask's are kept")], fontsize=9, loc="center left", bbox_to_anchor=(0.05, 0.55), frameon=False)
    axes[1][0].text(2.6, 0.42, "layer 1's depend on id and\nposition alone: one change", fontsize=9, color=BLUE)
    fig.tight_layout()
    return fig


def steps_of(how, G):
    return round(G * how.get("steps", 1))


def draw_quality(plt, numbers):
    quality, speed = numbers["quality"], numbers["speed"]
    G, rate = quality["gen_length"], {json.dumps(row["how"]): row["tokens_per_s"] for row in speed["rows"]}
    known = [row["how"]["remasking"] for row in quality["rows"] if row["how"]["cache"] == "none"][-1]
    fig = plt.figure(figsize=(9, 8.4), layout="constrained")
    fig.suptitle(f"{quality['n']} problems a point, bars: one standard error. Speed: {speed['device']}, threads: {speed['threads']}, {speed['dtype']}, batch 1", fontsize=9, color="#555555")
    for part, order in zip(fig.subfigures(2, 1), ("low_confidence", known)):
        mine = [row for row in quality["rows"] if row["how"]["remasking"] == order]
        series = [("no cache", [row for row in mine if row["how"]["cache"] == "none"], BLACK, "s", "-")]
        if order == "low_confidence":
            series += [("Decode", [row for row in mine if row["how"].get("delay") is True], BLUE, "o", "-"), ("Decode, no delay", [row for row in mine if row["how"].get("delay") is False], BLUE, "o", ":")]
            series += [("Decode, refresh 8", [row for row in mine if row["how"].get("refresh") == 8 and row["how"].get("delay", True)], GREEN, "D", "-")]
            series[-1][1].sort(key=lambda row: row["fewer"])
        else:
            series += [(f"Greedy, window {w}{'' if delay else ', no delay'}", [row for row in mine if (row["how"].get("window"), row["how"].get("delay")) == (w, delay)], c, m, "-" if delay else ":")
                       for delay in (True, False) for w, c, m in ((4, BLUE, "o"), (0, ORANGE, "^"))]
        axes = part.subplots(1, 2, sharey=True)
        for name, rows, colour, marker, line in series:
            if "steps" in rows[-1]["how"]:
                name += ", " + ", ".join(str(steps_of(row["how"], G)) for row in rows) + " steps"
            else:
                name += ", refresh " + ", ".join("never" if row["how"]["refresh"] == NEVER else str(row["how"]["refresh"]) for row in rows)
            share, low, high = np.array([wilson(row["right"], row["n"], z=1) for row in rows]).T
            for ax, x in zip(axes, ([row["fewer"] for row in rows], [rate[json.dumps(row["how"])] for row in rows])):
                ax.errorbar(x, share, yerr=np.clip([share - low, high - share], 0, None), color=colour, marker=marker, ms=5, lw=1.2, ls=line, capsize=2, mfc="white" if line == ":" else colour, label=name)
        for ax, what in zip(axes, (f"times fewer positions run than without a cache in {G} steps", "generated tokens/s")):
            ax.set_xscale("log")
            ax.set_xlabel(what)
            ax.set_yscale("function", functions=(lambda y: -np.log10(np.maximum(101 - y, 1e-9)), lambda v: 101 - 10**-v))  # what is lost is seen best close to 100
            ax.set_yticks([0, 50, 80, 90, 95, 98, 99, 100])
            ax.set_ylim(-15, 100.2)
            ax.grid(alpha=0.3)
            plain_ticks(ax.xaxis)
        axes[0].set_ylabel("answers right (%), stretched")
        axes[0].set_title("Decoded " + ("by confidence" if order == "low_confidence" else order.replace("_", " ")), fontsize=10, loc="left")
        part.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=2, fontsize=8.5, frameon=False)
    return fig


def plain_ticks(axis):
    from matplotlib.ticker import LogLocator, NullFormatter
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def draw_length(plt, numbers):
    part = numbers["length"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
    for (run, exponent), colour, marker in zip(part["exponents"].items(), (BLACK, BLUE, ORANGE, GREEN, RED, SKY), "soD^v*"):
        rows = [row for row in part["runs"] if row["run"] == run]
        lengths = [row["total_length"] for row in rows]
        left.plot(lengths, [row["predicted"] for row in rows], color=colour, ls="--", lw=1.2)
        left.plot(lengths, [row["gain"] for row in rows], color=colour, marker=marker, ms=5, lw=1.5, label=f"{run}, seconds as length$^{{{exponent['seconds']:.1f}}}$")
        right.plot(lengths, [row["seconds"] for row in rows], color=colour, marker=marker, ms=5, lw=1.5)
    left.plot([], [], color=GREY, ls="--", label="predicted by arithmetic")
    for ax, what in ((left, "gain: times faster than no cache"), (right, "seconds for an answer")):
        ax.set(xscale="log", yscale="log", xlabel="total length (tokens; a quarter prompt)", ylabel=what)
        ax.set_xticks(lengths, map(str, lengths))
        plain_ticks(ax.yaxis)
        ax.xaxis.minorticks_off()
        ax.grid(alpha=0.3)
    fig.legend(loc="outside lower center", ncol=3, fontsize=9, frameon=False)
    c = part["conditions"]
    fig.suptitle(", ".join(f"{name} {c[name]}" for name in ("model", "device", "threads", "dtype", "batch") if name in c), fontsize=9, color="#555555")
    return fig


PICTURES = {"map": (draw_map, ["map"]), "settle": (draw_settle, ["settle"]), "quality": (draw_quality, ["quality", "speed"]), "length": (draw_length, ["length"])}


def draw(args):
    path = os.path.join(args.dir, "figures.json")
    numbers = read_numbers(path)
    if "about" not in numbers:
        raise ValueError(f"there are no numbers in {path}: python scripts/figures.py --measure writes them")
    try:
        import matplotlib
    except ImportError:
        raise ValueError("drawing needs matplotlib: python -m pip install -r requirements-figures.txt") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image  # matplotlib brings it along
    plt.rcParams.update({"figure.dpi": 150, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    for name, (how, parts) in PICTURES.items():
        lacking = [part for part in parts if part not in numbers]
        path = os.path.join(args.dir, f"{name}.png")
        if lacking:
            print(f"{path}: not drawn, since {' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not measured yet")
            continue
        fig = how(plt, numbers)
        fig.canvas.draw()
        picture = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB").quantize(128)  # few colours, a third of the bytes
        try:
            picture.save(f"{path}.tmp", format="png", optimize=True)
            os.replace(f"{path}.tmp", path)
        except OSError as e:
            raise ValueError(f"cannot write {path}: {e.strerror}") from None
        plt.close(fig)
        print(path)
    return 0


def main(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--measure", nargs="*", metavar="PART", help="map, settle, speed, length, quality; without a name all that are lacking")
    p.add_argument("--dir", default=os.path.join(HERE, "assets"), help="where figures.json and the pictures are (assets)")
    p.add_argument("--ckpt", default="tiny")
    p.add_argument("--n", type=int, default=500, metavar="PROBLEMS", help="of quality; settle takes 50 at most (500)")
    p.add_argument("--lengths", type=int, nargs="+", default=[], metavar="TOKENS", help="of length (bench.py's)")
    p.add_argument("--batch-size", type=int, default=50, help="of quality")
    p.add_argument("--workers", type=int, default=None, help="processes of quality (one per core)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = p.parse_args(argv)
    for name in ("n", "batch_size", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, and has to be at least 1")
    unknown = [name for name in args.measure or [] if name not in PARTS]
    if unknown:
        raise ValueError(f"--measure knows no part {unknown[0]}: it has to be one of {', '.join(PARTS)}")
    return draw(args) if args.measure is None else measure(args)


if __name__ == "__main__":
    launch(main)
