"""The code that a merge runs beside its own: files of methods that the recipe names, or that are given with it."""

from collections.abc import Sequence
from pathlib import Path

from mergemill.engine.errors import MethodsError
from mergemill.engine.methods.own import GivenMethods, MethodsFile, open_methods, read_methods
from mergemill.engine.recipe import Recipe


def find_code(recipe: Recipe, given: Sequence[GivenMethods] = ()) -> tuple[MethodsFile, ...]:
    """Return the files of the recipe, which lie where it lies, and those that are given beside it.

    A given `MethodsFile` of the same name stands for the recipe's: so a merge can be repeated whose files are gone.
    Nothing is fetched from anywhere. Raises `MethodsError` where a file cannot be read, or two have one name.
    """
    beside = open_methods(given)
    known = {file.name: file for file in given if isinstance(file, MethodsFile)}
    folder = Path(recipe.file).parent
    named = [known.get(name) or read_methods(folder / name, name=name) for name in recipe.methods or ()]
    files = tuple(dict.fromkeys([*named, *beside]))
    for i, file in enumerate(files):
        for other in files[:i]:
            if file.name == other.name:
                raise MethodsError(f"{file.path}: another file of methods is called {file.name} too: {other.path}")
    return files


def warn_of_code(recipe: Recipe, files: Sequence[MethodsFile], *, where: str) -> list[str]:
    """Return a warning for each file that the recipe itself makes run: whoever runs a recipe should know."""
    named = recipe.methods or ()
    return [
        f"{where}: runs the code of {file.name} beside it, here and on every worker (sha256 {file.sha256})"
        for file in files
        if file.name in named
    ]
