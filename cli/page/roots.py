"""What the page may reach: files below its root, and storage by URLs of known kinds.

A path is resolved first, links and ``..`` with it, so that only where it leads counts. Of a model's folder no file may
be a link that leads out either, since its weights would be read.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergemill.engine import values
from mergemill.engine.errors import OutputError, RecipeError

SCHEMES = ("s3", "s3a", "hf", "gs", "gcs", "az", "abfs", "abfss", "https")  # of URLs; others may mean local files
WRITTEN = ("s3", "s3a", "hf", "gs", "gcs", "az", "abfs", "abfss")
FILES = {
    "methods": "name files of methods when the page is started: mergemill ui --methods FILE",
    "prompts_file": "write the prompts into the recipe: positive_prompts",
    "gates": "merge with a file of gates from the command line",
}
"""Keys of recipes that name files beside the recipe, which on the page has no folder, and what to do instead."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def confine(root: Path, given: str) -> Path:
    """Return where a path leads, from `root`; `RecipeError` where that is not below it."""
    if "\0" in given or not given.strip():
        raise RecipeError("a path is empty, or holds a NUL character")
    found = Path(os.path.realpath(root / os.path.expanduser(given)))  # noqa: PTH111 -- one ~ for all of mergemill
    if not found.is_relative_to(os.path.realpath(root)):
        raise RecipeError(f"{given}: leads out of {root}, below which this page works; put it there")
    return found


def check_model(root: Path, given: str) -> None:
    """Raise `RecipeError` for what names a file out of the root: itself, or by a link among its files."""
    if scheme := _SCHEME.match(given):
        if scheme[1].lower() not in SCHEMES:
            raise RecipeError(f"{given}: this page reads folders below {root}, and {', '.join(SCHEMES)}")
        return
    found = confine(root, given)
    if found.is_dir():
        for path in _list_links(found):
            confine(root, str(path))


def check_out(root: Path, given: str) -> str:
    """Return an output's place as commands take it; `OutputError` where it is not below the root, or a URL to write."""
    if scheme := _SCHEME.match(given):
        if scheme[1].lower() not in WRITTEN:
            raise OutputError(f"{given}: this page writes below {root}, and to {', '.join(WRITTEN)}")
        return given
    try:
        found = confine(root, given)
    except RecipeError as error:
        raise OutputError(str(error)) from None
    inner = found.relative_to(os.path.realpath(root))
    if inner == Path() or any(part.startswith(".") for part in inner.parts):
        raise OutputError(f"{given}: name a new folder, that does not begin with a point")
    return str(inner)


def check_recipe(root: Path, recipe: "values.AnyRecipe") -> None:
    """Raise `RecipeError` for a recipe with a model that the page may not reach."""
    for path in _list_paths(recipe, set()):
        check_model(root, path)


def find_files(data: object) -> Iterator[str]:
    """Yield the keys of `FILES` that stand anywhere in a document, each value looked at once, however often named."""
    waiting, seen = [data], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            yield from (key for key in value if key in FILES)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _list_links(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        yield from (path for name in (*folders, *files) if (path := Path(place, name)).is_symlink())


def _list_paths(value: Any, seen: set[int]) -> Iterator[str]:
    """Yield the paths of all models in a recipe: whatever of its values is a reference has path and revision."""
    if id(value) in seen or isinstance(value, str | int | float | None):
        return
    seen.add(id(value))
    fields = getattr(type(value), "model_fields", {})
    if {"path", "revision"} <= fields.keys():
        yield value.path
    inner = [getattr(value, name) for name in fields]
    inner += list(value.values()) if isinstance(value, Mapping) else []
    inner += list(value) if isinstance(value, list | tuple) else []
    for each in inner:
        yield from _list_paths(each, seen)
