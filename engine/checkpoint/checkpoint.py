"""Opening a stored model: from a reference to its tensors' places, config and files. Reads no weight.

Layouts, in this order: one ``model.safetensors``; shards with ``model.safetensors.index.json``; the only
safetensors file of a folder, whatever its name; such a file itself.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mergemill.engine.checkpoint.config import parse_config
from mergemill.engine.checkpoint.header import Header, read_header
from mergemill.engine.checkpoint.index import INDEX_NAME, check_index, check_shards, parse_index
from mergemill.engine.checkpoint.unfinished import check_committed, check_layers, check_names
from mergemill.engine.errors import CheckpointError, IndexFileError, RunError
from mergemill.engine.storage import local
from mergemill.engine.storage.bounds import find_bound
from mergemill.engine.storage.ranges import (
    Pin,
    check_size,
    is_remote,
    join,
    list_files,
    pin_file,
    read_beginning,
    read_pieces,
    read_whole,
)
from mergemill.engine.storage.store import ENVIRONMENT, Storage, store_of
from mergemill.engine.storage.urls import parse_place

SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
TEMPLATES_FOLDER = "additional_chat_templates"
MODULES_NAME = "modules.json"  # of sentence-transformers: which folders hold the steps after the model
MOST_MODULES = 16
HEADER_THREADS = 8  # headers are read at the same time, since each waits for the disk twice

_FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # org/name


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor is stored."""

    name: str
    dtype: str  # the format's name: "BF16"
    shape: tuple[int, ...]  # elements along each axis
    file: Pin  # the file that holds it
    offset_bytes: int  # where its data begin, from the start of the file
    nbytes: int  # size of its data
    read_from: Pin | None = None  # a file with the same content that is read instead


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A stored model; nothing of its weights is in memory."""

    ref: str  # as the user wrote it
    path: str  # absolute path of its folder, or its URL
    tensors: Mapping[str, StoredTensor]  # by name, in the order of the names
    config: Mapping[str, Any]  # of config.json; empty where there is none
    config_text: bytes  # config.json as stored; empty where there is none
    pins: Mapping[str, Pin]  # the files beside the weights, by name, in its order
    storage: Storage = ENVIRONMENT  # how it is reached

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files beside the weights, sorted."""
        return tuple(self.pins)


def open_checkpoint(ref: str, revision: str | None = None, storage: Storage = ENVIRONMENT) -> Checkpoint:
    """Open the model at `ref`: a folder, a URL, ``org/name`` on the Hub, or one safetensors file; ``~`` is home.

    revision: a branch, tag or commit on the Hub. Raises `CheckpointError` (`HeaderError`, `IndexFileError`) for what is
    not a whole, sound checkpoint.
    """
    try:
        return _open(f"{ref}@{revision}" if revision else ref, resolve(ref, revision, storage), storage)
    except OSError as error:
        raise CheckpointError(f"{ref}: cannot be read: {error.strerror}") from error
    except RunError as error:  # of a header that its storage refuses
        raise CheckpointError(str(error)) from error


def read_file(checkpoint: Checkpoint, name: str) -> bytes:
    """Return the bytes of one of the checkpoint's `files`; `CheckpointError` for more than one of its name has."""
    with _explained():
        return read_whole(_find_file(checkpoint, name), find_bound(name), checkpoint.storage)


def read_beginning_of(checkpoint: Checkpoint, name: str, size_bytes: int) -> bytes:
    """Return the first bytes of one of the checkpoint's `files`, which may have any size."""
    with _explained():
        return read_beginning(_find_file(checkpoint, name), size_bytes, checkpoint.storage)


def check_file(checkpoint: Checkpoint, name: str) -> Pin:
    """Return the pin of one of the checkpoint's `files`; `CheckpointError` for one that is larger than such files."""
    with _explained():
        check_size(pin := _find_file(checkpoint, name), find_bound(name))
    return pin


def digest_file(checkpoint: Checkpoint, name: str) -> str:
    """Return what is equal for `files` of equal content alone, of which little is in memory at a time."""
    digest = hashlib.sha256()
    with _explained():
        for piece in read_pieces(_find_file(checkpoint, name), find_bound(name), checkpoint.storage):
            digest.update(piece)
    return digest.hexdigest()


def _find_file(checkpoint: Checkpoint, name: str) -> Pin:
    if name not in checkpoint.pins:
        raise CheckpointError(f"{checkpoint.path}: has no file {name!r}")
    return checkpoint.pins[name]


def resolve(ref: str, revision: str | None = None, storage: Storage = ENVIRONMENT) -> str:
    """Return the absolute path or the URL that `ref` names; `CheckpointError` unless something is there.

    A folder that is there comes before a model of the same name on the Hub.
    """
    place = parse_place(ref)
    if is_remote(place):
        return store_of(place, storage).resolve(place, revision)
    path = local.resolve(place)
    if path is None and HUB_NAME.fullmatch(ref):
        return _resolve_on_hub(ref, revision, storage)
    if path is None:
        raise CheckpointError(f"{ref}: no such file or folder")
    if revision is not None:
        raise CheckpointError(f"{ref}@{revision}: a folder has no revisions; only models on the Hub have")
    return path


def _resolve_on_hub(ref: str, revision: str | None, storage: Storage) -> str:
    try:
        return store_of("hf://", storage).resolve(f"hf://{ref}", revision)
    except CheckpointError as error:
        raise CheckpointError(f"{ref}: no such folder; {error}") from error


def _open(ref: str, place: str, storage: Storage) -> Checkpoint:
    found = list_files(place, TEMPLATES_FOLDER, storage)
    if found is None:
        _check_suffix(PurePosixPath(place), ref)
        check_names([PurePosixPath(place).name], ref)
        pin = pin_file(place, storage)
        tensors = _collect({place: _open_shard(pin, place, storage)})
        return Checkpoint(ref, place.rpartition("/")[0], tensors, {}, b"", {}, storage)
    check_committed(place, ref, storage)
    tensors = _open_tensors(place, found, storage)
    modules = read_modules(found[MODULES_NAME], storage) if MODULES_NAME in found else ()
    beneath = {name: pin for folder in modules for name, pin in _list_beneath(place, folder, storage)}
    config_text = _read_small(found[CONFIG_NAME], CONFIG_NAME, storage) if CONFIG_NAME in found else b""
    config = parse_config(config_text, where=join(place, CONFIG_NAME)) if CONFIG_NAME in found else {}
    check_layers(tensors, config, ref)
    pins = dict(sorted((_pick_small(found) | beneath).items()))
    return Checkpoint(ref, place, tensors, config, config_text, pins, storage)


def _check_suffix(path: PurePosixPath, ref: str) -> None:
    if path.suffix in _FOREIGN_WEIGHTS:
        raise CheckpointError(f"{ref}: is not a safetensors file; convert it to safetensors first")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{ref}: is neither a folder nor a safetensors file")


def _open_tensors(place: str, found: Mapping[str, Pin], storage: Storage) -> Mapping[str, StoredTensor]:
    if INDEX_NAME in found:
        return _open_sharded(place, found, storage)
    name = SINGLE_NAME if SINGLE_NAME in found else _find_only(place, found)
    return _collect({name: _open_shard(found[name], join(place, name), storage)})


def _open_sharded(place: str, found: Mapping[str, Pin], storage: Storage) -> Mapping[str, StoredTensor]:
    where = join(place, INDEX_NAME)
    weight_map = parse_index(_read_small(found[INDEX_NAME], INDEX_NAME, storage), where=where)
    files = _find_shards(place, set(weight_map.values()), found, storage)
    if SINGLE_NAME in found and SINGLE_NAME not in files:
        # Loaders disagree on which of the two is the model.
        raise IndexFileError(f"{where}: does not name {SINGLE_NAME}, which is beside it; remove one of them")
    names = check_shards(weight_map, files.keys(), where=where)
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        opened = pool.map(lambda name: _open_shard(files[name], join(place, name), storage), names)
        shards = dict(zip(names, opened, strict=True))
    held = {name: frozenset(tensor.name for tensor in header.tensors) for name, (_, header) in shards.items()}
    check_index(weight_map, held, where=where)
    return _collect(shards)


def _find_shards(place: str, names: Collection[str], found: Mapping[str, Pin], storage: Storage) -> Mapping[str, Pin]:
    """Return those of the named shards that are there: some lie in folders below, and web servers list nothing."""
    unlisted = sorted(set(names) - found.keys())
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        looked = pool.map(lambda name: _find_shard(join(place, name), storage), unlisted)
        pins = dict(zip(unlisted, looked, strict=True))
    return {name: pin for name in names if (pin := found.get(name) or pins[name])}


def _find_shard(url: str, storage: Storage) -> Pin | None:
    """Return the pin of an unlisted file; None where it is not there, which on this machine alone has one reason."""
    try:
        return pin_file(url, storage)
    except CheckpointError:
        if is_remote(url):
            raise
        return None


def _open_shard(pin: Pin, where: str, storage: Storage) -> tuple[Pin, Header]:
    return pin, read_header(pin, storage, where=where)


def _collect(shards: Mapping[str, tuple[Pin, Header]]) -> Mapping[str, StoredTensor]:
    found = [stored for pin, header in shards.values() for stored in _store(pin, header)]
    return {stored.name: stored for stored in sorted(found, key=lambda stored: stored.name)}


def _store(pin: Pin, header: Header) -> Iterable[StoredTensor]:
    for tensor, offset in zip(header.tensors, header.offsets_bytes, strict=True):
        yield StoredTensor(tensor.name, tensor.dtype, tensor.shape, pin, offset, tensor.nbytes)


def _find_only(place: str, files: Iterable[str]) -> str:
    names = sorted(name for name in files if "/" not in name)
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{place}: is a LoRA adapter, not a model; write it as <model>+{place.rpartition('/')[2]}"
        )
    found = [name for name in names if name.endswith(".safetensors")]
    check_names(found, place)
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{place}: has {len(found)} safetensors files and no {INDEX_NAME}")
    raise CheckpointError(f"{place}: {_explain_none(names)}")


def _explain_none(names: Sequence[str]) -> str:
    foreign = [name for name in names if name.endswith(_FOREIGN_WEIGHTS) and name != "training_args.bin"]
    if foreign:
        return f"has {foreign[0]} but no safetensors file; convert it to safetensors first"
    return "has no safetensors file"


def read_modules(pin: Pin, storage: Storage) -> tuple[str, ...]:
    """Return the folders that a ``modules.json`` names, as far as it is one, and they lie in the model's own."""
    try:
        found = json.loads(_read_small(pin, MODULES_NAME, storage))
    except (ValueError, RecursionError):
        return ()
    named = [each.get("path") for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    folders = [name for name in named if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name, re.ASCII)]
    return tuple(dict.fromkeys(folders))[:MOST_MODULES]


def _list_beneath(place: str, folder: str, storage: Storage) -> Iterable[tuple[str, Pin]]:
    found = list_files(place, folder, storage) or {}
    return sorted((name, pin) for name, pin in found.items() if name.startswith(f"{folder}/"))


def _pick_small(found: Mapping[str, Pin]) -> dict[str, Pin]:
    """Return the files beside the weights, and the chat templates, by name."""
    return {name: found[name] for name in sorted(found) if _is_small(PurePosixPath(name))}


def _is_small(path: PurePosixPath) -> bool:
    if path.parent.name:
        return path.suffix == ".jinja"
    weights = path.name.endswith((".safetensors", ".index.json", *_FOREIGN_WEIGHTS))
    return not weights and not path.name.startswith(".")


def _read_small(pin: Pin, name: str, storage: Storage) -> bytes:
    with _explained():
        return read_whole(pin, find_bound(name), storage)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what reading raises into what is wrong with a model."""
    try:
        yield
    except RunError as error:
        raise CheckpointError(str(error)) from error
