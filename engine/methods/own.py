"""Methods of a user's own, in a Python file whose text travels to the workers inside the tasks.

A worker process need not see the file: a method from one pickles as the file's text and the method's name, and each
process runs a text once, as a module of its own. So the file is one piece: it imports what is installed where the
workers run, and nothing that lies beside it.
"""

import functools
import hashlib
import inspect
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from types import MappingProxyType, ModuleType, TracebackType
from typing import Any

from mergemill.engine.errors import MethodsError
from mergemill.engine.methods.catalogue import find_methods, get_method, get_named, methods_of
from mergemill.engine.methods.contract import Method
from mergemill.engine.methods.docstrings import parse_docstrings
from mergemill.engine.storage.bounds import METHODS_BYTES
from mergemill.engine.storage.regular import read_regular
from mergemill.engine.storage.urls import parse_path

_LOADING = threading.RLock()
_MODULE = "mergemill_methods_"


@dataclass(frozen=True, slots=True)
class MethodsFile:
    """A user's Python file of methods, as it was read."""

    name: str  # beside the recipe, and beside the output's copy of it
    path: str  # where it was read, for messages
    text: str

    @property
    def sha256(self) -> str:
        """The checksum of the text, as 64 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()


# A path; a function that `merge_method` decorates, which stands for its whole file; or a file that was read before.
GivenMethods = str | Path | Callable[..., Any] | MethodsFile


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnMethod(Method):
    """A method from a user's file."""

    file: MethodsFile

    @property
    def on_device(self) -> bool:
        """Never: nobody has said that it does not ask NumPy."""
        return False

    @property
    def title(self) -> str:
        """The first line of the file; of the function, where the file holds several."""
        texts = [*parse_docstrings(self.file.text, self.function.__name__), self.name]
        if len(load_methods(self.file)) > 1:
            texts = texts[1:]
        return next(text for text in texts if text).strip().splitlines()[0]

    def __reduce__(self) -> tuple[Callable[..., Method], tuple[MethodsFile, str]]:
        return _find_in, (self.file, self.name)


def open_methods(given: Sequence[GivenMethods]) -> tuple[MethodsFile, ...]:
    """Return the files that are given, each once; `MethodsError` where one cannot be read."""
    files = [file if isinstance(file, MethodsFile) else _open(file) for file in given]
    return tuple(dict.fromkeys(files))


def read_methods(path: Path, *, name: str) -> MethodsFile:
    """Read the file at `path`, a local one; `MethodsError` where that cannot be done."""
    try:
        return MethodsFile(name, str(path), read_regular(path, METHODS_BYTES).decode())
    except OSError as error:
        raise MethodsError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise MethodsError(f"{path}: is not UTF-8 text; a file of methods is Python source") from None


@functools.cache
def load_methods(file: MethodsFile) -> Mapping[str, Method]:
    """Run a file's code, once a process, and return its methods by name, in alphabetical order.

    Raises `MethodsError`, one line that begins with ``file:line:``, where the code fails, holds no method, or one with
    the name of a built-in.
    """
    with _LOADING:
        found = {method.name: _own(method, file) for method in methods_of(_run(file))}
    if not found:
        raise MethodsError(f"{file.path}: holds no merge method; decorate a function with @merge_method(...)")
    for method in found.values():
        if method.name in find_methods():
            line = method.function.__code__.co_firstlineno
            raise MethodsError(f"{file.path}:{line}: {method.name!r} is the name of a built-in method; choose another")
    return MappingProxyType(dict(sorted(found.items())))


def find_all_methods(files: Sequence[MethodsFile] = ()) -> Mapping[str, Method]:
    """Return the built-in methods and those of `files`, by name; `MethodsError` where two files have one of a name."""
    own: dict[str, Method] = {}
    for file in files:
        for name, method in load_methods(file).items():
            if name in own:
                line = method.function.__code__.co_firstlineno
                raise MethodsError(f"{file.path}:{line}: a method {name!r} is in another file of methods already")
            own[name] = method
    return MappingProxyType({**find_methods(), **own})


def get_any_method(name: str, files: Sequence[MethodsFile]) -> Method:
    """Return the method called `name`, a built-in or one of `files`; `PlanError` names the nearest one there is."""
    return get_named(name, find_all_methods(files), "merge_method") if files else get_method(name)


def _open(given: str | Path | Callable[..., Any]) -> MethodsFile:
    if isinstance(given, str | Path):
        path = parse_path(given, MethodsError, what="a file of methods")
        return read_methods(path, name=path.name)
    source = inspect.getsourcefile(given) if isinstance(getattr(given, "method", None), Method) else None
    if source is None or not Path(source).is_file():
        raise MethodsError(f"{given!r}: is no merge method from a file; write it into one, and give its path")
    return read_methods(Path(source), name=PurePath(source).name)


def _run(file: MethodsFile) -> ModuleType:
    """Run the file's text as a module, which dataclasses and docstrings find by its name."""
    module = ModuleType(f"{_MODULE}{file.sha256[:16]}")
    module.__file__ = file.path
    sys.modules[module.__name__] = module
    try:
        exec(compile(file.text.removeprefix("\ufeff"), file.path, "exec", dont_inherit=True), module.__dict__)
    except SyntaxError as error:
        where = f"{file.path}:{error.lineno}" if error.filename == file.path else f"{file.path}: {error.filename}"
        raise MethodsError(f"{where}: {error.msg}") from error
    except Exception as error:  # a user's code may raise anything
        where = find_own_line(error.__traceback__) or f"{file.path}:1"
        raise MethodsError(f"{where}: {type(error).__name__}: {error}") from error
    return module


def find_own_line(trace: TracebackType | None) -> str | None:
    """Return ``file:line`` of the last line of a user's file that an error came through; None where there is none."""
    line = None
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__", "")).startswith(_MODULE):
            line = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return line


def _own(method: Method, file: MethodsFile) -> OwnMethod:
    return OwnMethod(**{field.name: getattr(method, field.name) for field in fields(method)}, file=file)


def _find_in(file: MethodsFile, name: str) -> Method:
    return load_methods(file)[name]
