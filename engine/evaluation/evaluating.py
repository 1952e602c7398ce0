"""Judging models on a text, layer by layer and without writing them: perplexity, bits per byte, entropy.

Several models over the same sources go through together: of a layer each source slice is read once for all of them,
where the memory holds it.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergemill.engine.checkpoint.checkpoint import read_small
from mergemill.engine.errors import PlanError
from mergemill.engine.evaluation.making import MadeTensors, open_made
from mergemill.engine.evaluation.memory import find_texts, keep_tied
from mergemill.engine.evaluation.passing import ShellLayout, find_layout, run_layers
from mergemill.engine.evaluation.racing import race
from mergemill.engine.evaluation.scoring import Scores, score_states, score_whole
from mergemill.engine.evaluation.shell import Shell, load_transformers, open_shell
from mergemill.engine.evaluation.sums import Evaluation, average_examples, sum_windows
from mergemill.engine.evaluation.texts import (
    WINDOW,
    ScoredTokens,
    make_examples,
    make_windows,
    read_examples,
    read_text,
)
from mergemill.engine.plan.make import make_plan
from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import GivenRecipe, load_recipe
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.store import ENVIRONMENT, Storage, join_options, make_storage
from mergemill.engine.tensors.lazy import torch

MEMORY = "4GiB"
OPENED = (".json", ".model", ".txt", ".jinja")
TOGETHER = (
    512  # tokens that go through a layer at a time, or one text: whatever the memory, so that no score hangs on it
)


@dataclass(frozen=True, slots=True)
class TextSource:
    """What models are judged on: windows of a text, or with `examples` the outputs of examples."""

    text: str = ""
    """The path of a UTF-8 file."""
    examples: str = ""
    """The path of a file with an object ``{input, output}`` a line."""
    window: int = WINDOW
    stride: int | None = None
    """Ids from one window to the next; else `window`."""
    windows: int | None = None
    """So many at equal distances; else all."""


def evaluate(
    given: GivenRecipe,
    source: TextSource,
    *,
    memory: str | int = MEMORY,
    whole: bool = False,
    storage: Mapping[str, Mapping[str, Any]] | None = None,
) -> Evaluation:
    """Judge a model, or what a recipe would make, on a text, without writing it.

    given: the path of a model, or a recipe as `make_plan` takes it. memory: what may be taken beyond the process
    itself. whole: the model is in memory as a whole. storage: as of `make_plan`. Raises `InputError`.
    """
    recipe = load_recipe(make_alone_of(str(given)) if names_model(given) else given)
    options = join_options(storage or {}, recipe.storage)
    plan = make_plan(recipe, storage=options)
    (found,) = evaluate_plans([plan], source, memory, make_storage(options), whole=whole)
    return found


def names_model(given: object) -> bool:
    """Whether a text names a model and not a recipe.

    >>> names_model("models/a"), names_model("recipe.yml"), names_model("{merge_method: linear}")
    (True, False, False)
    """
    text = str(given) if isinstance(given, str | Path) else "\n"
    return "\n" not in text and not text.startswith("{") and Path(text).suffix not in (".yml", ".yaml", ".json")


def make_alone_of(model: str) -> dict[str, Any]:
    """Return the recipe whose result is a model itself."""
    return {"merge_method": "passthrough", "models": [{"model": model}]}


def evaluate_plans(
    plans: Sequence[Plan],
    source: TextSource,
    memory: str | int = MEMORY,
    storage: Storage = ENVIRONMENT,
    *,
    whole: bool = False,
    racing: bool = False,
) -> list[Evaluation]:
    """Judge the models that plans would write, all of one config and tokenizer, on a text.

    memory: what may be taken beyond the process itself. whole: each model is in memory as a whole, whatever that takes.
    racing: those that are behind after half of the windows are judged no further.
    Raises `InputError` where the text or the models cannot be judged, and `PlanError` with the number that would do
    where the memory is too little.
    """
    started = time.perf_counter()
    memory_bytes = parse_size(memory, what="--memory")
    where = plans[0].origin.name or plans[0].origin.title
    with open_small_files(plans, storage) as folder:
        shell = open_shell(folder, where)
        tokens = _read_tokens(folder, source, where)
    models = [open_made(plan, Workplace(memory_bytes // 2, 1, storage=storage)) for plan in plans]
    layout = find_layout(shell, list(models[0].tensors))
    way = _judge_whole if whole else _judge_layers

    def judge(places: Sequence[int], some: ScoredTokens) -> list[Scores]:
        chosen = [models[place] for place in places]
        found = way(shell, layout, chosen, some, memory_bytes // 2)  # the other half is for what is read
        return [(loss[:, :-1], entropy[:, :-1]) for loss, entropy in found]

    everyone = range(len(models))
    found = race(tokens, len(models), judge) if racing else [(*each, False) for each in judge(everyone, tokens)]
    seconds = round((time.perf_counter() - started) / len(models), 3)
    sum_up = average_examples if source.examples else sum_windows
    return [
        replace(sum_up(tokens, loss, entropy), raced=raced, bytes_read=made.read_bytes, seconds=seconds)
        for made, (loss, entropy, raced) in zip(models, found, strict=True)
    ]


def _judge_layers(
    shell: Shell, layout: ShellLayout, models: Sequence[MadeTensors], tokens: ScoredTokens, memory_bytes: int
) -> list[Scores]:
    """Return loss and entropy of each position of each model, layer by layer, as many texts at once as memory holds."""
    rows = max(1, TOGETHER // tokens.ids.shape[1])
    texts = find_texts(shell, layout, models, tokens, rows, memory_bytes)
    found: list[list[Scores]] = [[] for _ in models]
    for start in range(0, len(tokens.ids), texts):
        ids = tokens.ids[start : start + texts]
        labels = torch.roll(ids, -1, dims=1)
        with keep_tied(layout, models) as kept:
            hidden = run_layers(shell, layout, models, ids, rows, kept)
            with models[0].share(models[1:], layout.head) if kept is None else nullcontext(kept) as work:
                for place, made in enumerate(models):
                    own = hidden[place * len(ids) : (place + 1) * len(ids)]
                    found[place].append(score_states(shell, layout, made.make(layout.head, work), own, labels, rows))
    return [_join(each) for each in found]


def _judge_whole(
    shell: Shell, layout: ShellLayout, models: Sequence[MadeTensors], tokens: ScoredTokens, memory_bytes: int
) -> list[Scores]:
    """Return the same of models that are in memory as a whole, one after the other."""
    found = []
    for made in models:
        shell.fill_whole(made.make(made.tensors))
        rows = [tokens.ids[start : start + 1] for start in range(len(tokens.ids))]
        found.append(_join([score_whole(shell, ids, torch.roll(ids, -1, dims=1)) for ids in rows]))
        shell.take_out(shell.model)
    return found


def _join(parts: Sequence[Scores]) -> Scores:
    return torch.cat([loss for loss, _ in parts]), torch.cat([entropy for _, entropy in parts])


@contextmanager
def open_small_files(plans: Sequence[Plan], storage: Storage) -> Iterator[Path]:
    """Yield a folder with config and tokenizer; `PlanError` where the models have different ones."""
    first, *others = (_read_files(plan, storage) for plan in plans)
    for other in others:
        for name in ("config.json", "tokenizer.json"):
            if other.get(name) != first.get(name):
                raise PlanError(f"{plans[0].origin.name}: candidates of one generation differ in {name}")
    with tempfile.TemporaryDirectory(prefix="mergemill-") as folder:
        for name, data in first.items():
            (Path(folder) / name).write_bytes(data)
        yield Path(folder)


def _read_files(plan: Plan, storage: Storage) -> dict[str, bytes]:
    """Return the files that transformers opens a model by; code is none of them."""
    wanted = [file for file in plan.files if Path(file.name).name == file.name and Path(file.name).suffix in OPENED]
    return {
        file.name: read_small(file.copied, file.name, storage) if file.copied is not None else file.data or b""
        for file in wanted
    }


def _read_tokens(folder: Path, source: TextSource, where: str) -> ScoredTokens:
    transformers = load_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (ValueError, KeyError, OSError, ImportError) as error:
        first = str(error).strip().split("\n")[0]
        raise PlanError(f"{where}: transformers cannot open the tokenizer: {first}") from None
    if source.examples:
        return make_examples(tokenizer, read_examples(source.examples))
    return make_windows(
        tokenizer,
        read_text(source.text),
        window=source.window,
        stride=source.stride or source.window,
        windows=source.windows,
    )
