"""Templates: recipes in which values are variables, ``${name}``, and what they are with values put in."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe.document import Document, read_documents
from mergemill.engine.recipe.faults import Loc, suggest
from mergemill.engine.recipe.parsing import FORM, check_recipe, leave_holders, read_text
from mergemill.engine.recipe.settings import Scalar
from mergemill.engine.recipe.values import Recipe
from mergemill.engine.storage.urls import parse_path

Values = Mapping[str, Scalar | tuple[Scalar, ...]]
"""What stands for each variable; a tuple is a gradient over the layers."""

_VARIABLE = re.compile(r"\$\{([^{}]+)\}")


@dataclass(frozen=True, slots=True)
class Template:
    """A recipe's documents, with variables in them."""

    documents: tuple[Document, ...]
    name: str
    """Of the file, for messages, and for finding the recipe's own methods beside it."""

    def list_variables(self) -> dict[str, tuple[int, Loc]]:
        """Return the variables, each with the document and the place where it first stands."""
        found: dict[str, tuple[int, Loc]] = {}
        for number, document in enumerate(self.documents):
            for loc, name in _iter_variables(document.data, ()):
                found.setdefault(name, (number, loc))
        return found

    def fill(self, values: Values) -> Recipe:
        """Return the recipe with values put in; its text is that of a file which says the same."""
        filled = [replace(each, data=_fill(each.data, values)) for each in self.documents]
        return check_recipe(filled, write_documents([each.data for each in filled]), name=self.name)


def read_template(given: str | Mapping[str, Any]) -> Template:
    """Return the template in a file, or that a mapping of a search file says; `RecipeError` where it is no YAML."""
    if isinstance(given, Mapping):
        return parse_template(write_documents([given]), name="the search's recipe")
    path = parse_path(given, RecipeError, what="a recipe")
    return parse_template(read_text(Path(path)), name=str(path))


def parse_template(text: str, *, name: str) -> Template:
    """Return the template that a YAML text says."""
    documents = read_documents(text, FORM, name=name)
    known = Recipe.known_keys()
    plain = [
        replace(each, data=leave_holders(each, known)) if isinstance(each.data, dict) else each for each in documents
    ]
    return Template(tuple(plain), name)


def check_variables(template: Template, names: Sequence[str]) -> None:
    """Raise `RecipeError` for a variable that is not defined, or that the recipe does not use."""
    used = template.list_variables()
    for name, (number, loc) in used.items():
        if name not in names:
            line = _find_line(template.documents[number], loc)
            raise RecipeError(f"{template.name}:{line}: ${{{name}}} is no variable; {suggest(name, names)}")
    for name in names:
        if name not in used:
            there = f"; it has {', '.join(f'${{{each}}}' for each in used)}" if used else ""
            raise RecipeError(f"{template.name}: does not use the variable '{name}', as a value ${{{name}}}{there}")


def write_documents(documents: Sequence[Any]) -> str:
    """Return documents as the text of one file, anchors written out."""
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120)


class _Plain(yaml.SafeDumper):
    """Writes what an anchor stood for, wherever it stood."""

    def ignore_aliases(self, data: Any) -> bool:
        """No value refers to another."""
        return True


def _iter_variables(value: Any, loc: Loc) -> Iterator[tuple[Loc, str]]:
    if isinstance(value, str) and (match := _VARIABLE.fullmatch(value)):
        yield loc, match[1]
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _iter_variables(item, (*loc, key))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _iter_variables(item, (*loc, place))


def _fill(value: Any, values: Values) -> Any:
    if isinstance(value, str) and (match := _VARIABLE.fullmatch(value)):
        given = values[match[1]]
        return list(given) if isinstance(given, tuple) else given
    if isinstance(value, dict):
        return {key: _fill(item, values) for key, item in value.items()}
    return [_fill(item, values) for item in value] if isinstance(value, list | tuple) else value


def _find_line(document: Document, loc: Loc) -> int:
    while loc not in document.lines:
        loc = loc[:-1]
    return document.lines[loc]
