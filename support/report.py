"""What sample.py prints in the end: the answers, and a table of the runs."""
import json

import torch

from support.cli import printable
from support.evaluate import is_right, text_of
from support.watch import label, name, rule

def print_json(objects):
    # flushed, so that a pipe sees each batch when it is done
    print(*map(json.dumps, objects), sep="\n", flush=True)

def report(model, tokenizer, questions, runs, answers, seconds, repeats, batch_size):
    """Prints the answers and the table. Of graded problems it shows one and counts all."""
    rights = [right for *_, right in questions]
    graded = None not in rights
    widest = max(len(name(how)) for how, _ in runs)
    said = [[text_of(ids, model, tokenizer) for ids, *_ in run] for run in answers]
    for j, (question, prompt_ids, right) in enumerate(questions[:1] if graded else questions):
        print(printable(question) if question is not None else f"ids {prompt_ids}")
        for i, (how, _) in enumerate(runs):
            mark = ("right  " if is_right(said[i][j], right) else "wrong  ") if graded else ""
            text = printable(said[i][j]) if tokenizer else answers[i][j][0]
            print(f"  {name(how):{widest}}  {mark}{text}")
        print()
    n, weight, how = len(questions), model.wte.weight, runs[0][0]
    lengths = [len(ids) for _, ids, _ in questions]
    lengths = " to ".join(map(str, sorted({min(lengths), max(lengths)})))
    print(f"{weight.device.type}, {str(weight.dtype)[6:]}, threads: {torch.get_num_threads()}; "
          f"prompts: {n} of {lengths} tokens in batches of {batch_size}; answers: "
          f"{how['gen_length']} tokens (EOS padding included)"
          + f" in blocks of {how['block_length']}" * bool(how["block_length"])
          + f"; medians of {repeats}" * (repeats > 1))
    counts = [sum(map(is_right, run, rights)) for run in said] if graded else None
    print(table(runs, answers, seconds, counts))

def table(runs, answers, seconds, counts):
    """-> a line a run. counts: its right answers. Columns without a value are left out."""
    lines = ["cache,order,refresh,steps,exact,positions run,fewer by,guider's,seconds,tokens/s,"
             "speed-up,same tokens".split(",")]
    for i, (how, base) in enumerate(runs):
        ran, read = (sum(getattr(result, field)[row] for _, result, row in answers[i])
                     for field in ("positions_run", "guider_positions"))
        # fewer steps are compared with all of them
        full = sum(result.positions_full[row] for _, result, row in answers[0])
        tokens, G = len(answers[i]) * how["gen_length"], how["gen_length"]
        refresh = how.get("refresh", "-") or G  # local's None
        if "refresh" in how and refresh * G >= how["block_length"] * (how["steps"] or G):
            refresh = "never"
        # under a threshold each prompt has its own
        steps = how["steps"] or sum(r.steps[row] for _, r, row in answers[i]) / len(answers[i])
        exact = f"{counts[i]}/{len(answers[i])}" if counts else "-"
        times = (f"{seconds[i]:.2f}", f"{tokens / seconds[i]:,.0f}") if seconds else "--"
        compared = "--"
        if base is not None:
            pairs = ((x, y) for (a, *_), (b, *_) in zip(answers[i], answers[base])
                     for x, y in zip(a, b))
            compared = (f"{seconds[base] / seconds[i]:.2f}x" if seconds else "-",
                        f"{100 * sum(x == y for x, y in pairs) / tokens:.0f}%")
        lines.append([label(how), rule(how), str(refresh), f"{steps:.1f}".removesuffix(".0"), exact,
                      f"{ran:,}", f"{full / ran:.2f}x", f"{read:,}" if read else "-", *times,
                      *compared])
    columns = [column for column in zip(*lines) if {*column[1:]} != {"-"}]
    for c, column in enumerate(columns):
        align, width = str.ljust if c < 2 else str.rjust, max(map(len, column))
        columns[c] = [align(cell, width) for cell in column]
    return "\n".join(map("  ".join, zip(*columns)))
