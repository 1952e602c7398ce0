"""A table of perplexities: SmolLM2-135M, four short fine-tunes of it, and what every method makes of these.

    python tests/bench/perplexities.py FOLDER [--methods ties,tsv] [--steps 32]

Each fine-tune is trained on the first three quarters of one text, and everything is judged on the last quarters. The
texts are files of Python and of this repository, and names of time zones. Run with ``OMP_NUM_THREADS=1`` where other
work is on the cores: torch's threads wait for each other there. What was trained stays in FOLDER and is used again, as
do rows of the same recipe: the command goes on where it stopped. Merges are removed once they are judged. Settings are
the methods' own defaults, which are their papers' wherever these have some, but for `PAPERS` and `OURS`; none was
searched.
"""

import argparse
import heapq
import inspect
import json
import math
import pydoc_data.topics
import shutil
import sys
import time
import zoneinfo
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from smollm2 import make_smollm2

from mergemill.engine import merge
from mergemill.engine.methods.catalogue import find_methods

ROOT = Path(__file__).parents[2]
WINDOW, JUDGED = 96, 4  # tokens; windows of each text that are judged
CHARACTERS = 24_000  # of each text at most
ALONE = ("arcee_fusion", "expo", "nearswap", "passthrough")  # of one fine-tune, the first
SLOW = ("iso_c", "iso_cts", "star", "tsv", "cart", "dc_merge", "wudi", "svc", "subspace_boost", "orthomerge")  # last
PAIRS = ("nuslerp", "slerp")  # of the first two
# What the sources give, where the method's own default is another or none.
PAPERS: Mapping[str, Mapping[str, Any]] = {
    "breadcrumbs": {"weight": 0.3, "density": 0.143, "gamma": 0.007},  # between the 85th and the 99.3th percentile
    "breadcrumbs_ties": {"density": 0.143, "gamma": 0.007},
    "consensus_ties": {"density": 0.2},
    "dare_linear": {"density": 0.1},
    "dare_ties": {"density": 0.1},
    "expo": {"weight": 1.5},  # alpha of 0.5, of the values that are tried there
    "linear": {"weight": 1.0},
    "nearswap": {"t": 0.0001},
    "sce": {"select_topk": 0.1},
    "ties": {"weight": 1.0, "density": 0.2},  # without held-out data
}
# What they search on data that is held out, or leave open: for task vectors, their mean.
OURS: Mapping[str, Mapping[str, Any]] = {
    "breadcrumbs_ties": {"weight": 0.3},
    "consensus_ta": {"weight": 0.25},
    "consensus_ties": {"weight": 1.0},
    "dare_linear": {"weight": 0.25},
    "dare_ties": {"weight": 0.25},
    "della": {"weight": 0.25, "density": 0.3},
    "della_linear": {"weight": 0.25, "density": 0.3},
    "lines": {"weight": 0.25},
    "metagpt": {"weight": 1.0},
    "multislerp": {"weight": 1.0},
    "nuslerp": {"weight": 0.5},
    "slerp": {"t": 0.5},
    "subspace_boost": {"weight": 0.25},
    "svc": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.25},
}
# Around task arithmetic.
BESIDE: Mapping[str, Mapping[str, Any]] = {
    "lines": {"coefficients": {"method": "lines", "alpha": 0.25, "beta": 0.75}},
    "metagpt": {"coefficients": {"method": "metagpt"}},
    "svc": {"post": [{"method": "svc"}]},
    "subspace_boost": {"post": [{"method": "subspace_boost"}]},
}


def make_texts() -> dict[str, str]:
    """Return a licence, code, a manual and a table of records."""
    topics = pydoc_data.topics.topics
    return {
        "licence": (ROOT / "LICENSE").read_text(),
        "code": inspect.getsource(heapq)[:CHARACTERS],
        "manual": "\n\n".join(topics[name] for name in sorted(topics)[:12])[:CHARACTERS],
        "table": json.dumps(list_zones(), indent=1)[:CHARACTERS],
    }


def list_zones() -> list[dict[str, Any]]:
    """Return the time zones that this machine knows as records, made of their names."""
    names = sorted(name for name in zoneinfo.available_timezones() if "/" in name)
    return [dict(zip(("area", "city"), name.split("/", 1), strict=True), number=i) for i, name in enumerate(names)]


def split(text: str) -> tuple[str, str]:
    """Return what is trained on and what is judged, cut at a line."""
    cut = text.index("\n", len(text) * 3 // 4)
    return text[:cut], text[cut:]


def train(base: Path, folder: Path, text: str, steps: int) -> None:
    """Write a fine-tune, by AdamW on windows in the text's order, and beside it the importances of its weights."""
    part = folder.with_suffix(".part")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for step in range(steps):
        start = step * WINDOW % (len(ids) - WINDOW)
        window = ids[None, start : start + WINDOW]
        optimizer.zero_grad()
        model(input_ids=window, labels=window).loss.backward()
        optimizer.step()
    del optimizer
    model.zero_grad()
    measure(model, ids, folder)
    model.bfloat16().save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def measure(model: Any, ids: torch.Tensor, folder: Path, windows: int = 2) -> None:
    """Write beside a folder each weight's squared gradients, and the Gram matrix of each linear layer's inputs."""
    grams: dict[str, torch.Tensor] = {}

    def gather(name: str) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            rows = given[0].detach().reshape(-1, given[0].shape[-1])
            grams[name] = grams.get(name, 0) + rows.T @ rows

        return hook

    linear = [(f"{name}.weight", each) for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)]
    hooks = [each.register_forward_pre_hook(gather(name)) for name, each in linear if "lm_head" not in name]
    squares = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for i in range(windows):
        start = i * WINDOW % (len(ids) - WINDOW)
        window = ids[None, start : start + WINDOW]
        model.zero_grad()
        model(input_ids=window, labels=window).loss.backward()
        for name, weight in model.named_parameters():
            squares[name] += weight.grad.square()
    for hook in hooks:
        hook.remove()
    for kind, tensors in (("fisher", squares), ("gram", grams)):
        found = Path(f"{folder}-{kind}")
        found.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, found / "model.safetensors")


def judge(folder: Path, tokens: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the perplexity of each text's windows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    with torch.inference_mode():
        for name, windows in tokens.items():
            found[name] = math.exp(float(model(input_ids=windows, labels=windows).loss))
    return found


def make_tokens(base: Path, texts: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return windows ``[windows, WINDOW]`` of what is judged of each text."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = {name: tokenizer(split(text)[1], return_tensors="pt")["input_ids"][0] for name, text in texts.items()}
    counts = {name: min(JUDGED, len(each) // WINDOW) for name, each in ids.items()}
    return {name: each[: counts[name] * WINDOW].view(counts[name], WINDOW) for name, each in ids.items()}


def make_recipes(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each method's recipe, by the method's name."""
    base = str(folder / "base")
    every = [{"model": str(folder / name)} for name in names]
    for name, method in sorted(find_methods().items()):
        models: list[dict[str, Any]] = every[:1] if name in ALONE else every[:2] if name in PAIRS else every
        if method.takes_importances:
            kind = "gram" if name == "regmean" else "fisher"
            models = [{**each, "importance": {"model": f"{each['model']}-{kind}"}} for each in models]
        recipe: dict[str, Any] = {"merge_method": name, "models": models, "parameters": find_settings(name)}
        if method.base == "first of two":
            recipe["base_model"] = base if name in ALONE else every[0]["model"]
            recipe["models"] = [{"model": recipe["base_model"]}, models[-1]]
        elif method.base == "required":
            recipe["base_model"] = base
        yield name, recipe
    for name, said in BESIDE.items():
        beside = {"merge_method": "task_arithmetic", "base_model": base, "models": every}
        yield name, beside | said | {"parameters": find_settings(name)}


def find_settings(name: str) -> dict[str, Any]:
    """Return what a method is given beside its defaults."""
    return {**PAPERS.get(name, {}), **OURS.get(name, {})}


def judge_merge(recipe: Mapping[str, Any], out: Path, tokens: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Merge and judge; return what is kept of a row."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.process_time()
    merge(dict(recipe), out, memory="12GiB")  # orthomerge takes 9.4 GiB of the embedding
    seconds = time.process_time() - started
    found = judge(out, tokens)
    shutil.rmtree(out)
    return {"recipe": recipe, "found": found, "seconds": seconds}


def say_settings(name: str) -> str:
    """Return the settings as the table has them; a star for ours."""
    given = [(key, value, "") for key, value in PAPERS.get(name, {}).items()]
    given += [(key, value, "\\*") for key, value in OURS.get(name, {}).items()]
    given += [(key, value, "\\*") for key, value in BESIDE.get(name, {}).get("coefficients", {}).items()]
    return ", ".join(f"{key} {value}{star}" for key, value, star in given if key != "method")


def tell(name: str, found: Mapping[str, float], settings: str = "", seconds: float | None = None) -> None:
    """Print a row of the table."""
    mean = math.exp(sum(map(math.log, found.values())) / len(found))
    took = "" if seconds is None else f"{seconds:.0f}"
    say(f"| {name} | {settings} | {' | '.join(f'{x:.2f}' for x in found.values())} | {mean:.2f} | {took} |")


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Make what is not there yet, and print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", default="all")
    parser.add_argument("--steps", type=int, default=32)
    asked = parser.parse_args()
    torch.manual_seed(0)
    texts, base = make_texts(), asked.folder / "base"
    if not base.exists():
        make_smollm2(base)
    kept = asked.folder / "rows.json"
    for name, text in texts.items():
        if not (asked.folder / name / "config.json").exists():
            train(base, asked.folder / name, split(text)[0], asked.steps)
            kept.unlink(missing_ok=True)
    tokens = make_tokens(base, texts)
    say(f"| | settings | {' | '.join(texts)} | mean | CPU s |\n|---|{'---|' * (len(texts) + 3)}")
    rows = json.loads(kept.read_text()) if kept.exists() else {}
    for name in ("base", *texts):
        if name not in rows:
            rows[name] = {"found": judge(asked.folder / name, tokens)}
            kept.write_text(json.dumps(rows, indent=1))
        tell(name if name == "base" else f"fine-tune on {name}", rows[name]["found"])
    recipes = dict(make_recipes(asked.folder, tuple(texts)))
    for name in sorted(recipes, key=lambda each: SLOW.index(each) if each in SLOW else -1):
        if asked.methods not in ("all", name) and name not in asked.methods.split(","):
            continue
        if rows.get(name, {}).get("recipe") != recipes[name]:
            rows[name] = judge_merge(recipes[name], asked.folder / "merged", tokens)
            kept.write_text(json.dumps(rows, indent=1))
        marked = f"`{name}` (first)" if name in ALONE else f"`{name}` (first two)" if name in PAIRS else f"`{name}`"
        tell(marked, rows[name]["found"], say_settings(name), rows[name]["seconds"])


if __name__ == "__main__":
    main()
