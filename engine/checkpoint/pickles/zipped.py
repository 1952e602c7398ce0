"""The directory of a zip file, as ``torch.save`` writes one: where the bytes of each entry lie.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3 and 4.5.3 (zip64). Stricter than it, since what
readers of zips disagree on is what attacks are made of: the directory ends at the end of the file, each name is there
once and once only, as directory and local header agree, entries lie side by side, and none is compressed or encrypted.
`zipfile` is not used: it reads no ranges, and takes what is refused here.
"""

import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mergemill.engine.checkpoint.pickles.reader import read_bytes
from mergemill.engine.errors import PickledError
from mergemill.engine.storage.ranges import Pin, is_remote
from mergemill.engine.storage.store import Storage

MOST_DIRECTORY_BYTES = 64 << 20
AT_ONCE = 32  # local headers that are asked for at a time, of a remote file

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ABSENT16, _ABSENT32 = 0xFFFF, 0xFFFFFFFF  # where a number is in zip64's own field
_ENCRYPTED, _LATER = 0x1, 0x8  # flags; the second: sizes follow the data


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the directory."""

    name: str
    nbytes: int
    header_bytes: int  # where its local header begins, from the start of the file
    next_bytes: int  # where the next entry begins, or the directory


def read_directory(pin: Pin, storage: Storage, *, where: str) -> Mapping[str, Entry]:
    """Return the entries of a zip file by name; `PickledError` for anything but a plain, sound one."""
    tail_bytes = min(pin.size_bytes, _END.size + _LOCATOR.size + _END64.size)
    if tail_bytes < _END.size:
        raise PickledError(f"{where}: cut short: a zip file with {pin.size_bytes} bytes")
    tail = read_bytes(pin, pin.size_bytes - tail_bytes, pin.size_bytes, storage)
    count, size, start = _find_directory(tail, pin.size_bytes, where)
    blob = read_bytes(pin, start, start + size, storage)
    return _parse_directory(blob, count, start, where)


def find_data(pin: Pin, entries: Sequence[Entry], storage: Storage, *, where: str) -> Mapping[str, int]:
    """Return where the data of each entry begin, by name, as its local header says."""
    with ThreadPoolExecutor(AT_ONCE if is_remote(pin.url) else 1) as pool:
        found = pool.map(lambda entry: _read_local(pin, entry, storage, where), entries)
        return {entry.name: start for entry, start in zip(entries, found, strict=True)}


def _find_directory(tail: bytes, file_bytes: int, where: str) -> tuple[int, int, int]:
    """Return how many entries the directory has, its size, and where it starts."""
    magic, disk, start_disk, here, count, size, start, comment = _END.unpack(tail[-_END.size :])
    if magic != b"PK\x05\x06" or comment:
        raise PickledError(
            f"{where}: does not end as a zip file of torch.save does, with its directory; is the download complete?"
        )
    end = file_bytes - _END.size
    rest = tail[: -_END.size]
    if rest[-_LOCATOR.size :][:4] == b"PK\x06\x07":
        _, _, at, _ = _LOCATOR.unpack(rest[-_LOCATOR.size :])
        end = file_bytes - _END.size - _LOCATOR.size - _END64.size
        if at != end or len(rest) < _LOCATOR.size + _END64.size:
            raise PickledError(f"{where}: the end of its zip64 directory is not where its locator says, at byte {at}")
        whole = _END64.unpack(rest[: _END64.size])
        _check_agreement((here, count, size, start), whole[6:10], where)
        magic, disk, start_disk, (here, count, size, start) = whole[0], whole[4], whole[5], whole[6:10]
        if magic != b"PK\x06\x06":
            raise PickledError(f"{where}: its zip64 directory has no end")
    if disk or start_disk or here != count:
        raise PickledError(f"{where}: is one of several disks of a zip file")
    if start + size != end:
        raise PickledError(f"{where}: its zip directory is {size} bytes from byte {start} on, and should end at {end}")
    if size > MOST_DIRECTORY_BYTES or count * _ENTRY.size > size:
        raise PickledError(f"{where}: its zip directory of {size} bytes cannot have {count} entries")
    return count, size, start


def _check_agreement(short: Sequence[int], whole: Sequence[int], where: str) -> None:
    for little, full in zip(short, whole, strict=True):
        if little not in (full, _ABSENT16, _ABSENT32):
            raise PickledError(f"{where}: its zip directory says both {little} and, by zip64, {full}")


def _parse_directory(blob: bytes, count: int, start: int, where: str) -> Mapping[str, Entry]:
    found: list[tuple[int, str, int]] = []
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(blob):
            raise PickledError(f"{where}: its zip directory is cut short")
        fields = _ENTRY.unpack_from(blob, at)
        name_at = at + _ENTRY.size
        extra_at = name_at + fields[10]
        at = extra_at + fields[11] + fields[12]
        if fields[0] != b"PK\x01\x02" or at > len(blob):
            raise PickledError(f"{where}: its zip directory is damaged")
        name = _read_name(blob[name_at:extra_at], where)
        nbytes, header = _read_sizes(fields, blob[extra_at : extra_at + fields[11]], f"{where}: its entry {name!r}")
        found.append((header, name, nbytes))
    if at != len(blob):
        raise PickledError(f"{where}: its zip directory has {len(blob) - at} bytes more than its entries")
    return _lay_out(sorted(found), start, where)


def _read_name(data: bytes, where: str) -> str:
    name = data.decode("latin-1")
    if not data.isascii() or not name.isprintable():
        raise PickledError(f"{where}: its zip directory names {name!r}, which torch.save does not")
    if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
        raise PickledError(f"{where}: its zip directory names {name!r}, which leads out of it")
    return name


def _read_sizes(fields: tuple[int, ...], extra: bytes, where: str) -> tuple[int, int]:
    """Return the size of an entry and where its header begins."""
    flags, method, packed, nbytes, disk, header = fields[3], fields[4], fields[8], fields[9], fields[13], fields[16]
    if flags & _ENCRYPTED:
        raise PickledError(f"{where} is encrypted")
    if method:
        raise PickledError(f"{where} is compressed (method {method}), so that no range of it can be read; save it anew")
    wide = _find_wide(extra, where)
    values = [nbytes, packed, header]
    for i, value in enumerate(values):
        if value == _ABSENT32:
            if len(wide) < 8:
                raise PickledError(f"{where} lacks a number of zip64")
            values[i], wide = int.from_bytes(wide[:8], "little"), wide[8:]
    if disk not in (0, _ABSENT16):
        raise PickledError(f"{where} is on another disk of the zip file")
    if values[0] != values[1]:
        raise PickledError(f"{where} says that {values[0]} bytes take {values[1]}, and that it is not compressed")
    return values[0], values[2]


def _find_wide(extra: bytes, where: str) -> bytes:
    """Return the numbers of zip64 in the extra field of an entry."""
    at, found = 0, b""
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if at + 4 + size > len(extra):
            raise PickledError(f"{where} has an extra field that is cut short")
        if kind == 1:
            if found:
                raise PickledError(f"{where} has numbers of zip64 twice")
            found = extra[at + 4 : at + 4 + size]
        at += 4 + size
    return found


def _lay_out(found: Sequence[tuple[int, str, int]], start: int, where: str) -> Mapping[str, Entry]:
    """Return entries that lie side by side, from the first byte to the directory."""
    entries: dict[str, Entry] = {}
    if found and found[0][0] != 0:
        raise PickledError(f"{where}: has {found[0][0]} bytes before its first entry; a zip file begins with one")
    for i, (header, name, nbytes) in enumerate(found):
        after = found[i + 1][0] if i + 1 < len(found) else start
        if name in entries:
            raise PickledError(f"{where}: has two entries {name!r}")
        if header + _LOCAL.size + len(name) + nbytes > after:
            what = f"entry {found[i + 1][1]!r}" if i + 1 < len(found) else "directory"
            raise PickledError(f"{where}: its entry {name!r} of {nbytes} bytes and its {what} overlap")
        entries[name] = Entry(name, nbytes, header, after)
    return entries


def _read_local(pin: Pin, entry: Entry, storage: Storage, where: str) -> int:
    """Return where the data of an entry begin."""
    stop = entry.header_bytes + _LOCAL.size + len(entry.name)
    blob = read_bytes(pin, entry.header_bytes, stop, storage)
    magic, _, flags, method, _, _, _, packed, nbytes, name_bytes, extra_bytes = _LOCAL.unpack_from(blob)
    name = blob[_LOCAL.size :]
    if magic != b"PK\x03\x04" or name_bytes != len(entry.name) or name != entry.name.encode():
        raise PickledError(
            f"{where}: at byte {entry.header_bytes} there is no entry {entry.name!r}, as its directory says"
        )
    later = bool(flags & _LATER)
    known = (entry.nbytes, _ABSENT32, *([0] if later else []))
    if flags & _ENCRYPTED or method or packed not in known or nbytes not in known:
        raise PickledError(
            f"{where}: entry {entry.name!r} is said to be another by its own header than by the directory"
        )
    start: int = stop + extra_bytes
    if start + entry.nbytes > entry.next_bytes:
        raise PickledError(f"{where}: the data of entry {entry.name!r} go on into the next")
    return start
