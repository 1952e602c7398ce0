"""A script whose worker processes would run it again: told before any is started.

Each worker process begins by importing the program's main file, as `multiprocessing` does to find what is asked of it.
A file that merges as it is imported would then start workers in its workers.
"""

import ast
import sys
import tokenize
from multiprocessing.spawn import get_preparation_data
from pathlib import Path
from types import FrameType

from mergemill.engine.errors import PlanError


def check_main() -> None:
    """Raise `PlanError` where the caller stands in the main file, outside of ``if __name__ == "__main__":``."""
    path = get_preparation_data("worker").get("init_main_from_path")
    if path is None:
        return  # a notebook, a prompt, or a module that is not run again
    line = _find_line(sys._getframe())
    if line is not None and Path(path).is_file() and not is_guarded(_read(path), line):
        raise PlanError(
            f'{path}:{line}: worker processes import this file too: put what it does below if __name__ == "__main__":, '
            "or merge with workers=0"
        )


def _read(path: str) -> str:
    with tokenize.open(path) as file:
        return file.read()


def _find_line(frame: FrameType | None) -> int | None:
    """Return the line of the main file, itself and no function in it, that is being run; None in another thread."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            return frame.f_lineno
        frame = frame.f_back
    return None


def is_guarded(text: str, line: int) -> bool:
    """Whether a line of a program is below an ``if`` at its top that asks for ``__name__``.

    >>> text = "a()\\nif __name__ == '__main__':\\n    b()\\n"
    >>> is_guarded(text, 1), is_guarded(text, 3)
    (False, True)
    """
    return any(
        isinstance(node, ast.If)
        and node.lineno <= line <= (node.end_lineno or node.lineno)
        and any(isinstance(name, ast.Name) and name.id == "__name__" for name in ast.walk(node.test))
        for node in ast.parse(text).body
    )
