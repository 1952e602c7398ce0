"""Opening a stored model: from a reference to its tensors' places, config and files. Reads no weight.

Layouts, in this order: one ``model.safetensors``; shards with ``model.safetensors.index.json``; the only
safetensors file of a folder, whatever its name; such a file itself.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mergemill.engine.checkpoint.config import parse_config
from mergemill.engine.checkpoint.header import Header, read_header
from mergemill.engine.checkpoint.index import INDEX_NAME, check_index, check_shards, parse_index
from mergemill.engine.errors import CheckpointError, IndexFileError
from mergemill.engine.storage.ranges import Pin, pin_file

SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
TEMPLATES_FOLDER = "additional_chat_templates"
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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A stored model; nothing of its weights is in memory."""

    ref: str  # as the user wrote it
    path: str  # absolute path of its folder
    tensors: Mapping[str, StoredTensor]  # by name, in the order of the names
    config: Mapping[str, Any]  # of config.json; empty where there is none
    config_text: bytes  # config.json as stored; empty where there is none
    files: tuple[str, ...]  # names of the files beside the weights, sorted


def open_checkpoint(ref: str) -> Checkpoint:
    """Open the model at `ref`: a folder, a ``file://`` URL or one safetensors file; ``~`` is the home folder.

    Raises `CheckpointError` (`HeaderError`, `IndexFileError`) for what is not a whole, sound checkpoint.
    """
    try:
        return _open_local(ref, resolve_local(ref))
    except OSError as error:
        raise CheckpointError(f"{ref}: cannot be read: {error.strerror}") from error


def read_file(checkpoint: Checkpoint, name: str) -> bytes:
    """Return the bytes of one of the checkpoint's `files`."""
    if name not in checkpoint.files:
        raise CheckpointError(f"{checkpoint.path}: has no file {name!r}")
    return _read_small(Path(checkpoint.path) / name)


def resolve_local(ref: str) -> Path:
    """Return the absolute path that `ref` names; `CheckpointError` unless it is there and can be read."""
    if "://" in ref and not ref.startswith("file://"):
        raise CheckpointError(f"{ref}: {ref.split('://')[0]}:// cannot be read yet; copy it to a local folder")
    # os.path's, since pathlib's raises for a home folder that nobody has.
    path = Path(unquote(urlsplit(ref).path) if ref.startswith("file://") else os.path.expanduser(ref))  # noqa: PTH111
    if path.exists():
        return path.absolute()
    if HUB_NAME.fullmatch(ref):
        raise CheckpointError(
            f"{ref}: no such folder, and the Hub cannot be read yet; "
            f"download it first: hf download {ref} --local-dir {ref}"
        )
    raise CheckpointError(f"{ref}: no such file or folder")


def _open_local(ref: str, path: Path) -> Checkpoint:
    if path.is_file():
        _check_suffix(path, ref)
        return Checkpoint(ref, str(path.parent), _collect({path.name: _open_shard(path)}), {}, b"", ())
    tensors = _open_tensors(path)
    has_config = (path / CONFIG_NAME).is_file()
    config_text = _read_small(path / CONFIG_NAME) if has_config else b""
    config = parse_config(config_text, where=str(path / CONFIG_NAME)) if has_config else {}
    return Checkpoint(ref, str(path), tensors, config, config_text, _list_files(path))


def _check_suffix(path: Path, ref: str) -> None:
    if path.suffix in _FOREIGN_WEIGHTS:
        raise CheckpointError(f"{ref}: is not a safetensors file; convert it to safetensors first")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{ref}: is neither a folder nor a safetensors file")


def _open_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    has_single, has_index = (folder / SINGLE_NAME).is_file(), (folder / INDEX_NAME).is_file()
    if has_index:
        return _open_sharded(folder, has_single=has_single)
    name = SINGLE_NAME if has_single else _find_only(folder)
    return _collect({name: _open_shard(folder / name)})


def _open_sharded(folder: Path, *, has_single: bool) -> Mapping[str, StoredTensor]:
    where = str(folder / INDEX_NAME)
    weight_map = parse_index(_read_small(folder / INDEX_NAME), where=where)
    files = {name for name in set(weight_map.values()) if (folder / name).is_file()}
    if has_single and SINGLE_NAME not in files:
        # Loaders disagree on which of the two is the model.
        raise IndexFileError(f"{where}: does not name {SINGLE_NAME}, which is beside it; remove one of them")
    names = check_shards(weight_map, files, where=where)
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        shards = dict(zip(names, pool.map(lambda name: _open_shard(folder / name), names), strict=True))
    held = {name: frozenset(tensor.name for tensor in header.tensors) for name, (_, header) in shards.items()}
    check_index(weight_map, held, where=where)
    return _collect(shards)


def _open_shard(path: Path) -> tuple[Pin, Header]:
    pin = pin_file(path)
    return pin, read_header(pin, where=str(path))


def _collect(shards: Mapping[str, tuple[Pin, Header]]) -> Mapping[str, StoredTensor]:
    found = [stored for pin, header in shards.values() for stored in _store(pin, header)]
    return {stored.name: stored for stored in sorted(found, key=lambda stored: stored.name)}


def _store(pin: Pin, header: Header) -> Iterable[StoredTensor]:
    for tensor, offset in zip(header.tensors, header.offsets_bytes, strict=True):
        yield StoredTensor(tensor.name, tensor.dtype, tensor.shape, pin, offset, tensor.nbytes)


def _find_only(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if "adapter_config.json" in names:
        raise CheckpointError(f"{folder}: is a LoRA adapter, not a model; write it as <model>+{folder.name}")
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{folder}: has {len(found)} safetensors files and no {INDEX_NAME}")
    raise CheckpointError(f"{folder}: {_explain_none(names)}")


def _explain_none(names: Sequence[str]) -> str:
    foreign = [name for name in names if name.endswith(_FOREIGN_WEIGHTS) and name != "training_args.bin"]
    if foreign:
        return f"has {foreign[0]} but no safetensors file; convert it to safetensors first"
    return "has no safetensors file"


def _list_files(folder: Path) -> tuple[str, ...]:
    found = [path for path in folder.iterdir() if _is_small(path)]
    found += (folder / TEMPLATES_FOLDER).glob("*.jinja")
    return tuple(sorted(path.relative_to(folder).as_posix() for path in found))


def _is_small(path: Path) -> bool:
    weights = path.name.endswith((".safetensors", ".index.json", *_FOREIGN_WEIGHTS))
    return path.is_file() and not weights and not path.name.startswith(".")


def _read_small(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
