"""What a search keeps in its folder: what it was asked for, its trials, and the recipe of the best so far.

::

    search.json      what was asked for, its digest, the sources as they were
    trials.jsonl     a line for each candidate
    best.yml         the recipe of the best, beside the files of methods that it names
    table.csv, plot.html, README.md
    candidates/      models that are being judged
    model/           the best model, where it was asked for
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemill.engine.errors import OutputError, PlanError, StorageError
from mergemill.engine.recipe import Recipe
from mergemill.engine.storage import system
from mergemill.engine.storage.ranges import Pin
from mergemill.engine.storage.urls import parse_path

SEARCH_NAME, BEST_NAME, LOCK_NAME = "search.json", "best.yml", ".lock"
CANDIDATES, MODEL = "candidates", "model"


@dataclass(frozen=True, slots=True)
class SearchRecord:
    """What makes two runs the same search: all but the budget."""

    search: Mapping[str, Any]
    """The search file, canonical."""
    recipe: str
    """With its variables."""
    sources: Mapping[str, tuple[int, str]]
    """Each file with its size and stamp."""
    texts: Mapping[str, str]
    """Files that objectives read, each with its sha256."""

    @property
    def digest(self) -> str:
        """The checksum of it all."""
        return digest_of(self._to_json())

    def _to_json(self) -> dict[str, Any]:
        sources = {name: list(found) for name, found in self.sources.items()}
        return {"search": self.search, "recipe": self.recipe, "sources": sources, "texts": dict(self.texts)}

    def to_bytes(self) -> bytes:
        """Return the bytes of ``search.json``."""
        return json.dumps({"digest": self.digest, **self._to_json()}, indent=1, ensure_ascii=False).encode() + b"\n"

    def describe_difference(self, then: Mapping[str, Any]) -> str:
        """Say what of a search of an earlier run is another."""
        now = json.loads(json.dumps(self._to_json()))
        found = []
        for key in ("search", "recipe", "sources", "texts"):
            before = then.get(key)
            if before == now[key]:
                continue
            if not isinstance(before, dict):
                found.append(_NAMED[key])
                continue
            inner = sorted(set(before) | set(now[key]))
            names = [name for name in inner if before.get(name) != now[key].get(name)]
            found.append(f"{_NAMED[key]}{f' ({names[0]})' if names else ''}")
        return ", ".join(found) or "its digest"


_NAMED = {"search": "the search file", "recipe": "the recipe", "sources": "the sources", "texts": "the texts"}


def digest_of(value: Any) -> str:
    """Return the checksum of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def list_sources(pins: Sequence[Pin]) -> dict[str, tuple[int, str]]:
    """Return the files of a plan's sources as `SearchRecord` has them."""
    return {pin.url: (pin.size_bytes, str(pin.stamp)) for pin in pins}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a second driver away from a search's folder while the block lasts."""
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            system.lock(descriptor, wait=False)
        except OSError:
            raise OutputError(f"{folder}: another process searches here; wait for it, or end it") from None
        yield
    finally:
        os.close(descriptor)


def open_state(folder: Path, asked: SearchRecord) -> None:
    """Begin a search in an empty folder, or see that the one in it is the same; `OutputError` for anything else."""
    with _explained(folder):
        there = {each.name for each in folder.iterdir()} - {LOCK_NAME}
        path = folder / SEARCH_NAME
        if not path.exists():
            if there:
                raise OutputError(f"{folder}: holds {min(there)!r} and no search; give another folder")
            write_file(path, asked.to_bytes())
            return
        then = read_state(folder)
    if then["digest"] != asked.digest:
        raise OutputError(
            f"{folder}: holds another search; what differs: {asked.describe_difference(then)}. "
            "Give another folder, or remove this one"
        )


def read_state(folder: Path) -> Mapping[str, Any]:
    """Return what ``search.json`` says; `OutputError` where there is none."""
    path = folder / SEARCH_NAME
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or "digest" not in found or not isinstance(found.get("search"), dict):
            raise ValueError
    except FileNotFoundError:
        raise OutputError(f"{folder}: holds no search") from None
    except (OSError, ValueError):
        raise OutputError(f"{path}: cannot be read; remove the folder and search again") from None
    return found


def find_beside(out: str | Path) -> Path:
    """Return the folder beside an output that keeps what is known of its search; `PlanError` for remote ones."""
    if "://" in str(out):
        raise PlanError(f"{out}: soups and cocktails are written to this machine, beside what is known of them")
    path = parse_path(out, OutputError, what="what is searched")
    path = path if path.name else path.absolute()  # the folder here has a name only then
    return path.with_name(path.name + ".search")


def write_best(folder: Path, recipe: Recipe) -> None:
    """Write the best recipe, and beside it the files of methods that it names."""
    with _explained(folder):
        for name in recipe.methods or ():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(folder / name, (Path(recipe.file).parent / name).read_bytes())
        write_file(folder / BEST_NAME, recipe.text.encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a file that is there whole or as it was before."""
    with _explained(path):
        beside = path.with_name(path.name + ".tmp")
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)


def remove_candidates(folder: Path) -> None:
    """Remove what a search that was killed was judging."""
    with suppress(FileNotFoundError), _explained(folder):
        shutil.rmtree(folder / CANDIDATES)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{error.filename or path}: cannot be written: {error.strerror}") from None
