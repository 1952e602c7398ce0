"""Files of ours, recipes first, to values: the one place where faults get their file and line.

Of several faults the message gives the first by line, and says how many more there are: ``(and 2 more)``. All of them,
with the lines themselves, are the error's `faults`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, TypeVar

from pydantic import ValidationError

from mergemill.engine.errors import FileFault, RecipeError
from mergemill.engine.recipe.document import Document, Form, read_document, read_documents
from mergemill.engine.recipe.excerpts import point
from mergemill.engine.recipe.faults import Loc, describe, is_near, say, shorten
from mergemill.engine.recipe.mixtures import AnyRecipe, Mixture, read_prompts
from mergemill.engine.recipe.shapes import Value
from mergemill.engine.recipe.stages import join_documents
from mergemill.engine.recipe.values import Recipe
from mergemill.engine.storage.bounds import RECIPE_BYTES
from mergemill.engine.storage.regular import read_regular
from mergemill.engine.storage.urls import parse_path

V = TypeVar("V", bound=Value)

FORM = Form("a recipe", "merge_method and one of models, slices, modules")
MIXTURE_FORM = Form("a mixture", "base_model and experts")

# Some values are read as if written in a longer form; here is where a user wrote them.
_WRITTEN_AS = {"tokenizer": "tokenizer_source"}


GivenRecipe = Recipe | Mixture | Mapping[str, Any] | str | Path
"""A recipe or a mixture; a mapping of what would stand in its file; the file's path; or YAML text, which has lines.

YAML text is known by its lines or its brace. A path that has a line break, or begins with a brace, is given as a `Path`
(2026-11-29).
"""


def load_recipe(given: GivenRecipe) -> Recipe:
    """Return the recipe that is given: a path, a mapping or YAML text; `RecipeError` where it is not valid.

    >>> load_recipe({"merge_method": "linear", "models": [{"model": "a"}]}).merge_method
    'linear'
    """
    return expect_merge(load_document(given))


def load_document(given: GivenRecipe) -> AnyRecipe:
    """Return the recipe, or the mixture of experts, that is given, as `load_recipe` does.

    A mixture's files of prompts are read, below the folder of its file.
    """
    if isinstance(given, Recipe | Mixture):
        return given
    if isinstance(given, Mapping):
        return _with_prompts(_read_mapping(given))
    if isinstance(given, str) and (len(given.splitlines()) > 1 or given.lstrip().startswith("{")):
        return _with_prompts(parse_document(given, name="recipe").model_copy(update={"file": ""}))
    if not isinstance(given, str | Path):
        raise RecipeError(f"a recipe is a path, a mapping or YAML text, not {describe(given)}")
    path = parse_path(given, RecipeError, what="a recipe")
    return _with_prompts(parse_document(read_text(path), name=str(path)))


def _with_prompts(recipe: AnyRecipe) -> AnyRecipe:
    return read_prompts(recipe, Path(recipe.file).parent) if isinstance(recipe, Mixture) else recipe


def parse_recipe(text: str, *, name: str = "recipe.yml") -> Recipe:
    """Return the recipe that the YAML `text` says; `name` is what messages call it.

    Only the text is looked at: whether methods, models and parameters exist is for the planner.
    Raises `RecipeError`, one line that begins with ``name:line:``.
    """
    return expect_merge(parse_document(text, name=name))


def parse_document(text: str, *, name: str = "recipe.yml") -> AnyRecipe:
    """Return the recipe, or the mixture of experts, that the YAML `text` says, as `parse_recipe` does."""
    return _join(read_documents(text, FORM, name=name), text, name=name)


def read_recipe(text: str) -> list[Document]:
    """Return the documents of a recipe's text as plain data, aliases resolved; `RecipeError` where it is no YAML.

    For who looks at a text of somebody else before it is a recipe: nothing that it names is looked at.
    """
    return read_documents(text, FORM, name="recipe")


def make_recipe(documents: Sequence[Document], text: str) -> AnyRecipe:
    """Return what the documents of a text say, as `load_document` does, but for files of prompts: none is read."""
    return _join(documents, text, name="recipe").model_copy(update={"file": ""})


def check_recipe(documents: Sequence[Document], text: str, *, name: str) -> Recipe:
    """Return the recipe that the documents of a text say, see `parse_recipe`."""
    return expect_merge(_join(documents, text, name=name))


def expect_merge(recipe: AnyRecipe) -> Recipe:
    """Return a recipe as one of a merge; `RecipeError` where it is of a mixture."""
    if isinstance(recipe, Recipe):
        return recipe
    raise RecipeError(f"{recipe.file or 'recipe'}: is a mixture of experts, and a recipe of a merge is wanted here")


def _join(documents: Sequence[Document], text: str, *, name: str) -> AnyRecipe:
    recipes = [_check_any(document, name=name, text=text) for document in documents]
    recipe = join_documents(recipes, [document.lines[()] for document in documents], name=name)
    return recipe.model_copy(update={"text": text, "file": name})


def parse_value(model: type[V], form: Form, text: str, *, name: str) -> V:
    """Return the value of a file of ours; `RecipeError`, one line that begins with ``name:line:``."""
    return _check(model, form, read_document(text, form, name=name), name=name)  # no lines: options may be secrets


def _read_mapping(given: Mapping[str, Any]) -> AnyRecipe:
    """Return the recipe that a mapping says, as if it had been written into a file; faults are told with their keys."""
    try:
        text = json.dumps(given, indent=2, ensure_ascii=False, default=_write_plainly) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"recipe: cannot be written as YAML: {error}") from None
    document = read_document(text, FORM, name="recipe")
    recipe = _check_any(replace(document, lines={}), name="recipe")
    return recipe.model_copy(update={"text": text})


def _write_plainly(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{shorten(repr(value))} is no text, number, boolean, list or mapping")


def _check_any(document: Document, *, name: str, text: str = "") -> AnyRecipe:
    """Return what a document says, which its keys tell: one with experts is a mixture."""
    if isinstance(document.data, dict) and "experts" in document.data:
        return _check(Mixture, MIXTURE_FORM, document, name=name, text=text)
    return _check(Recipe, FORM, document, name=name, text=text)


def _check(model: type[V], form: Form, document: Document, *, name: str, text: str = "") -> V:
    """Return the value that a document says; one without lines is known by its keys."""
    if not isinstance(document.data, dict):
        words = f"{form.called} must be a mapping of keys to values, not {describe(document.data)}"
        raise RecipeError(f"{name}:{document.lines[()]}: {words}")
    try:
        return model.model_validate(leave_holders(document, model.known_keys()))
    except ValidationError as error:
        raise RecipeError(f"{name}:{_say_first(document, error)}", _point_all(document, error, text)) from None


def leave_holders(document: Document, known: list[str]) -> dict[str, Any]:
    """Return the data without keys of the user's own that hold anchors; one that is nearly a known key is no such."""
    return {
        key: value
        for key, value in document.data.items()
        if key in known or key not in document.holders or is_near(key, known)
    }


def read_text(path: Path) -> str:
    """Return what a file of ours says; `RecipeError` where it cannot be read."""
    try:
        stored = read_regular(path, RECIPE_BYTES)
        return stored.decode()
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; a recipe is a file of YAML, which names models") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = stored.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 text: byte {error.start} cannot be decoded") from None


def _say_first(document: Document, error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if not document.lines:
        first, where = faults[0], _say_place(faults[0]["loc"][:-1])
        return f"{where} {say(first['type'], first['loc'], first['msg'])}{more}"
    line, first = min(((_find_line(document, fault["loc"]), fault) for fault in faults), key=lambda item: item[0])
    return f"{line}: {say(first['type'], first['loc'], first['msg'])}{more}"


def _point_all(document: Document, error: ValidationError, text: str) -> tuple[FileFault, ...]:
    """Return every fault at its line; none for a document without lines, or whose text is not to be repeated."""
    if not document.lines or not text:
        return ()
    found = [(fault["loc"], fault["type"], fault["msg"]) for fault in error.errors(include_url=False)]
    faults = [
        point(text, _find_line(document, loc), _last_key(loc), say(kind, loc, words)) for loc, kind, words in found
    ]
    return tuple(sorted(faults, key=lambda fault: fault.line))


def _last_key(loc: Loc) -> str:
    return next((part for part in reversed(loc) if isinstance(part, str)), "")


def _say_place(loc: Loc) -> str:
    """Return where in a mapping something is, between a space and a colon.

    >>> _say_place(("models", 1, "parameters")), _say_place(())
    (' models[1].parameters:', '')
    """
    steps = "".join(f"[{part}]" if isinstance(part, int) else f".{shorten(part)}" for part in loc)
    return f" {steps.removeprefix('.')}:" if steps else ""


def _find_line(document: Document, loc: Loc) -> int:
    """Return the line of the innermost part of `loc` that stands in the file."""
    found: Loc = ()
    for part in loc:
        steps = ((part,), (_WRITTEN_AS.get(str(part), part),), ("model", part))
        step = next((step for step in steps if found + step in document.lines), None)
        if step is None:
            break
        found += step
    return document.lines[found]
