"""What a file of methods says of itself, a part of the model card: also where Python keeps no docstrings."""

import ast
import functools
import inspect
from collections.abc import Callable
from typing import Any


class Documented:
    """What is declared in a file of its own, whose docstring tells of it."""

    __slots__ = ()

    name: str
    function: Callable[..., Any]

    @property
    def title(self) -> str:
        """The first line of the file."""
        return (read_docstring(self.function) or self.name).strip().splitlines()[0]

    @property
    def purpose(self) -> str:
        """What it is for, from the file."""
        return read_paragraph(self.function, "For")

    @property
    def evidence(self) -> str:
        """On which models it was measured, and by whom, from the file."""
        return read_paragraph(self.function, "Evidence")


def read_docstring(function: Callable[..., Any]) -> str:
    """Return the docstring of a function's module; empty where it has none. Under ``python -OO`` from its source."""
    module = inspect.getmodule(function)
    if module is None:
        return ""
    return module.__doc__ or _parse_module(module.__file__ or "")


def read_paragraph(function: Callable[..., Any], label: str) -> str:
    """Return the paragraph of a file's docstring that begins with ``label:``, on one line; empty where none does."""
    before, _, text = f"\n{read_docstring(function)}".partition(f"\n{label}:")
    return " ".join(text.split("\n\n")[0].split()) if before else ""


def parse_docstrings(text: str, name: str) -> tuple[str, str]:
    """Return the docstrings of a module of that text and of a function in it; empty where there are none.

    >>> parse_docstrings("'''A.'''\\ndef f():\\n    '''B.'''", "f")
    ('A.', 'B.')
    """
    module = ast.parse(text)
    found = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return _find(module), _find(found[-1]) if found else ""


@functools.cache
def _parse_module(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return _find(ast.parse(file.read()))
    except (OSError, ValueError, SyntaxError):  # of a function that was typed in, or is compiled
        return ""


def _find(node: ast.Module | ast.FunctionDef) -> str:
    return ast.get_docstring(node, clean=False) or ""
