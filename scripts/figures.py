"""The pictures of the READMEs.

python scripts/figures.py                      draws assets/ from the numbers there: seconds
python scripts/figures.py --measure [PART]     what figures.json lacks, or PART again: two minutes
python scripts/figures.py --measure --n 20 --dir /tmp/try    the same in small, elsewhere

watch    what each step of five runs does with every position, one problem: watch.gif, map.png
settle   how keys and values change around their token's decoding, and how cached ones drift
The rest is written by bench.py --scale --json assets/length.json, on an idle machine, and by
accuracy.py --json assets/league.json, for pareto.png.
"""
import json
import os
import sys
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from dkv_min import KVCache, generate
from scripts.accuracy import load_problems, parser, settings
from support.checkpoint import atomic_write, first_line
from support.cli import ROOT, check_bounds, check_out, launch, load_guider, pick_device
from support.evaluate import encode
from support.watch import MARKS, marks_of

PARTS = ("watch", "settle")
BEFORE, AFTER = 8, 16  # steps around the decoding

def measure_watch(model, tokenizer, ids, guider):
    """-> per run the marks of --watch, a string per step, and the texts of the final tokens."""
    ends, runs = (model.config.eos_id, model.config.eot_id), []
    lengths = {name: model.extra[name] for name in ("gen_length", "block_length")}
    for name, how in (("No cache", dict(cache="none")),
                      ("Decode, refresh 8", dict(cache="decode", refresh=8)),
                      ("local (ours)", dict(cache="local")), ("Fast-dLLM dual", dict(cache="dual")),
                      ("Guided", dict(cache="guided", guider=guider, block_length=None))):
        rows = []
        r = generate(model, [ids], **lengths | how, on_step=lambda _, *step: rows.append(
            "".join(marks_of(*(t[0].tolist() for t in step), model.config.mask_id))))
        texts = ["~" if t in ends else tokenizer.decode([t]) for t in r.tokens[0]]
        also = f" (guider {n})" if (n := r.guider_positions[0]) else ""
        runs.append(dict(name=name, rows=rows, texts=texts, run=r.positions_run[0], also=also))
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
    x, run, _, cached, fresh, counts = trace(model, ids, cache="decode", refresh=10**6, delay=delay)
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
    prompts = [encode([q], tokenizer, model.extra) for q, _ in model.extra["problems"][:50]]
    ways = dict(settle=lambda: measure_settle(model, prompts), watch=lambda: measure_watch(
        model, tokenizer, prompts[0], load_guider(args.guider, tokenizer, args.device, "auto")))
    for name in args.measure or [name for name in PARTS if name not in numbers]:
        numbers[name] = ways[name]()
        write_numbers(path, numbers)
    print(f"{path}: {', '.join(name for name in PARTS if name in numbers)}")
    return 0

# drawing. Okabe and Ito's colours, which colour-blind readers can tell apart; a grey print differs
# by marker and line
LINES = BLACK, BLUE, ORANGE, GREEN, RED, SKY, PURPLE, GREY = (
    "#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999999")
COLOURS = {"*": RED, "#": BLUE, "o": "#A6D3F2", ".": "#EFEFEF", "_": "#FBE3A8"}
STYLE = {"figure.dpi": 150, "font.size": 10, "axes.titlesize": 10, "figure.titlesize": 9,
         "legend.fontsize": 9, "legend.frameon": False, "lines.linewidth": 1.3, "axes.grid": True,
         "lines.markersize": 4.5, "axes.spines.top": False, "axes.spines.right": False,
         "grid.alpha": 0.3, "figure.constrained_layout.use": True}

def draw_map(plt, watch):
    fig, axes = plt.subplots(2, 3, figsize=(9, 6.6))
    palette, marks = plt.matplotlib.colors.ListedColormap([*COLOURS.values()]), [*COLOURS]
    for ax, run in zip(axes.flat, runs := watch["runs"]):
        cells = [[*map(marks.index, row)] for row in run["rows"]]
        ax.imshow(cells, cmap=palette, vmin=0, vmax=4, aspect="auto", interpolation="nearest",
                  extent=(0, len(cells[0]), len(cells) + 0.5, 0.5))
        ax.axvline(watch["prompt_len"], color=BLACK, lw=1)
        ax.grid(False)
        ax.locator_params("y", integer=True)
        ax.set(xlabel="position (prompt | answer)", ylabel="step", title=f"{run['name']}\n"
               f"{run['run']:,} run{run['also']}, {runs[0]['run'] / run['run']:.2f}x fewer")
    axes[1, 2].axis("off")
    for mark, colour in COLOURS.items():
        axes[1, 2].fill([], [], facecolor=colour, edgecolor=GREY, lw=0.5, label=MARKS[mark][0])
    axes[1, 2].legend(loc="center", fontsize=10, labelspacing=1)
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
    cached.legend([plt.Line2D([], [], color=BLACK, ls=ls) for ls in "-:"],
                  ["with the delay", "without: a mask's are kept"], loc=(0.05, 0.47))
    fig.suptitle(f"means over the tokens of {part['prompts']} answers, without end-of-text padding")
    return fig

FAMILIES = ("none", "decode greedy prefill pd", "freecache", "local", "autoregressive",
            "prefix dual", "guided", "window entropy")  # each has its colour of LINES

def draw_pareto(plt, league):
    fig, ax = plt.subplots(figsize=(9, 6))
    rules = dict(zip(dict.fromkeys(row["rule"] for row in league["runs"]), "XosD^vP<"))
    colours, front = {}, []  # front: the runs that are right more often than all faster ones
    for caches, colour in zip(FAMILIES, LINES):
        ax.plot([], [], "s", ms=8, color=colour, label=caches.replace(" ", ", "))
        colours |= dict.fromkeys(caches.split(), colour)
    for rule, marker in rules.items():
        ax.plot([], [], marker, ms=8, color=GREY, label=rule)
    ax.plot([], [], "o", ms=8, color=BLACK, mfc="white", label="hollow: no delay")
    for row in sorted(league["runs"], key=lambda row: -row["tokens/s"]):
        x, name, (y, *_) = row["tokens/s"], row["cache"], row.get("exact", [None])
        colour = colours[name.split(",")[0]]
        if y is None:  # autoregressive, of the same size: the line to cross
            ax.axvline(x, color=colour, ls="--")
            ax.text(x * 1.03, 70, f"{name}:\n{x:,.0f} tokens/s", color=colour, fontsize=9)
            continue
        late = name == "freecache" or "no delay" in name or "(0, " in name
        ax.plot(x, y, rules[row["rule"]], ms=8, color=colour, clip_on=False, mew=0.8,
                mec=colour if late else "white", mfc="white" if late else colour)
        if not front or y > front[-1][1]:
            front.append((x, y, f"{name}\n{row['rule']}: {y:.1f}%, {x:,.0f}/s"))
    for i, (*point, text) in enumerate(front):
        ax.annotate(text, point, (1.03, (i + 0.5) / len(front)), textcoords="axes fraction",
                    va="center", fontsize=9,
                    arrowprops=dict(arrowstyle="-", color=GREY, lw=0.7, shrinkB=4, relpos=(0, 0.5)))
    ax.plot(*[*zip(*front)][:2], color=BLACK, lw=1, label="frontier", zorder=1)
    # shares of which losses are seen best close to 100
    ax.set_yscale("function", functions=(
        lambda y: -np.log10(np.maximum(101 - y, 1e-9)), lambda v: 101 - 10**-v))
    ax.set(xlabel="tokens per second", ylabel="answers right (%), stretched", xscale="log",
           ylim=(-15, 100.2), yticks=[0, 50, 80, 90, 95, 98, 99, 100])
    plain_ticks(plt, ax.xaxis)
    return explained(fig, league)

def explained(fig, part):
    fig.legend(loc="outside lower center", ncol=5)
    names = "model", "device", "threads", "dtype", "n", "batch", "batch_size"
    fig.suptitle(", ".join(f"{name.replace('_', ' ')} {part['conditions'][name]}"
                           for name in names if name in part["conditions"]))
    return fig

def plain_ticks(plt, axis):
    axis.set_major_locator(plt.LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(plt.NullFormatter())

def draw_length(plt, length):
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 6), sharex=True)
    ends = {row["run"]: row["gain"] for row in length["runs"]}  # at the greatest length
    for i, run in enumerate(sorted(ends, key=ends.get, reverse=True)):  # the legend in their order
        x, gain, predicted = np.array([[row["total_length"], row["gain"], row["predicted"]]
                                       for row in length["runs"] if row["run"] == run]).T
        for ax, y in (left, gain), (right, gain / predicted):
            ax.plot(x, y, label=run * (ax is left), color=LINES[i % 8], ls="--" if i > 7 else "-",
                    marker="osD^vPX*<>phdH8"[i % 15], mfc="white" if i > 7 else None)
            ax.set_xlabel("total length (tokens; a quarter prompt)")
    left.set(xscale="log", yscale="log", ylabel="gain: times faster than no cache")
    left.set_xticks(x, map("{:.0f}".format, x))
    left.xaxis.minorticks_off()
    plain_ticks(plt, left.yaxis)
    right.set(ylim=(0, None), ylabel="gain / gain predicted by arithmetic")
    return explained(fig, length)

# the moving picture. In pixels: twice the size on the page, for sharp displays
WIDTH, MARGIN, BAR, LINE, CELL, STRIP = 1720, 28, 400, 44, 38, 16

def draw_watch(plt, watch):
    """-> frames. A run is a strip, its prompt, above the text of its answer."""
    from PIL import Image, ImageDraw, ImageFont
    folder = os.path.join(plt.matplotlib.get_data_path(), "fonts", "ttf")
    runs, P, room, frames = watch["runs"], watch["prompt_len"], WIDTH - 2 * MARGIN, []
    answers = [[text.replace("\n", "\u21b5") for text in run["texts"][P:]] for run in runs]
    columns, ends = max(len("".join(a)) for a in answers), [len(run["rows"]) for run in runs]
    mono, bold, sans = (ImageFont.truetype(os.path.join(folder, f"DejaVuSans{name}.ttf"), size) for
                        name, size in (("Mono", room / columns / 0.602), ("-Bold", 28), ("", 26)))
    prompt = textwrap.wrap(f"Prompt (the strips): {''.join(runs[0]['texts'][:P])}", columns)
    top, panel, full = 2 * MARGIN + LINE * len(prompt), 3 * LINE + STRIP, runs[0]["run"]

    def cells(y, texts, marks, advance=room / columns, height=CELL):
        x = MARGIN
        for text, mark in zip(texts, marks):
            left, x = x, x + len(text) * advance
            draw.rectangle((left + 1, y, x - 1, y + height), COLOURS.get(mark, "white"))
            draw.text((left, y + 4), text, "white" if mark in "*#" else BLACK, mono)

    for step in range(max(ends) + 1):
        image = Image.new("RGB", (WIDTH, top + len(runs) * panel + CELL + MARGIN), "white")
        draw = ImageDraw.Draw(image)
        draw.text((MARGIN, MARGIN), "\n".join(prompt), BLACK, mono, spacing=14)
        for y, run, answer, end in zip(range(top, image.height, panel), runs, answers, ends):
            done = step >= end
            marks = " " * len(run["texts"]) if done else run["rows"][step]
            ran = sum(mark in "*#o" for row in run["rows"][:step + 1] for mark in row)
            when = f"done in {end} steps" if done else f"step {step + 1}"
            when += f": {ran:,}{run['also'] * done} of {full:,} positions run"
            draw.text((MARGIN, y - 2), run["name"], BLACK, bold)
            draw.text((2 * BAR, y), when, BLUE if done else BLACK, sans)
            for share, colour in ((1, COLOURS["."]), (ran / full, BLUE)):
                draw.rectangle((BAR, y + 4, BAR + (BAR - MARGIN) * share, y + 26), colour)
            cells(y + LINE, " " * P, marks, room / P, STRIP)
            cells(y + LINE + STRIP + 4, [" " * len(text) if mark in "o_" else text
                                         for text, mark in zip(answer, marks[P:])], marks[P:])
        cells(image.height - MARGIN - CELL, [f" {MARKS[mark][0]} " for mark in COLOURS], COLOURS)
        frames.append(image)
    return frames

PICTURES = {"map.png": (draw_map, "watch"), "settle.png": (draw_settle, "settle"),
            "length.png": (draw_length, "length"), "pareto.png": (draw_pareto, "league"),
            "watch.gif": (draw_watch, "watch")}
ELSEWHERE = dict(length="bench.py --scale --json length.json",
                 league="accuracy.py --json league.json")

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
    numbers |= {part: read_numbers(os.path.join(args.dir, f"{part}.json")) for part in ELSEWHERE}
    for name, (how, part) in PICTURES.items():
        path = os.path.join(args.dir, name)
        if not numbers.get(part):
            print(f"{path}: not drawn, because it needs {ELSEWHERE.get(part, '--measure ' + part)}")
            continue
        fig = how(plt, numbers[part])
        if name.endswith(".gif"):
            # one palette for all, so that a frame is stored as what has changed
            palette = fig[2].quantize(32, Image.Quantize.MAXCOVERAGE, kmeans=3)
            image, *rest = (frame.quantize(palette=palette, dither=0) for frame in fig)
            more = dict(format="gif", save_all=True, append_images=rest, loop=0,
                        duration=[900] * 4 + [120] * (len(rest) - 4) + [5000])
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
    p.add_argument("--guider", default="guider", help="of the guided run (guider)")
    p.add_argument("--dir", default=os.path.join(ROOT, "assets"), help="of figures.json (assets)")
    args = p.parse_args(argv)
    check_bounds(args, n=1)
    pick_device(args.device)  # one that is not there is refused even for drawing
    return draw(args) if args.measure is None else measure(args)

if __name__ == "__main__":
    launch(main)
