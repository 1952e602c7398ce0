"""The weights of a stored model: which of its files hold them, and where each tensor lies. Reads no weight.

Layouts, in this order: one ``model.safetensors``; shards with ``model.safetensors.index.json``; what diffusers calls
``diffusion_pytorch_model``, in the same two ways; the only safetensors file of a folder, whatever its name. Where there
is none, the same of what ``torch.save`` wrote: ``pytorch_model.bin`` or its shards and index, or the only such file. So
safetensors win where a folder has both, as in transformers.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import NamedTuple

from mergemill.engine.checkpoint.header import read_header
from mergemill.engine.checkpoint.index import INDEX_NAME, check_index, check_shards, parse_index
from mergemill.engine.checkpoint.unfinished import check_names, check_pointer
from mergemill.engine.errors import CheckpointError, IndexFileError
from mergemill.engine.storage.bounds import find_bound
from mergemill.engine.storage.ranges import Pin, is_remote, join, pin_file, read_whole
from mergemill.engine.storage.store import Storage
from mergemill.engine.storage.urls import PICKLED_ENDINGS

HEADER_THREADS = 8  # headers are read at the same time, since each waits for the disk twice
FOREIGN_ENDINGS = (".gguf", ".h5", ".msgpack")  # of weights that are not read
DIFFUSERS_STEM = "diffusion_pytorch_model"  # of its files of weights
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")  # of a model in the Hub's cache
# What trainers save beside a model, and is none.
_TRAINERS = (
    "training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "trainer_state.*",
)  # fmt: skip


class StoredTensor(NamedTuple):
    """Where one tensor is stored."""

    name: str
    dtype: str  # the format's name: "BF16"
    shape: tuple[int, ...]  # elements along each axis
    file: Pin  # the file that holds it
    offset_bytes: int  # where its data begin, from the start of the file
    nbytes: int  # size of its data
    read_from: Pin | None = None  # a file with the same content that is read instead
    axes: tuple[int, ...] | None = None  # as the data go by them, from the slowest; None: in the order of `shape`


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a model, and what its files hold beside them."""

    tensors: Mapping[str, StoredTensor]  # by name, in the order of the names
    left_out: tuple[str, ...] = ()  # what is no weight, in words, for each file that has such


@dataclass(frozen=True, slots=True)
class _Format:
    """How the files of one format are called in a folder."""

    index: str
    single: str
    endings: tuple[str, ...]


SAFETENSORS = _Format(INDEX_NAME, "model.safetensors", (".safetensors",))
PICKLES = _Format("pytorch_model.bin.index.json", "pytorch_model.bin", PICKLED_ENDINGS)
# The same of a component of diffusers.
_DIFFUSERS = _Format(f"{DIFFUSERS_STEM}.safetensors.index.json", f"{DIFFUSERS_STEM}.safetensors", SAFETENSORS.endings)
_DIFFUSERS_PICKLES = _Format(f"{DIFFUSERS_STEM}.bin.index.json", f"{DIFFUSERS_STEM}.bin", PICKLES.endings)


def open_folder(place: str, found: Mapping[str, Pin], storage: Storage) -> Weights:
    """Return the weights of a folder of these files."""
    for several in ((SAFETENSORS, _DIFFUSERS), (PICKLES, _DIFFUSERS_PICKLES)):
        for each in several:
            if each.index in found:
                return _open_sharded(place, found, each, storage)
            if each.single in found:
                return _open_files(place, {each.single: found[each.single]}, storage)
        if name := _find_only(place, found, several[0]):
            return _open_files(place, {name: found[name]}, storage)
    raise CheckpointError(f"{place}: {_explain_none(found, place.rpartition('/')[2])}")


def open_file(place: str, ref: str, chosen: str, storage: Storage) -> Weights:
    """Return the weights in one file; `chosen`: of several dictionaries in it, which."""
    path = PurePosixPath(place)
    if path.suffix in FOREIGN_ENDINGS:
        raise CheckpointError(f"{ref}: is neither a safetensors file nor one of torch.save; convert it to one first")
    if path.suffix not in (*SAFETENSORS.endings, *PICKLES.endings):
        raise CheckpointError(f"{ref}: is neither a folder nor a file of weights ({_list_endings()})")
    check_names([path.name], ref)
    return _join([_open_shard(pin_file(place, storage), place, storage, chosen)])


def open_pinned(pin: Pin, where: str, storage: Storage) -> Weights:
    """Return the weights in a file that is known."""
    return _join([_open_shard(pin, where, storage)])


def is_weights(name: str) -> bool:
    """Whether a file holds weights, of any format, or says in which others they are."""
    return name.endswith((*SAFETENSORS.endings, *PICKLES.endings, *FOREIGN_ENDINGS, ".index.json"))


def _list_endings() -> str:
    return " ".join((*SAFETENSORS.endings, *PICKLES.endings))


def _open_files(place: str, files: Mapping[str, Pin], storage: Storage) -> Weights:
    return _join([_open_shard(pin, join(place, name), storage) for name, pin in files.items()])


def _open_sharded(place: str, found: Mapping[str, Pin], kind: _Format, storage: Storage) -> Weights:
    where = join(place, kind.index)
    text = read_whole(found[kind.index], find_bound(kind.index), storage)
    weight_map = parse_index(text, where=where, endings=kind.endings)
    files = _find_shards(place, set(weight_map.values()), found, storage)
    if kind.single in found and kind.single not in files:
        # Loaders disagree on which of the two is the model.
        raise IndexFileError(f"{where}: does not name {kind.single}, which is beside it; remove one of them")
    names = check_shards(weight_map, files.keys(), where=where)
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        opened = pool.map(lambda name: _open_shard(files[name], join(place, name), storage), names)
        shards = dict(zip(names, opened, strict=True))
    check_index(weight_map, {name: frozenset(shard.tensors) for name, shard in shards.items()}, where=where)
    return _join(shards.values())


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


def _open_shard(pin: Pin, where: str, storage: Storage, chosen: str = "") -> Weights:
    """Return the weights of one file, in the order in which it has them."""
    check_pointer(pin, where, storage)
    if where.endswith(PICKLES.endings):
        from mergemill.engine.checkpoint.pickles.pickled import read_pickled

        pickled, left_out = read_pickled(pin, storage, where=where, chosen=chosen)
        tensors = {
            each.name: StoredTensor(
                each.name, each.dtype, each.shape, pin, each.offset_bytes, each.nbytes, axes=each.axes
            )
            for each in pickled
        }
        return Weights(tensors, (left_out,) if left_out else ())
    header = read_header(pin, storage, where=where)
    places = zip(header.tensors, header.offsets_bytes, strict=True)
    return Weights({each.name: StoredTensor(*each, pin, at, each.nbytes) for each, at in places})


def _join(shards: Iterable[Weights]) -> Weights:
    kept = list(shards)
    tensors = {name: stored for shard in kept for name, stored in shard.tensors.items()}
    return Weights(dict(sorted(tensors.items())), tuple(told for shard in kept for told in shard.left_out))


def _find_only(place: str, files: Iterable[str], kind: _Format) -> str:
    """Return the only file of a format; empty where there is none."""
    names = sorted(name for name in files if "/" not in name)
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{place}: is a LoRA adapter, not a model; write it as <model>+{place.rpartition('/')[2]}"
        )
    found = [name for name in names if name.endswith(kind.endings) and not _is_trainers(name)]
    check_names(found, place)
    if len(found) > 1:
        what = "safetensors files" if kind is SAFETENSORS else f"files of torch.save ({found[0]}, {found[1]}, …)"
        raise CheckpointError(f"{place}: has {len(found)} {what} and no {kind.index}")
    return found[0] if found else ""


def _is_trainers(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _TRAINERS)


def _explain_none(names: Iterable[str], folder: str) -> str:
    foreign = sorted(name for name in names if "/" not in name and name.endswith(FOREIGN_ENDINGS))
    if foreign:
        advice = "name that file itself" if foreign[0].endswith(".gguf") else "convert it to safetensors first"
        return f"has {foreign[0]} but no safetensors file; {advice}"
    if named := _CACHED.fullmatch(folder):
        model = f"{named['owner']}/{named['name']}"
        return f"is a folder of the Hub's cache, which holds several revisions; give {model}, or a folder in snapshots/"
    return f"has no file of weights ({_list_endings()})"
