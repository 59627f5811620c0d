"""The pictures of the READMEs.

python scripts/figures.py                      draws assets/ from assets/figures.json: seconds
python scripts/figures.py --measure [PART]     what that file lacks, or PART again: up to an hour
python scripts/figures.py --measure --n 20 --dir /tmp/try    the same in small, elsewhere

watch    what each step runs and decodes, no cache beside Decode and Greedy, one problem
settle   how keys and values change around their token's decoding, and how cached ones drift
length   bench.py --scale; measure it on an idle machine
rivals   bench.py --rivals with --guider (guider), at most 100 problems; on an idle machine too
"""
import contextlib
import io
import json
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from dkv_min import KVCache, generate
from scripts import bench
from scripts.accuracy import load_problems, parser, settings
from support.checkpoint import atomic_write, first_line
from support.cli import ROOT, check_bounds, check_out, launch, pick_device
from support.evaluate import encode
from support.watch import MARKS, marks_of

PARTS = ("watch", "settle", "length", "rivals")
BEFORE, AFTER = 8, 16  # steps around the decoding

def measure_watch(model, tokenizer, ids):
    """-> per run the marks of --watch, a string per step, and the texts of the final tokens."""
    ends, runs = (model.config.eos_id, model.config.eot_id), []
    greedy = dict(cache="greedy", refresh=8, remasking=model.extra.get("known_order", "random"))
    for name, how in (("No cache", dict(cache="none")),
                      ("Decode, refresh 8", dict(cache="decode", refresh=8)),
                      ("Greedy, refresh 8, window 4", greedy)):
        steps, g = [], torch.Generator().manual_seed(0)
        r = generate(model, [ids], generator=g, **settings(model, how), on_step=lambda _, *what:
                     steps.append([t[0].tolist() for t in what]))
        rows = ["".join(marks_of(*step, model.config.mask_id)) for step in steps]
        texts = ["~" if t in ends else tokenizer.decode([t]) for t in r.tokens[0]]
        runs.append(dict(name=name, rows=rows, texts=texts, run=r.positions_run[0],
                         full=r.positions_full[0]))
    return dict(prompt_len=len(ids), runs=runs)

def trace(model, ids, **how):
    """A run -> each step's tokens, what it ran and what it decoded, (steps, T); K and V of every
    layer as in its cache and as of a full forward, (2, n_layer, steps, T, width); the columns of
    the answer without padding, (T,). RoPE always turns the keys of a position by the same angles,
    which changes no cosine."""
    config, device, caches, steps = model.config, model.wte.weight.device, [], []
    x = torch.tensor([ids + [config.mask_id] * model.extra["gen_length"]], device=device)

    def look(i, tokens, run, decoded):
        nonlocal x
        fresh = KVCache(model, 1, x.shape[1])
        model(x, None, fresh, torch.zeros(1, 1, dtype=torch.int64, device=device))
        kv = [torch.stack([c.k, c.v])[:, :, 0, :c.T].flatten(3)  # without the spare column
              for c in (caches[0] or fresh, fresh)]
        caches.clear()
        steps.append([t.cpu() for t in (x[0], run[0], decoded[0], *kv)])
        x = tokens

    with model.register_forward_hook(lambda module, args, out: caches.append(args[2])):
        generate(model, [ids], on_step=look, **settings(model, how))
    *rows, cached, fresh = zip(*steps)
    answer = torch.arange(x.shape[1]) >= len(ids)
    ends = answer & (x[0] == config.eos_id).cpu()
    counts = answer & (ends.cumsum(0) == ends)  # to the first end of text
    return *map(torch.stack, rows), torch.stack(cached, 2), torch.stack(fresh, 2), counts

def settling(model, ids):
    """Without a cache -> similarity of each step's K and V to the step before's, (2, n_layer,
    steps - 1, T); steps since the position was decoded, (steps - 1, T); columns that count, (T,)"""
    *_, decoded, _, kv, counts = trace(model, ids, cache="none")
    after = torch.arange(1, len(decoded))[:, None] - decoded.int().argmax(0)
    return F.cosine_similarity(kv[:, :, 1:], kv[:, :, :-1], dim=-1), after, counts

def drifting(model, ids, delay):
    """Decode, never refreshed -> similarity of cached K and V to a full forward's, (2, n_layer,
    steps, T); steps since they were computed, (steps, T), -1 for all but tokens decoded since
    everything ran; columns that count, (T,)"""
    x, run, _, cached, fresh, counts = trace(model, ids, cache="decode", refresh=NEVER, delay=delay)
    step, L = torch.arange(len(x)), model.extra["block_length"]
    age = step[:, None] - (step[:, None] * run).cummax(0).values
    token = x != model.config.mask_id
    known = token[step - (step % L - 1).clamp(min=0)]  # a block's first two steps run everything
    return F.cosine_similarity(cached, fresh, dim=-1), age.where(token & ~known, -1), counts

def means(parts, keys):
    """Averages by key, over parts (values (2, n_layer, steps, T), keys (steps, T), columns that
    count (T,)) -> keys; means [K or V][layer][key], None without a value; how many values."""
    total = count = 0
    for values, key, counts in parts:
        hits = torch.stack([(key == k) & counts for k in keys]).flatten(1)     # (keys, steps * T)
        total = total + values.flatten(2) @ hits.to(values.dtype).T
        count = count + hits.sum(1)
    mean = [[[round(v, 5) if n else None for v, n in zip(layer, count)] for layer in kind]
            for kind in (total / count).tolist()]
    return dict(x=list(keys), mean=mean, count=count.tolist())

def measure_settle(model, prompts):
    keys = [range(-BEFORE, AFTER + 1), *[range(model.extra["block_length"] - 1)] * 2]
    parts = zip(*((settling(model, ids), drifting(model, ids, True), drifting(model, ids, False))
                  for ids in tqdm(prompts, "settle", unit="prompt", disable=None)))
    return dict(prompts=len(prompts), **{
        name: means(*found) for name, *found in zip(("similar", "delay", "no delay"), parts, keys)})

def measure_bench(*flags):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        bench.main([*flags])
    return json.loads(out.getvalue().splitlines()[-1])

def read_numbers(path):
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(f"{path} has no numbers ({first_line(e)}): delete it") from None

def write_numbers(path, numbers):
    lines = (f"{json.dumps(name)}: {json.dumps(part)}" for name, part in numbers.items())
    with atomic_write(path, "w") as f:
        f.write("{\n" + ",\n".join(lines) + "\n}\n")

def measure(args):
    """Measures the parts that are named, or all that the file lacks; each is saved at once."""
    path = os.path.join(args.dir, "figures.json")
    check_out(path, "--dir")
    model, tokenizer = load_problems(args)
    about = dict(ckpt=os.path.basename(args.ckpt), weights=args.weights, n=args.n)
    numbers = read_numbers(path)
    if (found := numbers.setdefault("about", about)) != about:
        raise ValueError(f"{path} has the numbers of {found['ckpt']} with --n {found['n']}: give "
                         "the same ones or another --dir, or delete it")
    prompts = [encode([question], tokenizer, model.extra)
               for question, _ in model.extra["problems"][:min(args.n, 50)]]
    ways = dict(watch=(measure_watch, model, tokenizer, prompts[0]),
                settle=(measure_settle, model, prompts),
                length=(measure_bench, "--scale", "--device", args.device),
                rivals=(measure_bench, "--rivals", "--device", args.device, "--ckpt", args.ckpt,
                        "--guider", args.guider, "--n", str(min(args.n, 100))))
    for name in args.measure or [name for name in PARTS if name not in numbers]:
        how, *given = ways[name]
        numbers[name] = how(*given)
        write_numbers(path, numbers)
    print(f"{path}: {', '.join(name for name in PARTS if name in numbers)}")
    return 0

# drawing. Okabe and Ito's colours, which colour-blind readers can tell apart; a grey print differs
# by marker and line
BLUE, SKY, ORANGE, RED, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73"
GREY, BLACK, PURPLE = "#999999", "#000000", "#CC79A7"
COLOURS = {"*": RED, "#": BLUE, "o": "#A6D3F2", ".": "#EFEFEF", "_": "#FBE3A8"}
STYLE = {"figure.dpi": 150, "font.size": 10, "axes.titlesize": 10, "figure.titlesize": 9,
         "legend.fontsize": 9, "legend.frameon": False, "lines.linewidth": 1.3, "axes.grid": True,
         "lines.markersize": 4.5, "axes.spines.top": False, "axes.spines.right": False,
         "grid.alpha": 0.3}

def draw_map(plt, watch):
    fig, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True)
    palette, marks = plt.matplotlib.colors.ListedColormap([*COLOURS.values()]), [*COLOURS]
    for ax, run in zip(axes, watch["runs"][1:]):
        ran, full = run["run"], run["full"]
        cells = [[*map(marks.index, row)] for row in run["rows"]]
        ax.imshow(cells, cmap=palette, vmin=0, vmax=4, aspect="auto", interpolation="nearest",
                  extent=(0, len(cells[0]), len(cells) + 0.5, 0.5))
        ax.axvline(watch["prompt_len"], color=BLACK, lw=1)
        ax.grid(False)
        ax.set(xlabel="position (prompt | answer)", title=f"{run['name']}: {ran:,} positions run,\n"
               f"{full / ran:.2f} times fewer than the {full:,} without a cache")
    axes[0].set_ylabel("step")
    for mark, colour in COLOURS.items():
        axes[0].fill([], [], facecolor=colour, edgecolor=GREY, lw=0.5, label=MARKS[mark][0])
    fig.legend(loc="lower center", ncol=5)
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    return fig

def draw_settle(plt, part):
    fig, axes = plt.subplots(2, 2, figsize=(9, 6.2), sharey=True, sharex="col")
    similar, colours = part["similar"]["mean"], [BLUE, ORANGE, GREEN, RED, SKY, GREY]
    for kind, (left, right) in enumerate(axes):
        for layer in range(n_layer := len(similar[kind])):
            look = dict(color=colours[layer % 6], marker="osD^v*"[layer % 6], ms=3.5,
                        label=f"layer {layer + 1} of {n_layer}")
            for ax, name, more in ((left, "similar", {}), (right, "delay", {}),
                                   (right, "no delay", dict(ls=":", mfc="white"))):
                ax.plot(part[name]["x"], part[name]["mean"][kind][layer], **look | more)
        left.axvline(0, color=GREY, lw=1, ls="--")
        left.set_ylabel(f"{('keys', 'values')[kind]}: cosine similarity")
    (top, cached), (bottom, age) = axes
    top.set_title("No cache: each step's against the step before")
    cached.set_title("Decode, never refreshed: cached against fresh")
    bottom.set_xlabel("steps since the step that decodes the token")
    age.set_xlabel("age in the cache (steps)")
    top.annotate("first step with the\ntoken as input", (1, similar[0][0][BEFORE + 1]), (4, 0.5),
                 fontsize=9, va="center", arrowprops=dict(arrowstyle="->", color=GREY))
    top.legend(loc="lower left")
    lines = [plt.Line2D([], [], color=BLACK, ls=ls) for ls in "-:"]
    cached.legend(lines, ["with the delay", "without: a mask's are kept"], loc="center left",
                  bbox_to_anchor=(0.05, 0.55))
    fig.suptitle(f"means over the tokens of {part['prompts']} answers, without end-of-text padding")
    fig.tight_layout()
    return fig

def draw_rivals(plt, part):
    fig, axes = plt.subplots(1, 2, figsize=(9, 4.8), sharey=True, layout="constrained")
    colours = dict(AR=RED, none=BLACK, decode=BLUE, greedy=SKY, local=GREEN, dual=GREY,
                   freecache=ORANGE, guided=PURPLE, self=PURPLE)
    for ax, B in zip(axes, (1, 4)):
        line, *rows = (row for row in part["runs"] if row["batch"] == B)
        ax.axvline(line["tokens_per_s"], color=RED, ls="--", label=f"{line['run']}: to be crossed")
        for row, marker in zip(rows, "sXPoD^v<>phdH8os*D^"):
            colour = colours[row["run"].split()[0].strip(",")]
            ax.plot(row["tokens_per_s"], 100 * row["exact"], marker, ms=7, color=colour,
                    label=row["run"], clip_on=False)
        # shares of which losses are seen best close to 100
        ax.set_yscale("function", functions=(
            lambda y: -np.log10(np.maximum(101 - y, 1e-9)), lambda v: 101 - 10**-v))
        ax.set(xlabel="tokens per second", title=f"batch {B}", xscale="log", ylim=(-15, 100.2),
               yticks=[0, 50, 80, 90, 95, 98, 99, 100])
        plain_ticks(plt, ax.xaxis)
    axes[0].set_ylabel("answers right (%), stretched")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=4)
    fig.suptitle(conditions(part, "model", "device", "threads", "dtype", "n"))
    return fig

def conditions(part, *names):
    how = part["conditions"]
    return ", ".join(f"{name} {how[name]}" for name in names if name in how)

def plain_ticks(plt, axis):
    axis.set_major_locator(plt.LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(plt.NullFormatter())

def draw_length(plt, length):
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
    colours = BLACK, BLUE, ORANGE, GREEN, RED, SKY
    names = dict.fromkeys(row["run"] for row in length["runs"])
    for run, colour, marker in zip(names, colours, "soD^v*"):
        rows = [row for row in length["runs"] if row["run"] == run]
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        x = columns["total_length"]
        left.plot(x, columns["predicted"], color=colour, ls="--")
        left.plot(x, columns["gain"], color=colour, marker=marker, label=run)
        right.plot(x, columns["seconds"], color=colour, marker=marker)
    left.plot([], [], color=GREY, ls="--", label="predicted by arithmetic")
    for ax, label in (left, "gain: times faster than no cache"), (right, "seconds for an answer"):
        ax.set(xscale="log", yscale="log", xlabel="total length (tokens; a quarter prompt)",
               ylabel=label)
        ax.set_xticks(x, map(str, x))
        plain_ticks(plt, ax.yaxis)
        ax.xaxis.minorticks_off()
    fig.legend(loc="outside lower center", ncol=3)
    fig.suptitle(conditions(length, "model", "device", "threads", "dtype", "batch"))
    return fig

# the moving picture. In pixels: twice the size on the page, for sharp displays
WIDTH, MARGIN, TOP, LINE, CELL = 1720, 28, 70, 46, 36

def layout(texts, prompt_len, advance, width):
    """Where each token's cell begins, [(x, y)]. A mask's is as wide as its token to come."""
    places, x, y = [], 0, TOP
    for i, text in enumerate(texts):
        if i == prompt_len or x + len(text) * advance > width:
            x, y = 0, y + LINE + (MARGIN if i == prompt_len else 0)
        places.append((x, y))
        x += len(text) * advance
    return places

def draw_watch(plt, watch):
    from PIL import Image, ImageDraw, ImageFont
    folder = os.path.join(plt.matplotlib.get_data_path(), "fonts", "ttf")
    mono, bold, sans = (ImageFont.truetype(os.path.join(folder, f"DejaVuSans{name}.ttf"), size)
                        for name, size in (("Mono", 24), ("-Bold", 30), ("", 26)))
    runs, advance, frames = watch["runs"], mono.getlength("m"), []
    panel = (WIDTH - MARGIN) // len(runs) - MARGIN
    texts = [[text.replace("\n", "\u21b5") for text in run["texts"]] for run in runs]
    places = [layout(words, watch["prompt_len"], advance, panel) for words in texts]
    bottom = max(y for cells in places for _, y in cells) + LINE + MARGIN
    for step in range(len(runs[0]["rows"])):
        image = Image.new("RGB", (WIDTH, bottom + 150), "white")
        draw = ImageDraw.Draw(image)
        for p, run in enumerate(runs):
            left = MARGIN + p * (panel + MARGIN)
            draw.text((left, 14), run["name"], BLACK, bold)
            for text, (x, y), mark in zip(texts[p], places[p], run["rows"][step]):
                x += left
                draw.rectangle((x + 1, y, x + len(text) * advance - 2, y + CELL), COLOURS[mark])
                if mark not in "o_":
                    draw.text((x, y + 3), text, "white" if mark in "*#" else BLACK, mono)
            ran = sum(mark in "*#o" for row in run["rows"][:step + 1] for mark in row)
            for share, colour in ((1, COLOURS["."]), (ran / run["full"], BLUE)):
                draw.rectangle((left, bottom, left + share * (panel - 1), bottom + 20), colour)
            draw.text((left, bottom + 30), f"positions run {ran:,} of {run['full']:,}", BLACK, sans)
        x, y = MARGIN, bottom + 100
        for mark, colour in COLOURS.items():
            draw.rectangle((x, y, x + 30, y + 30), colour, GREY)
            draw.text((x + 42, y), MARKS[mark][0], BLACK, sans)
            x += 100 + sans.getlength(MARKS[mark][0])
        frames.append(image)
    return frames

PICTURES = {"map.png": (draw_map, "watch"), "settle.png": (draw_settle, "settle"),
            "length.png": (draw_length, "length"), "rivals.png": (draw_rivals, "rivals"),
            "watch.gif": (draw_watch, "watch")}

def draw(args):
    path = os.path.join(args.dir, "figures.json")
    numbers = read_numbers(path)
    if "about" not in numbers:
        raise ValueError(f"there are no numbers in {path}: figures.py --measure writes them")
    try:
        import matplotlib.pyplot as plt
        from PIL import Image  # comes with matplotlib
    except ImportError:
        raise ValueError("drawing needs matplotlib: install requirements-figures.txt") from None
    plt.switch_backend("Agg")
    plt.rcParams.update(STYLE)
    for name, (how, part) in PICTURES.items():
        path = os.path.join(args.dir, name)
        if part not in numbers:
            print(f"{path}: not drawn, because it needs --measure {part}")
            continue
        fig = how(plt, numbers[part])
        if name.endswith(".gif"):
            # one palette for all, so that a frame is stored as what has changed
            palette = fig[len(fig) // 3].quantize(32, Image.Quantize.MAXCOVERAGE, kmeans=3)
            image, *rest = (image.quantize(palette=palette, dither=0) for image in fig)
            more = dict(format="gif", save_all=True, append_images=rest, loop=0,
                        duration=[1000] + [125] * (len(rest) - 1) + [4000])
        else:
            fig.canvas.draw()
            image = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB")
            image, more = image.quantize(128), dict(format="png", optimize=True)  # a third as large
            plt.close(fig)
        with atomic_write(path) as f:
            image.save(f, **more)
        print(path)
    return 0

def main(argv=None):
    p = parser(__doc__, 500)
    p.add_argument("--measure", nargs="*", choices=PARTS, help="(all that are lacking)")
    p.add_argument("--guider", default="guider", help="of rivals (guider)")
    p.add_argument("--dir", default=os.path.join(ROOT, "assets"), help="of figures.json (assets)")
    args = p.parse_args(argv)
    check_bounds(args, n=1)
    pick_device(args.device)  # one that is not there is refused even for drawing
    return draw(args) if args.measure is None else measure(args)

if __name__ == "__main__":
    launch(main)
