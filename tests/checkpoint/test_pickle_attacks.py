"""Pickles by attackers: each is refused by the name of what it asks for, and nothing of it is run.

The kinds are those that picklescan, fickling and modelscan have met: names by every spelling and road, calls with odd
arguments, states that are set, sizes that lie, zip archives on which two readers disagree, and what takes memory.
"""

import io
import pickle
import resource
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from checkpoint.torch_files import (
    FLOATS,
    HOOKS,
    PROTO,
    REBUILD,
    SOUND,
    SOUND_LEGACY,
    STOP,
    call,
    make_legacy,
    make_zip,
    name,
    name_by_stack,
    number,
    numbers,
    state_dict,
    storage,
    tensor,
    text,
)

from mergemill.engine.checkpoint.pickles.pickled import read_pickled
from mergemill.engine.errors import PickledError
from mergemill.engine.storage.ranges import pin_file

DEEP = 100_000


def ask(code: bytes) -> bytes:
    """Return an archive whose pickle does something before it gives a sound dictionary."""
    return make_zip(PROTO + code + b"0" + state_dict(tensor())[len(PROTO) :], {"0": FLOATS})


def lie(code: bytes) -> bytes:
    """Return an archive with a storage of four floats, of which a tensor is made."""
    return make_zip(state_dict(code), {"0": FLOATS})


SPELLINGS = {
    "os.system": name("os", "system"),
    "posix.system": name("posix", "system"),
    "nt.system": name("nt", "system"),
    "builtins.eval": name("builtins", "eval"),
    "builtins.exec": name("builtins", "exec"),
    "builtins.getattr": name("builtins", "getattr"),
    "builtins.__import__": name("builtins", "__import__"),
    "builtins.dict.get": name("builtins", "dict.get"),
    "builtins.print.__class__.__base__.__subclasses__": name("builtins", "print.__class__.__base__.__subclasses__"),
    "__builtin__.execfile": name("__builtin__", "execfile"),
    "subprocess.Popen": name("subprocess", "Popen"),
    "importlib.import_module": name("importlib", "import_module"),
    "pkgutil.resolve_name": name("pkgutil", "resolve_name"),
    "runpy._run_code": name("runpy", "_run_code"),
    "operator.attrgetter": name("operator", "attrgetter"),
    "functools.partial": name("functools", "partial"),
    "marshal.loads": name("marshal", "loads"),
    "types.FunctionType": name("types", "FunctionType"),
    "types.CodeType": name("types", "CodeType"),
    "ctypes.CDLL": name("ctypes", "CDLL"),
    "socket.create_connection": name("socket", "create_connection"),
    "webbrowser.open": name("webbrowser", "open"),
    "pip.main": name("pip", "main"),
    "pdb.run": name("pdb", "run"),
    "timeit.timeit": name("timeit", "timeit"),
    "pydoc.pipepager": name("pydoc", "pipepager"),
    "asyncio.unix_events._UnixSubprocessTransport._start": name(
        "asyncio.unix_events", "_UnixSubprocessTransport._start"
    ),
    "pickle.loads": name("pickle", "loads"),
    "torch.load": name("torch", "load"),
    "torch.hub.load": name("torch.hub", "load"),
    "torch.storage._load_from_bytes": name("torch.storage", "_load_from_bytes"),
    "torch.os.system": name("torch", "os.system"),
    "torch.serialization.os.system": name("torch.serialization", "os.system"),
    "numpy.core._internal.sys.modules": name("numpy", "core._internal.sys.modules"),
    "numpy.testing._private.utils.runstring": name("numpy.testing._private.utils", "runstring"),
    "numpy.__builtins__": name("numpy", "__builtins__"),
    "transformers.models.auto.auto_factory.getattribute_from_module": name(
        "transformers.models.auto.auto_factory", "getattribute_from_module"
    ),
    "collections.OrderedDict.__class__": name("collections", "OrderedDict.__class__"),
    "collections._sys.modules": name("collections", "_sys.modules"),
    "torch.nn.modules.linear.Linear": name("torch.nn.modules.linear", "Linear"),
}
"""Names that run something, find other names, or load something."""

ROADS: dict[str, bytes] = {
    "STACK_GLOBAL": name_by_stack(text("os"), text("system")),
    "from the memo": text("os")
    + b"q\x00"
    + b"0"
    + text("system")
    + b"q\x01"
    + b"0"
    + name_by_stack(b"h\x00", b"h\x01"),
    "with decoys": text("collections") + b"q\x00" + text("os") + b"q\x01" + text("system") + b"\x93",
    "INST": b"(" + text("touch x") + b"ios\nsystem\n",
    "OBJ": b"(" + name("os", "system") + text("touch x") + b"o",
    "NEWOBJ": name("os", "system") + b"(" + text("touch x") + b"t\x81",
    "NEWOBJ_EX": name("os", "system") + b"(" + text("touch x") + b"t}\x92",
    "REDUCE": call(name("os", "system"), text("touch x")),
    "never called": name("os", "system"),
    "as an argument": call(name("collections", "OrderedDict"), name("os", "system")),
    "as the type of a storage": b"("
    + text("storage")
    + name("os", "system")
    + text("0")
    + text("cpu")
    + number(4)
    + b"tQ",
    "in a state": HOOKS + b"}(" + text("_metadata") + name("os", "system") + b"ub",
    "of a leftover": call(name("argparse", "Namespace")) + b"}(" + text("x") + name("os", "system") + b"ub",
    "as a key": b"}(" + name("os", "system") + b"Nu",
}
"""Roads by which os.system is asked for."""

ODD: dict[str, tuple[bytes, str]] = {
    "computed name": (ask(name_by_stack(call(name("torch", "Size"), numbers()), text("system"))), "computes the name"),
    "name of a number": (ask(b"K\x01" + text("system") + b"\x93"), "computes the name"),
    "call of a text": (ask(text("os.system") + b")R"), "calls a text"),
    "call of a dictionary": (ask(b"})R"), "calls a dictionary"),
    "call of a dtype": (ask(call(name("torch", "float32"))), "calls torch.float32, which is nothing to be called"),
    "call of a storage's type": (ask(call(name("torch", "FloatStorage"))), "calls torch.FloatStorage"),
    "call without a tuple": (ask(name("torch", "Size") + b"]R"), "calls torch.Size with a list for arguments"),
    "extension": (ask(b"\x82\x01"), "asks for an extension of copyreg"),
    "buffer from outside": (ask(b"\x97"), "asks for a buffer from outside"),
    "persistent id of text": (ask(b"Pmodule\n"), "persistent id that is a line of text"),
    "persistent id of a module": (ask(text("module") + b"Q"), "persistent id that is no storage"),
    "persistent id of 0.1.10": (
        ask(b"(" + text("module") + name("torch", "Size") + text("x.py") + text("import os") + text("") + b"tQ"),
        "persistent id that is no storage",
    ),
    "state of a name": (
        ask(name("torch", "Size") + b"}(" + text("os") + text("x") + b"ub"),
        "sets the state of torch.Size",
    ),
    "state of a tensor": (lie(tensor() + b"}b"), "sets the state of a tensor"),
    "state of a list": (ask(b"]}b"), "sets the state of a list"),
    "items of a name": (ask(name("torch", "Size") + text("x") + b"Ns"), "sets items of torch.Size"),
    "append to a dictionary": (ask(b"}Na"), "appends to a dictionary"),
    "tensor of a text": (lie(call(REBUILD, text("0"), number(0), numbers(4), numbers(1), b"\x89", HOOKS)), "of a text"),
    "tensor of three arguments": (lie(call(REBUILD, storage(), number(0), numbers(4))), "with 3 arguments"),
    "tensor by another function": (
        lie(
            call(
                name("torch._tensor", "_rebuild_from_type_v2"),
                name("torch", "Size"),
                name("torch", "Tensor"),
                b")",
                b"N",
            )
        ),
        "makes a tensor by torch.Size",
    ),
    "tensor of another type": (
        lie(call(name("torch._tensor", "_rebuild_from_type_v2"), REBUILD, name("torch", "Size"), b")", b"N")),
        "makes a tensor of type torch.Size",
    ),
    "sparse tensor": (lie(call(name("torch._utils", "_rebuild_sparse_tensor"))), "holds a sparse tensor"),
    "quantized tensor": (lie(call(name("torch._utils", "_rebuild_qtensor"))), "holds a tensor that is quantized"),
    "meta tensor": (lie(call(name("torch._utils", "_rebuild_meta_tensor_no_storage"))), "on the meta device"),
    "pairs that are none": (
        ask(call(name("collections", "OrderedDict"), b"](K\x01K\x02e")),
        "OrderedDict with odd arg",
    ),
    # sizes that lie
    "storage larger than its entry": (lie(tensor(storage(elements=5))), "storage 0 has 20 bytes; it has 16"),
    "storage smaller than its entry": (
        lie(tensor(storage(elements=3), shape=(3,))),
        "storage 0 has 12 bytes; it has 16",
    ),
    "storage that is not there": (lie(tensor(storage("1"))), "asks for storage 1, which the file does not have"),
    "storage of another folder": (lie(tensor(storage("../data.pkl"))), "asks for storage ../data.pkl"),
    "storage of a negative size": (lie(tensor(storage(elements=-4))), "of a storage with odd parts"),
    "storage of a huge size": (lie(tensor(storage(elements=1 << 80))), "of a storage with odd parts"),
    "storage of an odd dtype": (lie(tensor(storage(kind="QInt8Storage"))), "asks for torch.QInt8Storage"),
    "tensor past its storage": (lie(tensor(shape=(5,))), "ends at byte 20 of storage '0', which has 16"),
    "offset past its storage": (lie(tensor(offset=4)), "ends at byte 32 of storage '0', which has 16"),
    "stride past its storage": (lie(tensor(shape=(2, 2), strides=(3, 1))), "ends at byte 20 of storage '0'"),
    "negative stride": (lie(tensor(strides=(-1,))), "odd offset, shape or stride"),
    "negative offset": (lie(tensor(offset=-1)), "odd offset, shape or stride"),
    "shape of a text": (
        lie(call(REBUILD, storage(), number(0), b"(" + text("4") + b"t", numbers(1), b"\x89", HOOKS)),
        "odd offset, shape",
    ),
    "shape without end": (lie(tensor(shape=(1 << 40,) * 3, strides=(0,) * 3)), "makes a tensor of"),
    "many axes": (lie(tensor(shape=(1,) * 99, strides=(1,) * 99)), "makes a tensor of 99 axes"),
    "repeated elements": (
        lie(tensor(shape=(1 << 40,), strides=(0,))),
        "is a view of its storage with gaps or repetitions",
    ),
    "more strides than axes": (lie(tensor(shape=(4,), strides=(1, 1))), "1 axes with 2 strides"),
    # what takes memory, or time
    "number without end": (ask(b"\x8b" + struct.pack("<I", 1 << 30)), "has a number of 1073741824 bytes"),
    "digits without end": (ask(b"L" + b"9" * 4000 + b"L\n"), "has a number of 4001 digits"),
    "line without end": (ask(b"c" + b"o" * 9000 + b"\n"), "a line of its pickle is longer than"),
    "text past the end": (ask(b"X" + struct.pack("<I", 1 << 31)), "cut short"),
    "text of 2^63 bytes": (ask(b"\x8d" + struct.pack("<Q", 1 << 63)), "cut short"),
    "protocol of later": (make_zip(b"\x80\x06."), "is of protocol 6"),
    "unknown opcode": (ask(b"\xff"), "has the unknown opcode 0xff"),
    "empty stack": (make_zip(PROTO + b"0."), "takes a mark that is not there"),
    "no mark": (make_zip(PROTO + b"t."), "takes a mark that is not there"),
    "memo that is empty": (make_zip(PROTO + b"h\x07."), "takes 7 from its memo"),
    "no end": (make_zip(PROTO + b"}"), "cut short"),
    "more after the end": (
        make_zip(state_dict(tensor()) + b"cos\nsystem\n.", {"0": FLOATS}),
        "goes on after its pickle",
    ),
}
"""Pickles that lie, or cost."""


def damage(offset: int, data: bytes, of: bytes = SOUND) -> bytes:
    """Return a file with other bytes at a place, from its end where that is negative."""
    at = offset if offset >= 0 else len(of) + offset
    return of[:at] + data + of[at + len(data) :]


def in_directory(entry: int, offset: int, data: bytes, of: bytes = SOUND) -> bytes:
    """Return a zip archive with other bytes in an entry of its directory."""
    at = of.index(b"PK\x01\x02")
    for _ in range(entry):
        at = of.index(b"PK\x01\x02", at + 1)
    return damage(at + offset, data, of)


def in_local(entry: int, offset: int, data: bytes, of: bytes = SOUND) -> bytes:
    """The same in its local header."""
    at = 0
    for _ in range(entry):
        at = of.index(b"PK\x03\x04", at + 1)
    return damage(at + offset, data, of)


def with_zip64(at: int, start: int) -> bytes:
    """Return an archive whose zip64 end says where its directory starts."""
    count, size, _ = struct.unpack("<HLL", SOUND[-12:-2])
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, at if at >= 0 else len(SOUND) - 22, 1)
    return SOUND[:-22] + end64 + locator + SOUND[-22:]


def make_tar() -> bytes:
    """Return a file as torch wrote them before 0.1.10."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return out.getvalue()


TWO = make_zip(state_dict(tensor(), tensor(storage("1"))), {"0": FLOATS, "1": FLOATS})
ZIPPED = make_zip(state_dict(tensor()), {"0": FLOATS}, method=zipfile.ZIP_DEFLATED)
FILES: dict[str, tuple[bytes, str]] = {
    "compressed": (ZIPPED, "compressed (method 8)"),
    "compressed by its own header": (in_local(1, 8, b"\x08\0"), "is said to be another by its own header"),
    "encrypted": (in_directory(1, 8, b"\x01\0"), "is encrypted"),
    "two names alike": (TWO.replace(b"data/1", b"data/0"), "has two entries 'archive/data/0'"),
    "name out of the archive": (make_zip(state_dict(tensor()), {"../../x": FLOATS}), "which leads out of it"),
    "name from the root": (make_zip(state_dict(tensor()), more={"/etc/x": FLOATS}), "which leads out of it"),
    "name of a drive": (make_zip(state_dict(tensor()), more={"C:x": FLOATS}), "which leads out of it"),
    "name of two spellings": (in_local(1, 30, b"x"), "there is no entry 'archive/data/0', as its directory says"),
    "two pickles": (make_zip(state_dict(tensor()), {"0": FLOATS}, more={"x/data.pkl": b"."}), "with 2 files data.pkl"),
    "no pickle": (make_zip(b"", root="a").replace(b"data.pkl", b"data.pkx"), "with no data.pkl"),
    "program": (make_zip(state_dict(tensor()), more={"archive/code/x.py": b""}), "is a TorchScript archive"),
    "entry in another": (in_directory(1, 42, struct.pack("<L", 10)), "overlap"),
    "entry past the file": (in_directory(1, 42, struct.pack("<L", 1 << 30)), "overlap"),
    "size past the file": (in_directory(1, 20, struct.pack("<2L", 1 << 30, 1 << 30)), "overlap"),
    "two sizes": (in_directory(1, 20, struct.pack("<2L", 8, 16)), "says that 16 bytes take 8"),
    "size of its own header": (in_local(1, 18, struct.pack("<2L", 8, 8)), "is said to be another by its own header"),
    "data in the next entry": (in_local(0, 28, b"\x40\0", of=TWO), "go on into the next"),
    "bytes before": (b"#!/bin/sh\n" + SOUND, "is no file that torch.save wrote"),
    "bytes after": (SOUND + b"x", "does not end as a zip file"),
    "comment": (damage(-2, b"\x01\0") + b"x", "does not end as a zip file"),
    "cut short": (SOUND[:-30], "does not end as a zip file"),
    "directory elsewhere": (damage(-6, struct.pack("<L", 4)), "should end at"),
    "count that lies": (damage(-14, struct.pack("<2H", 9, 9)), "cannot have 9 entries"),
    "count less than there are": (damage(-14, struct.pack("<2H", 1, 1)), "bytes more than its entries"),
    "several disks": (damage(-18, b"\x01\0"), "one of several disks"),
    "zip64 that is elsewhere": (with_zip64(7, 0), "not where its locator says, at byte 7"),
    "zip64 that disagrees": (with_zip64(-1, 9), "by zip64, 9"),
    "other byte order": (make_zip(state_dict(tensor()), {"0": FLOATS}, more={"archive/byteorder": b"big"}), "b'big'"),
    "long byte order": (make_zip(state_dict(tensor()), more={"archive/byteorder": b"x" * 99}), "has 99 bytes"),
    # the format before 1.6
    "pickle of something": (pickle.dumps([1], 4), "cut short"),
    "magic number": (pickle.dumps(7, 2) * 5, "none of torch.save"),
    "other machine": (
        make_legacy(state_dict(tensor()), ["0"], struct.pack("<q", 4) + FLOATS, system={"little_endian": False}),
        "other byte order",
    ),
    "storage that is not listed": (make_legacy(state_dict(tensor()), [], b""), "its list of storages is not that"),
    "storage that is listed twice": (make_legacy(state_dict(tensor()), ["0", "0"], b""), "its list of storages is not"),
    "storage of two sizes": (make_legacy(state_dict(tensor(), tensor(storage(elements=9))), ["0"], b""), "two sizes"),
    "storages past the end": (SOUND_LEGACY[:-1], "its storages end at byte"),
    "count of a storage": (make_legacy(state_dict(tensor()), ["0"], struct.pack("<q", 3) + FLOATS), "has 3 elements"),
    "os.system in it": (make_legacy(PROTO + call(name("os", "system"), text("x")) + STOP, [], b""), "for os.system"),
    "os.system before it": (PROTO + call(name("os", "system"), text("x")) + STOP, "asks for os.system"),
    "tar": (make_tar(), "is a tar archive"),
    # what is none
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a pointer of Git LFS"),
    "GGUF": (b"GGUF\3\0\0\0", "is a GGUF file"),
    "page": (b"<!doctype html>", "is no file that torch.save wrote"),
    "empty": (b"", "is no file that torch.save wrote"),
}  # fmt: skip
"""Files on which readers disagree, or that lie about their parts."""


def refuse(tmp_path: Path, data: bytes) -> str:
    """Return why a file is refused."""
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(PickledError) as refusal:
        read_pickled(pin_file(tmp_path / "x.pt"), where="x.pt")
    told = str(refusal.value)
    assert told.startswith("x.pt: ")
    assert "\n" not in told
    return told


@pytest.mark.parametrize("full", SPELLINGS)
def test_a_name_that_is_no_part_of_a_tensor_is_refused_by_name(full: str, tmp_path: Path) -> None:
    told = refuse(tmp_path, ask(call(SPELLINGS[full], text("touch x"))))
    assert f"its pickle asks for {full}, which is no part of a tensor; nothing of it was run" in told


@pytest.mark.parametrize("road", ROADS)
def test_a_name_is_refused_by_whatever_road_it_is_asked_for(
    road: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "asks for os.system" in refuse(tmp_path, ask(ROADS[road]))
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("kind", ODD)
def test_a_pickle_that_lies_or_costs_is_refused(kind: str, tmp_path: Path) -> None:
    data, why = ODD[kind]
    assert why in refuse(tmp_path, data)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_on_which_readers_disagree_is_refused(kind: str, tmp_path: Path) -> None:
    data, why = FILES[kind]
    assert why in refuse(tmp_path, data)


def test_what_the_attacks_are_made_of_is_read(tmp_path: Path) -> None:
    for data in (SOUND, SOUND_LEGACY, TWO, ask(b"N")):
        (tmp_path / "x.pt").write_bytes(data)
        tensors, left_out = read_pickled(pin_file(tmp_path / "x.pt"), where="x.pt")
        assert {(each.name, each.dtype, each.shape) for each in tensors} >= {("a", "F32", (4,))}
        assert left_out == ""
        for each in tensors:
            assert data[each.offset_bytes : each.offset_bytes + 16] == FLOATS


BOMBS: dict[str, Callable[[], bytes]] = {
    "tuples of tuples, shared": lambda: ask(b")q\x00h\x00" + b"".join(b"\x86q\x01h\x01" for _ in range(DEEP)) + b"0"),
    "tuples in tuples": lambda: ask(b")" + b"\x85" * DEEP),
    "lists in lists": lambda: ask(b"]" * DEEP + b"a" * (DEEP - 1)),
    "dictionaries in dictionaries": lambda: state_dicts_in_each_other(),
    "a dictionary in itself": lambda: make_zip(PROTO + b"}q\x00(" + text("model") + b"h\x00u."),
    "marks": lambda: ask(b"(" * DEEP + b"1" * DEEP + b"N"),
    "places of the memo": lambda: ask(b"N" + b"".join(b"r" + struct.pack("<I", i * 40_000) for i in range(DEEP))),
    "keys that are tuples of tuples": lambda: ask(
        b"})q\x00h\x00" + b"".join(b"\x86q\x01h\x01" for _ in range(1000)) + b"0Ns"
    ),
    "values": lambda: ask(b"(" + b"]" * 5_000_000 + b"1N"),
    "opcodes": lambda: ask(b"N0" * 6_000_000 + b"N"),
}


def state_dicts_in_each_other() -> bytes:
    """Return dictionaries of tensors in each other, deeper than is looked."""
    return make_zip(PROTO + b"}" + (text("model") + b"}") * 2000 + b"s" * 2000 + STOP)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_read_or_refused_in_little_time_and_memory(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(BOMBS[kind]())
    before_kib, began_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with suppress(PickledError):
        read_pickled(pin_file(path), where="x.pt")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) * (
        1 if sys.platform == "darwin" else 1024
    )
    assert grown < 700 << 20
    assert time.monotonic() - began_s < 60
