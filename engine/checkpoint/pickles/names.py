"""The names that a pickle of tensors may ask for, and what a call of one gives: the one table of it.

Three kinds of names are known, each as it is spelt in full and no other. What tensors are made of: as torch 2.13 writes
it, and all before it. Containers. And what trainers keep beside the weights, Lightning's and fairseq's options, NumPy's
numbers: these become leftovers of which only the name is known. Any other name is refused, used or not.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from mergemill.engine.checkpoint.layout import DTYPE_BITS
from mergemill.engine.checkpoint.pickles.leftovers import LEFTOVERS
from mergemill.engine.checkpoint.pickles.values import Left, PickledName, StorageRef, TensorRef, describe
from mergemill.engine.errors import PickledError

MOST_AXES = 64  # torch's own bound
MOST_NAME = 120  # characters of a name in a message

_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16",
    "Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64",
}  # fmt: skip
_DTYPES = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16", "half": "F16",
    "bfloat16": "BF16", "int64": "I64", "long": "I64", "int32": "I32", "int": "I32", "int16": "I16", "short": "I16",
    "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_UNTYPED = ("torch.storage.UntypedStorage", "torch.storage._UntypedStorage", "torch.UntypedStorage")
_NO_DATA = {
    "torch._utils._rebuild_qtensor": "a tensor that is quantized by torch",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no values",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor that is stored as NumPy stores it",
    "torch._utils._rebuild_xla_tensor": "a tensor that is stored as NumPy stores it",
    "torch.ComplexDoubleStorage": "complex numbers of 128 bits",
    "torch.complex128": "complex numbers of 128 bits",
}
_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")


class Names:
    """What names mean in the pickle of a file; see `Rules`."""

    def __init__(self, load: Callable[[StorageRef], StorageRef], *, where: str) -> None:
        self._load = load  # checks that a storage is there, and as large as is said
        self._where = where
        self._found: dict[str, PickledName] = {}
        self._storages: dict[tuple[str, str | None, int], StorageRef] = {}

    def find(self, module: str, name: str) -> PickledName:
        """Return what stands for a name, which is looked up as it is spelt; `PickledError` for an unknown one."""
        full = f"{module}.{name}"
        if full in _NO_DATA:
            raise self.refuse(f"holds {_NO_DATA[full]}")
        if full not in _KNOWN:
            raise PickledError(
                f"{self._where}: its pickle asks for {show(full)}, which is no part of a tensor; nothing of it was "
                f"run. If it is from somebody you trust, save its state_dict as safetensors"
            )
        return self._found.setdefault(full, PickledName(full))

    def call(self, named: PickledName, arguments: tuple[Any, ...]) -> Any:
        """Return what a call of a name gives."""
        if named.name in LEFTOVERS:
            return Left(named.name)
        rebuild = _CALLS.get(named.name)
        if rebuild is None:
            raise self.refuse(f"calls {named.name}, which is nothing to be called")
        return rebuild(self, arguments)

    def load(self, asked: Any) -> StorageRef:
        """Return the storage that a persistent id names: ``("storage", type, key, device, elements)``."""
        if not isinstance(asked, tuple) or len(asked) not in (5, 6) or asked[0] != "storage":
            raise self.refuse("has a persistent id that is no storage")
        kind, key, count = asked[1], asked[2], asked[4]
        if not isinstance(kind, PickledName) or not isinstance(key, str) or not _is_count(count):
            raise self.refuse("has a persistent id of a storage with odd parts")
        if len(asked) == 6 and asked[5] is not None:
            raise self.refuse("has a storage that is a view of another, as torch wrote them before 0.4")
        if kind.name not in _STORAGE_DTYPES:
            raise self.refuse(f"has a storage of type {kind.name}")
        dtype = _STORAGE_DTYPES[kind.name]
        place = key, dtype, count
        if place not in self._storages:
            nbytes = count * DTYPE_BITS[dtype or "U8"] // 8
            self._storages[place] = self._load(StorageRef(key, dtype, nbytes))
        return self._storages[place]

    def refuse(self, why: str) -> PickledError:
        """Return the error for what its pickle does."""
        return PickledError(f"{self._where}: its pickle {why}")

    def check_tensor(self, tensor: TensorRef) -> TensorRef:
        """Return a tensor that lies in its storage; `PickledError` for one that does not."""
        size = DTYPE_BITS[tensor.dtype] // 8
        last = tensor.offset + sum((count - 1) * step for count, step in zip(tensor.shape, tensor.strides, strict=True))
        end = tensor.offset if 0 in tensor.shape else last + 1
        if end * size > tensor.storage.nbytes:
            raise self.refuse(
                f"has a tensor of shape {list(tensor.shape)} that ends at byte {end * size} of storage "
                f"{tensor.storage.key!r}, which has {tensor.storage.nbytes}"
            )
        return tensor


def _make_dict(names: Names, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """Of Python 3 an empty one; of Python 2 from a list of pairs."""
    if not arguments:
        return {}
    if len(arguments) > 1 or not isinstance(arguments[0], list):
        raise names.refuse("calls collections.OrderedDict with odd arguments")
    pairs = arguments[0]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise names.refuse("calls collections.OrderedDict with odd arguments")
    return {key: value for key, value in pairs if isinstance(key, str | int)}


def _make_size(names: Names, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(arguments) == 1 and isinstance(arguments[0], tuple | list):
        return tuple(arguments[0])
    raise names.refuse("calls torch.Size with odd arguments")


def _rebuild_tensor(names: Names, arguments: tuple[Any, ...]) -> TensorRef:
    """``(storage, offset, size, stride)``, and in later versions ``requires_grad, hooks, metadata``."""
    _check_arguments(names, "torch._utils._rebuild_tensor", arguments, 4, 7)
    storage = arguments[0]
    if not isinstance(storage, StorageRef):
        raise names.refuse(f"makes a tensor of {describe(storage)}, no storage")
    _check_view(names, arguments[6:])
    return _place(names, storage, storage.dtype or "U8", arguments[1:4])


def _rebuild_typed(names: Names, arguments: tuple[Any, ...]) -> TensorRef:
    """``(storage, offset, size, stride, requires_grad, hooks, dtype, metadata)``, of a storage without a type."""
    _check_arguments(names, "torch._utils._rebuild_tensor_v3", arguments, 7, 8)
    storage, dtype = arguments[0], arguments[6]
    if not isinstance(storage, StorageRef):
        raise names.refuse(f"makes a tensor of {describe(storage)}, no storage")
    if not isinstance(dtype, PickledName) or dtype.name not in _TENSOR_DTYPES:
        raise names.refuse(f"makes a tensor of dtype {describe(dtype)}")
    _check_view(names, arguments[7:])
    return _place(names, storage, _TENSOR_DTYPES[dtype.name], arguments[1:4])


def _rebuild_parameter(names: Names, arguments: tuple[Any, ...]) -> TensorRef:
    """``(tensor, requires_grad, hooks)``, and a state."""
    _check_arguments(names, "torch._utils._rebuild_parameter", arguments, 1, 4)
    if not isinstance(arguments[0], TensorRef):
        raise names.refuse(f"makes a parameter of {describe(arguments[0])}, no tensor")
    return arguments[0]


def _rebuild_from_type(names: Names, arguments: tuple[Any, ...]) -> Any:
    """``(function, type, arguments, state)``, of a tensor that has attributes of its own."""
    _check_arguments(names, "torch._tensor._rebuild_from_type_v2", arguments, 3, 4)
    function, kind, inner = arguments[:3]
    if not isinstance(function, PickledName) or function.name not in _REBUILT or not isinstance(inner, tuple):
        raise names.refuse(f"makes a tensor by {describe(function)}")
    if not isinstance(kind, PickledName) or kind.name not in _TYPES:
        raise names.refuse(f"makes a tensor of type {describe(kind)}")
    return names.call(function, inner)


def _place(names: Names, storage: StorageRef, dtype: str, place: tuple[Any, ...]) -> TensorRef:
    offset, shape, strides = place
    counts = (shape, strides)
    if not _is_count(offset) or not all(isinstance(each, tuple) and all(map(_is_count, each)) for each in counts):
        raise names.refuse("makes a tensor with an odd offset, shape or stride")
    if len(shape) != len(strides) or len(shape) > MOST_AXES:
        raise names.refuse(f"makes a tensor of {len(shape)} axes with {len(strides)} strides")
    if math.prod(shape) >= 2**63:
        raise names.refuse(f"makes a tensor of {math.prod(shape)} elements")
    return names.check_tensor(TensorRef(storage, dtype, offset, shape, strides))


def _check_arguments(names: Names, name: str, arguments: tuple[Any, ...], least: int, most: int) -> None:
    if not least <= len(arguments) <= most:
        raise names.refuse(f"calls {name} with {len(arguments)} arguments")


def _check_view(names: Names, metadata: tuple[Any, ...]) -> None:
    """Refuse a view whose values are other than those stored: conjugated, or negative."""
    for found in metadata:
        if isinstance(found, dict) and any(found.values()):
            raise names.refuse(f"has a tensor that is stored as a view: {', '.join(map(show, found))}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def show(text: object) -> str:
    """Return a text of a file as a message may have it.

    >>> show("os.system"), show("a" * 200)[-5:]
    ('os.system', 'aaaa…')
    """
    plain = str(text).encode("ascii", "backslashreplace").decode()
    plain = "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in plain)
    return plain if len(plain) <= MOST_NAME else f"{plain[:MOST_NAME]}…"


_STORAGE_DTYPES: Mapping[str, str | None] = {
    f"{module}.{name}Storage": dtype for module in ("torch", "torch.cuda") for name, dtype in _STORAGES.items()
} | dict.fromkeys(_UNTYPED)
_TENSOR_DTYPES = {f"torch.{name}": dtype for name, dtype in _DTYPES.items()}
_REBUILT: Mapping[str, Callable[[Names, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
_CALLS: Mapping[str, Callable[[Names, tuple[Any, ...]], Any]] = {
    **_REBUILT,
    "collections.OrderedDict": _make_dict,
    "torch.Size": _make_size,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
}
_KNOWN = frozenset([*_CALLS, *_TENSOR_DTYPES, *_STORAGE_DTYPES, *_TYPES, *LEFTOVERS])
