"""``plan.json``: what an output is, or will be, made from, kept beside it so that it can be resumed and verified.

While a merge is unfinished it tells all of that. A finished one may be uploaded, and keeps nothing of the folders that
it was merged from: `hide_places`.
"""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath, PurePosixPath
from typing import Any

import xxhash
from pydantic import TypeAdapter, ValidationError

from mergemill.engine.checkpoint.card import shorten_path
from mergemill.engine.errors import OutputError
from mergemill.engine.plan.digest import engine_version
from mergemill.engine.plan.small_files import RECIPE_NAME
from mergemill.engine.plan.values import Plan, SmallFile
from mergemill.engine.runs.outputs.receipts import Range
from mergemill.engine.storage.copied import JOINED_BYTES, Copied
from mergemill.engine.storage.ranges import Pin, is_remote, read_pieces
from mergemill.engine.storage.stamps import describe_change
from mergemill.engine.storage.store import Storage, is_on_disk


@dataclass(frozen=True, slots=True)
class Record:
    """A plan without its expressions."""

    digest: str
    version: str  # of mergemill
    recipe: Mapping[str, Any]  # canonical; of another kind than a merge: what it was asked for
    recipe_text: str
    recipe_name: str
    seed: int
    shard_size: str
    sources: Mapping[str, tuple[int, str]]  # path -> bytes, stamp
    shards: Mapping[str, Mapping[str, Any]]  # name -> header (as text), size_bytes
    parts: Sequence[Range]  # shard name, start byte, stop byte
    files: Mapping[str, str]  # small files, the index last: name -> xxh3_128
    code: Mapping[str, str] = field(default_factory=dict)  # files of the user's own methods: name -> text
    kind: str = "merge"  # of the planner
    title: str = ""  # of what was made, for people
    finished: bool = False  # then it tells nothing of this machine's folders: see `hide_places`

    def to_json(self) -> bytes:
        """Return the bytes of ``plan.json``."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode() + b"\n"

    def describe_difference(self, other: "Record") -> str:
        """Say in which respects two records differ; the other is of an unfinished merge."""
        if self.finished:
            recipe = other.recipe if self.files.get(RECIPE_NAME) != other.files.get(RECIPE_NAME) else self.recipe
            other = replace(hide_places(other), recipe=recipe)
        names = {
            "recipe": "the recipe",
            "code": "the methods file",
            "seed": "the seed",
            "shard_size": "the shard size",
            "sources": f"the sources ({_compare_sources(self.sources, other.sources)})",
            "version": "the version of mergemill",
            "parts": "the layout",
            "files": "the small files",
        }
        different = [words for name, words in names.items() if getattr(self, name) != getattr(other, name)]
        return ", ".join(different) or ("the sources, which changed since" if self.finished else "its plan")


def _compare_sources(then: Mapping[str, tuple[int, str]], now: Mapping[str, tuple[int, str]]) -> str:
    """Say how the first source that differs does, and how many others do."""
    different = sorted(path for path in {**then, **now} if then.get(path) != now.get(path))
    if not different:
        return ""
    path = different[0]
    more = f"; {len(different) - 1} more" if different[1:] else ""
    if path not in then or path not in now:
        return f"{path}: is read {'now' if path in now else 'no more'}{more}"
    (size_then, stamp_then), (size_now, stamp_now) = then[path], now[path]
    if size_then != size_now:
        return f"{path}: {size_then} bytes then, {size_now} now{more}"
    if is_remote(path):
        return f"{path}: {stamp_then} then, {stamp_now} now{more}"
    return f"{path}: {describe_change(stamp_then, stamp_now)}{more}"


def make_record(plan: Plan, storage: Storage) -> Record:
    """Return the record of a plan; `storage` is how the small files that it copies are reached."""
    return Record(
        digest=plan.digest,
        version=engine_version(),
        kind=plan.origin.kind,
        title=plan.origin.title,
        recipe=plan.origin.value,
        recipe_text=plan.origin.text,
        recipe_name=plan.origin.name,
        seed=plan.origin.seed,
        shard_size=plan.shard_size,
        sources={pin.url: (pin.size_bytes, pin.stamp) for pin in (*plan.pins, *_list_copied(plan))},
        shards={
            shard.name: {"size_bytes": shard.size_bytes, "header": write_header(shard.header)} for shard in plan.shards
        },
        parts=list_ranges(plan),
        files={file.name: checksum(read_small(file, storage)) for file in plan.files},
        code={file.name: file.text for file in plan.origin.code},
    )


def add_files(record: Record, plan: Plan) -> Record:
    """Return a record with the small files that were only known when the plan had run, before those of the plan."""
    made = {file.name: checksum([file.data]) for file in plan.files if file.data is not None}
    return record if made.items() <= record.files.items() else replace(record, files={**made, **record.files, **made})


def write_header(header: bytes) -> str:
    """Return a shard's header as text: that of safetensors without its length, and any other in base64."""
    if header.startswith(_GGUF):
        return f"{_BASE64}{base64.b64encode(header).decode()}"
    return header[8:].decode()


def read_header_text(text: str) -> bytes:
    r"""Return the header that `write_header` wrote.

    >>> read_header_text(write_header(b"GGUF\x03")), read_header_text("{}")
    (b'GGUF\x03', b'\x02\x00\x00\x00\x00\x00\x00\x00{}')
    """
    if text.startswith(_BASE64):
        try:
            return base64.b64decode(text.removeprefix(_BASE64), validate=True)
        except ValueError:
            return b""  # which no shard has
    return len(text.encode()).to_bytes(8, "little") + text.encode()


def hide_places(record: Record) -> Record:
    """Return what a finished output keeps of a record: no path of this machine, so that it may be uploaded.

    A path that the user wrote is in the output's recipe, and in that file alone (decided 2026-11-29): replaying reads
    it there. Of what was asked for otherwise, absolute paths are shortened to their last name.
    """
    return replace(
        record,
        recipe={} if RECIPE_NAME in record.files else _shorten(record.recipe),
        recipe_text="",
        recipe_name=PurePath(record.recipe_name).name,
        sources={url: source for url, source in record.sources.items() if not is_on_disk(url)},
        finished=True,
    )


def _shorten(value: Any) -> Any:
    if isinstance(value, str):
        return shorten_path(value)
    if isinstance(value, Mapping):
        return {key: _shorten(inner) for key, inner in value.items()}
    return [_shorten(inner) for inner in value] if isinstance(value, list | tuple) else value


def list_ranges(plan: Plan) -> list[Range]:
    """Return shard, first byte and byte after the last of each part."""
    return [(plan.shards[part.shard].name, part.start_bytes, part.stop_bytes) for part in plan.parts]


def _list_copied(plan: Plan) -> list[Pin]:
    return [file.copied for file in plan.files if file.copied is not None]


def read_small(file: SmallFile, storage: Storage) -> Iterator[bytes]:
    """Yield pieces of a small file: made by the plan, or the donor's, unchanged since the plan, which may be large."""
    if file.data is not None:
        yield file.data
        return
    assert file.copied is not None
    yield from read_pieces(file.copied, storage=storage)


def take_small(file: SmallFile, storage: Storage) -> bytes | Copied:
    """Return a small file to be written into any storage: its bytes, or else what is read while it is sent."""
    if file.copied is not None and file.copied.size_bytes > JOINED_BYTES:
        return Copied(file.copied, storage)
    return b"".join(read_small(file, storage))


def checksum(pieces: Iterable[bytes]) -> str:
    """Return the xxh3_128 of `pieces`, one after the other, as 32 hexadecimal digits."""
    found = xxhash.xxh3_128()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def parse_record(text: bytes, where: str, is_committed: Callable[[], bool] = lambda: False) -> Record:
    """Parse a ``plan.json``; `OutputError` where it is none, or is damaged.

    is_committed: whether it is of a finished merge, which is asked only where it cannot be read.
    """
    try:
        record = _RECORD.validate_json(text, strict=True)
    except ValidationError as error:
        raise _unreadable(where, error.errors()[0]["msg"], is_committed()) from error
    if why := _find_fault(record):
        raise _unreadable(where, why, is_committed())
    check_names([*record.shards, *record.files], where)
    return record


def parse_sound(text: bytes | None) -> Record | None:
    """Parse a ``plan.json``; None where there is none, or where it is damaged."""
    with suppress(OutputError):
        return None if text is None else parse_record(text, "")
    return None


def _find_fault(record: Record) -> str:
    """Say what does not fit in a record; empty where all does."""
    for name, shard in record.shards.items():
        if type(shard.get("size_bytes")) is not int or type(shard.get("header")) is not str:
            return f"the shard {name!r} has no size_bytes and header"
    for number, (name, start_bytes, stop_bytes) in enumerate(record.parts):
        if name not in record.shards or not 0 <= start_bytes <= stop_bytes <= record.shards[name]["size_bytes"]:
            return f"part {number} is no range of a shard"
    return ""


def _unreadable(where: str, why: str, is_committed: bool) -> OutputError:
    way = f"an unfinished merge is given up with: mergemill abort {where.removesuffix('/.mergemill/plan.json')}"
    if is_committed:  # which an abort leaves alone
        way = "it is of a finished merge: move the folder away"
    return OutputError(f"{where}: is damaged, or not of this version of mergemill: {why}; {way}")


def check_names(names: Iterable[str], where: str) -> None:
    """Raise `OutputError` for the name of a shard or small file that leads out of the output that it is of.

    >>> check_names(["model-00001-of-00001.safetensors", "methods/own.py"], "out")
    >>> check_names(["../model.safetensors"], "out")
    Traceback (most recent call last):
    mergemill.engine.errors.OutputError: out: '../model.safetensors' would be written outside of the output
    """
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise OutputError(f"{where}: {name!r} would be written outside of the output")


_GGUF, _BASE64 = b"GGUF", "base64:"
_RECORD = TypeAdapter(Record)
