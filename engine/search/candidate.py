"""A candidate while it is judged: its recipe, its file, and its model, which are made when first asked for."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergemill.engine.evaluation.evaluating import TextSource, evaluate_plans
from mergemill.engine.evaluation.judging import MEMORY, Judges
from mergemill.engine.evaluation.sums import Evaluation
from mergemill.engine.plan.make import make_plan
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import Recipe
from mergemill.engine.recipe.templates import Values
from mergemill.engine.runs.options import RunOptions
from mergemill.engine.runs.running import run_as
from mergemill.engine.search.state import CANDIDATES, write_file
from mergemill.engine.storage.store import join_options, make_storage


@dataclass(slots=True)
class OpenCandidate:
    """A recipe, and what of it was made for its judges."""

    values: Values
    recipe: Recipe
    folder: Path
    """Of its model; its recipe lies beside that."""
    options: RunOptions
    judges: Judges | None = None
    """Workers that judge it by texts; None where this process does."""
    bytes_read: int = 0
    evaluations: dict[TextSource, Evaluation] = field(default_factory=dict)
    """What is known of it already, by the text."""
    _made: set[str] = field(default_factory=set)

    def make_model(self) -> str:
        """Return the folder of the merged model."""
        if "model" not in self._made:
            quiet = replace(self.options, progress=False)
            self.bytes_read += run_as(self.plan(), self.folder, quiet).read_bytes
            self._made.add("model")
        return str(self.folder)

    def make_recipe(self) -> str:
        """Return the path of the recipe."""
        path = self.folder.with_suffix(".yml")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, self.recipe.text.encode())
        return str(path)

    def plan(self) -> Plan:
        """Return the plan of its merge."""
        return make_plan(self.recipe, storage=self.options.find_storage())

    def evaluate(self, source: TextSource) -> Evaluation:
        """Return what its model makes of a text; nothing is written for it."""
        if source not in self.evaluations:
            evaluate_together([self], [source])
        return self.evaluations[source]

    def remove(self) -> None:
        """Remove what was written of it."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder)
        self.folder.with_suffix(".yml").unlink(missing_ok=True)
        self._made.clear()

    def write_values(self) -> str:
        """Return the values as JSON."""
        return json.dumps({name: list(x) if isinstance(x, tuple) else x for name, x in self.values.items()})


def evaluate_together(
    candidates: Sequence[OpenCandidate], sources: Sequence[TextSource], raced: TextSource | None = None
) -> None:
    """Have candidates know what their models make of texts; they share reads.

    raced: of these texts the one on half of which those that are behind are judged no further. Raises what planning
    or judging any of them does.
    """
    options = candidates[0].options
    storage = make_storage(join_options(options.find_storage(), candidates[0].recipe.storage))
    plans = [candidate.plan() for candidate in candidates]
    for source in sources:
        judges = candidates[0].judges
        found = evaluate_plans(plans, source, options.memory or MEMORY, storage, racing=source == raced, judges=judges)
        for candidate, evaluation in zip(candidates, found, strict=True):
            candidate.evaluations[source] = evaluation
            candidate.bytes_read += evaluation.bytes_read


@contextmanager
def open_candidate(
    number: int | str,
    values: Values,
    recipe: Recipe,
    folder: Path,
    options: RunOptions,
    judges: Judges | None = None,
) -> Iterator[OpenCandidate]:
    """Yield a candidate of the search in `folder`; what was made of it is removed after."""
    made = folder / CANDIDATES / str(number)
    made.parent.mkdir(exist_ok=True)
    candidate = OpenCandidate(values, recipe, made, options, judges)
    try:
        yield candidate
    finally:
        candidate.remove()
