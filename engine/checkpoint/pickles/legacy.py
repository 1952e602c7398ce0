"""Files of ``torch.save`` as it wrote them before 1.6, and does still when asked: pickles, and the storages after them.

Format: ``torch/serialization.py``, ``_legacy_save``: the pickles of a magic number, of a version, of how the machine
writes numbers, of what was saved, and of the storages' keys; then each storage in that order: how many elements it has,
in 8 bytes, and these.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mergemill.engine.checkpoint.layout import DTYPE_BITS
from mergemill.engine.checkpoint.pickles.names import Names
from mergemill.engine.checkpoint.pickles.opcodes import unpickle
from mergemill.engine.checkpoint.pickles.reader import Reader, read_bytes
from mergemill.engine.checkpoint.pickles.values import StorageRef, Value
from mergemill.engine.errors import PickledError
from mergemill.engine.storage.ranges import Pin, is_remote
from mergemill.engine.storage.store import Storage

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
COUNT_BYTES = 8
AT_ONCE = 32  # counts that are asked for at a time, of a remote file


def read_legacy(pin: Pin, storage: Storage, *, where: str) -> tuple[Value, Mapping[str, int]]:
    """Return what was saved, and where the data of each storage begin, by key."""
    held: dict[str, StorageRef] = {}

    def load(found: StorageRef) -> StorageRef:
        before = held.setdefault(found.key, found)
        if before.nbytes != found.nbytes or before.dtype != found.dtype:
            raise PickledError(f"{where}: its pickle says of storage {found.key!r} that it has two sizes or dtypes")
        return found

    reader = Reader(pin, 0, pin.size_bytes, storage, where=where)
    magic, version, system, saved, keys = (unpickle(reader, Names(load, where=where)) for _ in range(5))
    if magic != MAGIC:
        raise PickledError(f"{where}: is a pickle, but none of torch.save; save its state_dict as safetensors")
    if version != PROTOCOL or not _is_little(system):
        raise PickledError(f"{where}: is of version {version!r} of torch.save, or of a machine with other byte order")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(held):
        raise PickledError(f"{where}: its list of storages is not that of its pickle")
    return saved, _find_data(pin, [held[key] for key in keys], reader.position_bytes, storage, where)


def _is_little(system: Any) -> bool:
    return isinstance(system, dict) and system.get("little_endian", True) is True


def _find_data(
    pin: Pin, storages: Sequence[StorageRef], start_bytes: int, storage: Storage, where: str
) -> Mapping[str, int]:
    found: dict[str, int] = {}
    at = start_bytes
    for each in storages:
        found[each.key] = at + COUNT_BYTES
        at += COUNT_BYTES + each.nbytes
    if at != pin.size_bytes:
        raise PickledError(
            f"{where}: its pickle says that its storages end at byte {at}; the file has {pin.size_bytes}"
        )

    def check(each: StorageRef) -> None:
        data = read_bytes(pin, found[each.key] - COUNT_BYTES, found[each.key], storage)
        elements = each.nbytes * 8 // DTYPE_BITS[each.dtype or "U8"]
        if int.from_bytes(data, "little") != elements:
            raise PickledError(
                f"{where}: storage {each.key!r} has {int.from_bytes(data, 'little')} elements, and {elements} by its "
                f"pickle"
            )

    with ThreadPoolExecutor(AT_ONCE if is_remote(pin.url) else 1) as pool:
        list(pool.map(check, storages))
    return found
