"""The dtypes of safetensors and what torch calls them.

Names on the left are those of the safetensors header (``BF16``); recipes say ``bfloat16``.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from mergemill.engine.tensors.lazy import Dtype, torch


class _Kind(NamedTuple):
    torch_name: str
    item_bytes: int
    floating: bool = False


_KINDS = {
    "F64": _Kind("float64", 8, floating=True),
    "F32": _Kind("float32", 4, floating=True),
    "F16": _Kind("float16", 2, floating=True),
    "BF16": _Kind("bfloat16", 2, floating=True),
    "F8_E4M3": _Kind("float8_e4m3fn", 1, floating=True),
    "F8_E5M2": _Kind("float8_e5m2", 1, floating=True),
    "F8_E8M0": _Kind("float8_e8m0fnu", 1),  # exponents, which scale values and are none
    "I64": _Kind("int64", 8),
    "I32": _Kind("int32", 4),
    "I16": _Kind("int16", 2),
    "I8": _Kind("int8", 1),
    "U64": _Kind("uint64", 8),
    "U32": _Kind("uint32", 4),
    "U16": _Kind("uint16", 2),
    "U8": _Kind("uint8", 1),
    "BOOL": _Kind("bool", 1),
}
_BY_TORCH_NAME = {f"torch.{kind.torch_name}": name for name, kind in _KINDS.items()}
RECIPE_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class _TorchDtypes(Mapping[str, Dtype]):
    """torch's dtypes by name; to look whether there is one does not import torch."""

    def __getitem__(self, name: str) -> Dtype:
        found: Dtype = getattr(torch, _KINDS[name].torch_name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in _KINDS

    def __iter__(self) -> Iterator[str]:
        return iter(_KINDS)

    def __len__(self) -> int:
        return len(_KINDS)


class _Names(Mapping[Dtype, str]):
    """The names of torch's dtypes."""

    def __getitem__(self, dtype: Dtype) -> str:
        return _BY_TORCH_NAME[str(dtype)]

    def __iter__(self) -> Iterator[Dtype]:
        return iter(TORCH_DTYPES.values())

    def __len__(self) -> int:
        return len(_KINDS)


TORCH_DTYPES: Mapping[str, Dtype] = _TorchDtypes()
NAMES: Mapping[Dtype, str] = _Names()


def is_mergeable(dtype: str) -> bool:
    """Whether arithmetic on this dtype means something: the floating ones of a byte or more."""
    return dtype in _KINDS and _KINDS[dtype].floating


def item_bytes(dtype: str) -> int:
    """Return the size of one element in bytes."""
    return _KINDS[dtype].item_bytes


def promote(dtypes: Iterable[str]) -> str:
    """Return the narrowest dtype that holds all of `dtypes`, which are one or mergeable, as torch promotes them.

    >>> promote(["BF16", "BF16"]), promote(["BF16", "F16"]), promote(["F8_E4M3", "F8_E5M2"])
    ('BF16', 'F32', 'BF16')
    """
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    widened = {"BF16" if name.startswith("F8") else name for name in distinct}
    if not widened <= set(RECIPE_DTYPES.values()):
        raise ValueError(f"{', '.join(sorted(distinct))}: only floating dtypes are promoted")
    if widened == {"BF16", "F16"}:
        return "F32"
    return next(name for name in RECIPE_DTYPES.values() if name in widened)


def compute_dtype(dtypes: Iterable[str]) -> str:
    """Return the dtype to accumulate in: float64 where one of `dtypes` is, else float32."""
    return "F64" if "F64" in set(dtypes) else "F32"
