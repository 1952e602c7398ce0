"""What the page may reach: files below its root, and storage by URLs of known kinds.

A path is resolved first, links and ``..`` with it, so that only where it leads counts. Of a model's folder no file may
be a link that leads out either, since its weights would be read.

What files a recipe names is asked of its parsed values, never of its text, in which a key can be spelt in many ways.

Known limit: who can write below the root is trusted, as are notes of runs there. A model that is swapped for a link
after it was looked at is read by the command that was started, which is confined to nothing.
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
    "keep": "merge with kept stages from the command line",
}
"""Keys of recipes that name files to run, read or write, out of the page's reach, and what to do instead."""

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
    if str(inner).startswith("-"):
        raise OutputError(f"{given}: begins as an option does; name another folder")
    return str(inner)


def check_recipe(root: Path, recipe: "values.AnyRecipe | values.AdapterRecipe") -> None:
    """Raise `RecipeError` for a recipe with a model that the page may not reach, or that names files of `FILES`.

    The second is said of its text before, by `find_files`; this is what a recipe is, whatever was overlooked there.
    """
    for value in _list_values(recipe):
        fields = getattr(type(value), "model_fields", {})
        for key in FILES:
            if key in fields and getattr(value, key) is not None:
                raise RecipeError(f"recipe: {say_files(key)}")
        if {"path", "revision"} <= fields.keys():
            check_model(root, value.path)


def find_files(data: object) -> Iterator[tuple[str | int, ...]]:
    """Yield where keys of `FILES` stand in the data of a document, which is a tree: its aliases are resolved."""
    waiting: list[tuple[tuple[str | int, ...], object]] = [((), data)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            yield from ((*path, key) for key in value if key in FILES)
            waiting.extend(((*path, key), inner) for key, inner in value.items())
        elif isinstance(value, list):
            waiting.extend(((*path, place), inner) for place, inner in enumerate(value))


def say_files(key: str) -> str:
    """Return why a key of `FILES` is refused."""
    return f"'{key}' names files, which this page does not take; {FILES[key]}"


def _list_links(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        yield from (path for name in (*folders, *files) if (path := Path(place, name)).is_symlink())


def _list_values(recipe: Any) -> Iterator[Any]:
    """Yield all values of a recipe that have parts, each once."""
    waiting, seen = [recipe], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, str | int | float | None):
            continue
        seen.add(id(value))
        yield value
        waiting += [getattr(value, name) for name in getattr(type(value), "model_fields", {})]
        waiting += list(value.values()) if isinstance(value, Mapping) else []
        waiting += list(value) if isinstance(value, list | tuple) else []
