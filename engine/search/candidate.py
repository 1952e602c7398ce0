"""A candidate while it is judged: its recipe, its file, and its model, which are made when first asked for."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergemill.engine.plan.make import make_plan
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import Recipe
from mergemill.engine.recipe.templates import Values
from mergemill.engine.runs.options import RunOptions
from mergemill.engine.runs.running import run_as
from mergemill.engine.search.state import CANDIDATES, write_file


@dataclass(slots=True)
class OpenCandidate:
    """A recipe, and what of it was made for its judges."""

    values: Values
    recipe: Recipe
    folder: Path
    """Of its model; its recipe lies beside that."""
    options: RunOptions
    bytes_read: int = 0
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

    def write_values(self) -> str:
        """Return the values as JSON."""
        return json.dumps({name: list(x) if isinstance(x, tuple) else x for name, x in self.values.items()})


@contextmanager
def open_candidate(
    number: int, values: Values, recipe: Recipe, folder: Path, options: RunOptions
) -> Iterator[OpenCandidate]:
    """Yield a candidate of the search in `folder`; what was made of it is removed after."""
    made = folder / CANDIDATES / str(number)
    made.parent.mkdir(exist_ok=True)
    try:
        yield OpenCandidate(values, recipe, made, options)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(made)
        made.with_suffix(".yml").unlink(missing_ok=True)
