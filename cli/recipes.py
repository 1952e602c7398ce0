"""The recipe of a command: a file, or what comes in by stdin."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergemill.engine import values

MOST_BYTES = 1 << 20  # as of a recipe's file


def open_recipe(given: str) -> "values.AnyRecipe":
    """Return the recipe in a file; ``-`` is stdin, which a command that writes recipes may be piped into."""
    from mergemill.engine import load_document

    return load_document(given if given != "-" else _read_stdin())


def _read_stdin() -> str:
    from mergemill.engine import errors

    stored = sys.stdin.buffer.read(MOST_BYTES + 1)
    if len(stored) > MOST_BYTES:
        raise errors.RecipeError(f"stdin: is more than {MOST_BYTES} bytes, and no recipe")
    try:
        return stored.decode() + "\n\n"  # what has lines is no file's name
    except UnicodeDecodeError as error:
        raise errors.RecipeError(f"stdin: not UTF-8 text: byte {error.start} cannot be decoded") from None
