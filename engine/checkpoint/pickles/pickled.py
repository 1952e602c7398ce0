"""A file of ``torch.save``, zip or older: its tensors by name, and where the data of each lie. Reads no weight.

A tensor lies in its storage by an offset and strides. One whose elements lie side by side is read as one range,
whatever the order of its axes, as a matrix that was transposed; what has gaps, or repeats an element, is refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergemill.engine.checkpoint.layout import DTYPE_BITS
from mergemill.engine.checkpoint.pickles.legacy import read_legacy
from mergemill.engine.checkpoint.pickles.names import Names, show
from mergemill.engine.checkpoint.pickles.opcodes import unpickle
from mergemill.engine.checkpoint.pickles.reader import Reader, read_bytes
from mergemill.engine.checkpoint.pickles.state_dict import find_state_dict, say_left_out
from mergemill.engine.checkpoint.pickles.values import StorageRef, TensorRef, Value
from mergemill.engine.checkpoint.pickles.zipped import Entry, find_data, read_directory
from mergemill.engine.errors import PickledError
from mergemill.engine.storage.ranges import Pin
from mergemill.engine.storage.store import ENVIRONMENT, Storage

_KINDS = {
    b"{": "JSON", b"GGUF": "a GGUF file", b"\x89HDF": "an HDF5 file", b"version https://git-lfs": "a pointer of "
    "Git LFS, not the weights; fetch them with: git lfs pull", b"Rar!": "a RAR archive", b"\x1f\x8b": "a gzip file",
}  # fmt: skip
_TAR_AT = 257  # where a tar archive says what it is


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """Where a tensor of such a file is."""

    name: str
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]
    offset_bytes: int  # from the start of the file
    nbytes: int  # size of its data
    axes: tuple[int, ...] | None  # its axes, as the data go by them, from the slowest; None: as `shape` has them


def read_pickled(
    pin: Pin, storage: Storage = ENVIRONMENT, *, where: str, chosen: str = ""
) -> tuple[tuple[PickledTensor, ...], str]:
    """Return the tensors of a file, and what was left out of it in words; empty if nothing was.

    `chosen` is the path of the dictionary that is wanted, of several. Raises `PickledError`.
    """
    beginning = read_bytes(pin, 0, min(512, pin.size_bytes), storage)
    if beginning.startswith(b"PK\x03\x04"):
        saved, entries, root = _read_zip(pin, storage, where)
        tensors, left = find_state_dict(saved, chosen, where=where)
        names = {f"{root}/data/{each.storage.key}": None for each in tensors.values()}
        found = find_data(pin, [entries[name] for name in names], storage, where=where)
        starts: Mapping[str, int] = {name.removeprefix(f"{root}/data/"): start for name, start in found.items()}
    else:
        _check_kind(beginning, where)
        saved, starts = read_legacy(pin, storage, where=where)
        tensors, left = find_state_dict(saved, chosen, where=where)
    placed = tuple(_place(name, each, starts, where) for name, each in tensors.items())
    return placed, say_left_out(left, where=where) if left else ""


def _check_kind(beginning: bytes, where: str) -> None:
    kind = next((kind for magic, kind in _KINDS.items() if beginning.startswith(magic)), "")
    if beginning[_TAR_AT : _TAR_AT + 5] == b"ustar":
        kind = "a tar archive, as torch wrote before 0.1.10; save its state_dict as safetensors with that torch"
    if kind or not beginning.startswith(b"\x80"):
        raise PickledError(f"{where}: is {kind or 'no file that torch.save wrote'}")


def _read_zip(pin: Pin, storage: Storage, where: str) -> tuple[Value, Mapping[str, Entry], str]:
    entries = read_directory(pin, storage, where=where)
    root = _find_root(entries, where)
    order = _read_small(pin, entries.get(f"{root}/byteorder"), storage, where)
    if order not in (b"", b"little"):
        raise PickledError(
            f"{where}: its numbers are written with their bytes in the order {order!r}; known is 'little'"
        )

    def load(found: StorageRef) -> StorageRef:
        entry = entries.get(f"{root}/data/{found.key}")
        if entry is None:
            raise PickledError(f"{where}: its pickle asks for storage {show(found.key)}, which the file does not have")
        if entry.nbytes != found.nbytes:
            raise PickledError(
                f"{where}: its pickle says that storage {show(found.key)} has {found.nbytes} bytes; it has "
                f"{entry.nbytes}"
            )
        return found

    pickle = entries[f"{root}/data.pkl"]
    start = find_data(pin, [pickle], storage, where=where)[pickle.name]
    reader = Reader(pin, start, start + pickle.nbytes, storage, where=where)
    saved = unpickle(reader, Names(load, where=where))
    if reader.position_bytes != start + pickle.nbytes:
        raise PickledError(f"{where}: goes on after its pickle ends, in {pickle.name!r}")
    return saved, entries, root


def _find_root(entries: Mapping[str, Entry], where: str) -> str:
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        what = "no data.pkl" if not roots else f"{len(roots)} files data.pkl"
        raise PickledError(f"{where}: is a zip file with {what}, and none of torch.save")
    if any(name.startswith(f"{roots[0]}/code/") for name in entries):
        raise PickledError(
            f"{where}: is a TorchScript archive, which holds a program; save its state_dict as safetensors"
        )
    return roots[0]


def _read_small(pin: Pin, entry: Entry | None, storage: Storage, where: str) -> bytes:
    if entry is None:
        return b""
    if entry.nbytes > len(b"little"):
        raise PickledError(f"{where}: its entry {entry.name!r} has {entry.nbytes} bytes")
    start = find_data(pin, [entry], storage, where=where)[entry.name]
    return read_bytes(pin, start, start + entry.nbytes, storage)


def _place(name: str, tensor: TensorRef, starts: Mapping[str, int], where: str) -> PickledTensor:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise PickledError(f"{where}: tensor {show(name)!r} has a name that is no text") from None
    axes = sort_axes(tensor.shape, tensor.strides)
    if axes is None:
        raise PickledError(
            f"{where}: tensor {show(name)} is a view of its storage with gaps or repetitions (shape "
            f"{list(tensor.shape)}, strides {list(tensor.strides)}); save it as .contiguous()"
        )
    item = DTYPE_BITS[tensor.dtype] // 8
    start = starts[tensor.storage.key] + tensor.offset * item
    plain = axes == tuple(range(len(axes)))
    nbytes = math.prod(tensor.shape) * item
    return PickledTensor(name, tensor.dtype, tensor.shape, start, nbytes, None if plain else axes)


def sort_axes(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """Return the axes as the data go by them, from the slowest; None where elements do not lie side by side.

    >>> sort_axes((2, 3), (3, 1)), sort_axes((2, 3), (1, 2)), sort_axes((2, 3), (6, 2)), sort_axes((1, 3), (0, 1))
    ((0, 1), (1, 0), None, (0, 1))
    """
    plain = tuple(range(len(shape)))
    if 0 in shape:
        return plain
    moving = [axis for axis in plain if shape[axis] > 1]
    order = sorted(moving, key=lambda axis: -strides[axis])
    step = 1
    for axis in reversed(order):
        if strides[axis] != step:
            return None
        step *= shape[axis]
    if order == moving:
        return plain
    return (*(axis for axis in plain if shape[axis] <= 1), *order)
