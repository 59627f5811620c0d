"""The rules of the house: who imports whom, sizes, and READMEs that name only what exists."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

BUDGETS = {"dkv_min.py": 300, "model.py": 250, "train_tiny.py": 280, "sample.py": 250}
READMES = ["README.md", "scripts/README.md", "tests/README.md", "checkpoints/README.md"]
FOLDERS = ["", "support/", "caches/", "scripts/", "tests/", "tests/campaigns/"]
SOURCES = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8")
           for folder in FOLDERS for p in sorted(ROOT.glob(f"{folder}*.py"))}
PRODUCT = {name[:-3].replace("/", "."): ast.parse(text) for name, text in SOURCES.items()
           if not name.startswith("tests/") and not name.endswith("__init__.py")}
LEAVES = {"support.checkpoint", "support.tokenizer", "support.fast_cpu"}
ENGINE = {"support.batch", "support.settings", "support.decoding"}
CACHES = {"caches"} | {name for name in PRODUCT if name.startswith("caches.")}
SUPPORT = {name for name in PRODUCT if name.startswith("support.")}
# what a README may name that is not in the repository: what commands write, and others' files
OUTPUTS = {"my.pt", "my.txt", "toy.pt", "checkpoints/llada.pt", "answers.jsonl", "questions.txt",
           "config.json", "tokenizer.json", "tokenizer_config.json", "generate.py", "twin.pt",
           "gsm8k.jsonl", "train.jsonl", "prompts.jsonl", "problems.json"}

def imported(nodes):
    """The modules of ours that these nodes import."""
    names, folders = set(), ("support", "scripts", "caches", "tests")
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & {*PRODUCT}
            names |= inside if node.module in folders and inside else {node.module}
    return {n for n in names if n in PRODUCT or n.split(".")[0] in folders}

@pytest.mark.parametrize("name", [name for name in PRODUCT if not name.startswith("scripts.")])
def test_who_imports_whom(name):
    caches = {"dkv_min", "model", "support.batch", "support.decoding"}
    may = dict.fromkeys(LEAVES, set()) | dict.fromkeys(ENGINE, ENGINE)
    may |= {"model": LEAVES, "dkv_min": ENGINE | {"model"}}
    rest = caches if name.startswith("caches.") else SUPPORT | caches | CACHES
    assert imported(PRODUCT[name].body) <= may.get(name, rest)
    anywhere = imported(ast.walk(PRODUCT[name]))
    assert not {n for n in anywhere if n.split(".")[0] in ("scripts", "tests")}

def test_sizes():
    lines = {name: text.splitlines() for name, text in SOURCES.items()}
    sizes = [("lines in all", sum(map(len, lines.values())), 9820),
             ("lines in tests/", sum(len(lines[n]) for n in lines if n.startswith("tests/")), 3990),
             ("bytes of README.md", (ROOT / "README.md").stat().st_size, 14 * 1024)]
    sizes += [(f"line {i} of {n}", len(x), 100) for n in lines for i, x in enumerate(lines[n], 1)]
    for name, most in BUDGETS.items():
        sizes.append((f"lines of {name}", len(lines[name]), 1.2 * most))
        sizes += [(f"lines of {f.name} in {name}", f.end_lineno - f.lineno + 1, 60)
                  for f in ast.walk(PRODUCT[name[:-3]]) if isinstance(f, ast.FunctionDef)]
    loops = [f for name in CACHES & {*PRODUCT} for f in PRODUCT[name].body
             if isinstance(f, ast.FunctionDef) and f.name.startswith("generate_")]
    for f in loops:  # without the docstring
        n = f.end_lineno - f.body[0].end_lineno + f.body[0].lineno - f.lineno
        sizes += [(f"lines of {f.name}", n, 40), (f"-lines of {f.name}", -n, -15)]
    found = [f"{what}: {n}, at most {most}" for what, n, most in sizes if n > most]
    assert not found, "\n".join(found)

@pytest.mark.parametrize("readme", READMES)
def test_a_readme_names_only_what_exists(readme):
    text, odd = (ROOT / readme).read_text(encoding="utf-8"), []
    blocks = re.findall(r"(?ms)^```.*?^```", text)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", text))
    for script, flags in re.findall(r"(\S+\.py)\b((?: +[^\s`&|;]+)*)", "\n".join(blocks + spans)):
        name = next((s for s in SOURCES if s == script or s.endswith(f"/{script}")), script)
        odd += [script] if name not in {*SOURCES, *OUTPUTS} else []
        known = SOURCES.get(name, "") + SOURCES["support/cli.py"] + '"--help"'
        odd += [f"{script} {flag}" for flag in re.findall(r"(?<= )--[a-z][a-z-]*", flags)
                if f'"{flag}"' not in known]
    odd += [link for link in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", text)
            if not ((ROOT / readme).parent / link).exists()]
    words = {word.rstrip(",.:") for span in spans for word in span.split()} - OUTPUTS
    named = [w for w in words if re.fullmatch(r"[\w./-]+\.(pt|md|txt|json|jsonl|npz|png|gif)", w)]
    ours = {p.name for p in ROOT.glob("*/*")}
    odd += [w for w in named if not (ROOT / w).exists() and w not in ours]
    assert not odd, "\n".join(odd)

def test_every_module_imports_on_other_systems():
    """Windows has none of these."""
    hide = "import sys; sys.modules |= dict.fromkeys(['fcntl', 'termios', 'resource', 'pty'])\n"
    script = hide + "\n".join(f"import {name}" for name in PRODUCT)
    p = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
