"""Files as ``torch.save`` writes them, by hand: zip archives of any pickle, and pickles of any opcodes."""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

STOP = b"."
PROTO = b"\x80\x02"


def write_torch(path: Path, saved: object, *, zipped: bool = True, protocol: int = 2) -> Path:
    """Have torch write a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def make_zip(
    code: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    root: str = "archive",
    more: Mapping[str, bytes] | None = None,
    method: int = zipfile.ZIP_STORED,
) -> bytes:
    """Return an archive of a pickle and its storages."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr(f"{root}/data.pkl", code)
        for key, data in (storages or {}).items():
            archive.writestr(f"{root}/data/{key}", data)
        for name, data in (more or {}).items():
            archive.writestr(name, data)
    return out.getvalue()


def name(module: str, word: str) -> bytes:
    """Ask for a name, by GLOBAL."""
    return f"c{module}\n{word}\n".encode()


def name_by_stack(module: bytes, word: bytes) -> bytes:
    """Ask for a name, by STACK_GLOBAL; of what the opcodes make."""
    return module + word + b"\x93"


def text(value: str) -> bytes:
    """A text."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """A whole number of any size."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    """A tuple of numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def call(callee: bytes, *arguments: bytes) -> bytes:
    """Call by REDUCE."""
    return callee + b"(" + b"".join(arguments) + b"tR"


def storage(key: str = "0", elements: int = 4, kind: str = "FloatStorage") -> bytes:
    """A storage by its persistent id."""
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + number(elements) + b"tQ"


REBUILD = name("torch._utils", "_rebuild_tensor_v2")
HOOKS = call(name("collections", "OrderedDict"))


def tensor(
    of: bytes | None = None,
    offset: int = 0,
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
) -> bytes:
    """A tensor as torch rebuilds one."""
    return call(REBUILD, of or storage(), number(offset), numbers(*shape), numbers(*strides), b"\x89", HOOKS)


def state_dict(*values: bytes) -> bytes:
    """A pickle of a dictionary of values, called a, b, …"""
    items = b"".join(text(chr(ord("a") + i)) + value for i, value in enumerate(values))
    return PROTO + b"}(" + items + b"u" + STOP


def make_legacy(code: bytes, keys: list[str], data: bytes, *, system: object = None) -> bytes:
    """Return a file as torch wrote them before 1.6; `data`: all that follows the list of storages."""
    head = [0x1950A86A20F9469CFC6C, 1001, system or {"protocol_version": 1001, "little_endian": True}]
    return b"".join(pickle.dumps(each, 2) for each in head) + code + pickle.dumps(keys, 2) + data


FLOATS = struct.pack("<4f", 1, 2, 3, 4)
SOUND = make_zip(state_dict(tensor()), {"0": FLOATS})
SOUND_LEGACY = make_legacy(state_dict(tensor()), ["0"], struct.pack("<q", 4) + FLOATS)
