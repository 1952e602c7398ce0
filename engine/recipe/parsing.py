"""Files of ours, recipes first, to values: the one place where faults get their file and line.

Of several faults the message gives the first by line, and says how many more there are: ``(and 2 more)``.
"""

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe.document import Document, Form, read_document
from mergemill.engine.recipe.faults import Loc, describe, say
from mergemill.engine.recipe.shapes import Value
from mergemill.engine.recipe.values import Recipe

V = TypeVar("V", bound=Value)

FORM = Form("a recipe", "merge_method and one of models, slices, modules")

# Some values are read as if written in a longer form; here is where a user wrote them.
_WRITTEN_AS = {"tokenizer": "tokenizer_source"}


def load_recipe(path: str | Path) -> Recipe:
    """Return the recipe in the file at `path`; `RecipeError` where it is not readable or not valid."""
    return parse_recipe(read_text(Path(path)), name=str(path))


def parse_recipe(text: str, *, name: str = "recipe.yml") -> Recipe:
    """Return the recipe that the YAML `text` says; `name` is what messages call it.

    Only the text is looked at: whether methods, models and parameters exist is for the planner.
    Raises `RecipeError`, one line that begins with ``name:line:``.
    """
    recipe = parse_value(Recipe, FORM, text, name=name)
    return recipe.model_copy(update={"text": text, "name": name})


def parse_value(model: type[V], form: Form, text: str, *, name: str) -> V:
    """Return the value of a file of ours; `RecipeError`, one line that begins with ``name:line:``."""
    document = read_document(text, form, name=name)
    if not isinstance(document.data, dict):
        words = f"{form.called} must be a mapping of keys to values, not {describe(document.data)}"
        raise RecipeError(f"{name}:{document.lines[()]}: {words}")
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        raise RecipeError(f"{name}:{_say_first(document, error)}") from None


def read_text(path: Path) -> str:
    """Return what a file of ours says; `RecipeError` where it cannot be read."""
    try:
        stored = path.read_bytes()
        return stored.decode()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = stored.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 text: byte {error.start} cannot be decoded") from None


def _say_first(document: Document, error: ValidationError) -> str:
    found = [(_find_line(document, fault["loc"]), fault) for fault in error.errors(include_url=False)]
    line, first = min(found, key=lambda item: item[0])
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{line}: {say(first['type'], first['loc'], first['msg'])}{more}"


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
