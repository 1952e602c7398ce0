"""Judging models on a text, layer by layer and without writing them: perplexity, bits per byte, entropy.

Several models over the same sources go through together: of a layer each source slice is read once for all of them,
where the memory holds it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from mergemill.engine.checkpoint.checkpoint import read_small
from mergemill.engine.errors import PlanError
from mergemill.engine.evaluation.judging import (
    MEMORY,
    JudgeJob,
    Judges,
    judge_here,
    judge_there,
    open_judges,
    opened,
)
from mergemill.engine.evaluation.racing import race
from mergemill.engine.evaluation.shell import load_transformers
from mergemill.engine.evaluation.sums import Evaluation, RowSums, average_examples, sum_windows
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
from mergemill.engine.runs.worker.options import WorkerKeywords, WorkerOptions
from mergemill.engine.storage.store import ENVIRONMENT, Storage, join_options, make_storage

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
    given: GivenRecipe, source: TextSource, *, whole: bool = False, **options: Unpack[WorkerKeywords]
) -> Evaluation:
    """Judge a model, or what a recipe would make, on a text, without writing it.

    given: the path of a model, or a recipe as `make_plan` takes it. whole: the model is in memory as a whole. options:
    `memory`, what may be taken beyond the process itself, and `workers`, `scheduler` or `cluster`, over which the text
    is divided; see `WorkerOptions`. Raises `InputError`.
    """
    asked = WorkerOptions(**options)
    recipe = load_recipe(make_alone_of(str(given)) if names_model(given) else given)
    said = join_options(asked.find_storage(), recipe.storage)
    plan = make_plan(recipe, storage=said)
    memory = MEMORY if asked.memory is None else asked.memory
    with open_judges(plan, asked) as judges:
        (found,) = evaluate_plans([plan], source, memory, make_storage(said), whole=whole, judges=judges)
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
    judges: Judges | None = None,
) -> list[Evaluation]:
    """Judge the models that plans would write, all of one config and tokenizer, on a text.

    memory: what may be taken beyond the process itself. whole: each model is in memory as a whole, whatever that takes.
    racing: those that are behind after half of the windows are judged no further. judges: workers, over which the texts
    are divided; each reads the models for itself, in its own memory.
    Raises `InputError` where the text or the models cannot be judged, and `PlanError` with the number that would do
    where the memory is too little.
    """
    started = time.perf_counter()
    memory_bytes = parse_size(memory, what="--memory")
    where = plans[0].origin.name or plans[0].origin.title
    files = read_small_files(plans, storage)
    with opened(files) as folder:
        tokens = _read_tokens(folder, source, where)
    reads = [0] * len(plans)

    def judge(places: Sequence[int], some: ScoredTokens) -> list[RowSums]:
        job = JudgeJob(where, files, tuple(plans[place] for place in places), some, memory_bytes, storage, whole)
        found = judge_here(job) if judges is None else judge_there(job, judges)
        for place, read_bytes in zip(places, found.reads, strict=True):
            reads[place] += read_bytes
        return list(found.sums)

    everyone = range(len(plans))
    sums = race(tokens, len(plans), judge) if racing else [(each, False) for each in judge(everyone, tokens)]
    seconds = round((time.perf_counter() - started) / len(plans), 3)
    sum_up = average_examples if source.examples else sum_windows
    return [
        replace(sum_up(tokens, own), raced=raced, bytes_read=read_bytes, seconds=seconds)
        for (own, raced), read_bytes in zip(sums, reads, strict=True)
    ]


def read_small_files(plans: Sequence[Plan], storage: Storage) -> dict[str, bytes]:
    """Return config and tokenizer, by the names of their files; `PlanError` where the models have different ones."""
    first, *others = (_read_files(plan, storage) for plan in plans)
    for other in others:
        for name in ("config.json", "tokenizer.json"):
            if other.get(name) != first.get(name):
                raise PlanError(f"{plans[0].origin.name}: candidates of one generation differ in {name}")
    return first


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
