"""The dtypes of safetensors and what torch calls them.

Names on the left are those of the safetensors header (``BF16``); recipes say ``bfloat16``.
"""

from collections.abc import Iterable

import torch

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
RECIPE_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def is_mergeable(dtype: str) -> bool:
    """Whether arithmetic on this dtype means something: the floating ones of a byte or more."""
    return dtype in TORCH_DTYPES and TORCH_DTYPES[dtype].is_floating_point


def item_bytes(dtype: str) -> int:
    """Return the size of one element in bytes."""
    return TORCH_DTYPES[dtype].itemsize


def promote(dtypes: Iterable[str]) -> str:
    """Return the narrowest dtype that holds all of `dtypes`, as torch promotes them.

    >>> promote(["BF16", "BF16"]), promote(["BF16", "F16"]), promote(["F8_E4M3", "F8_E5M2"])
    ('BF16', 'F32', 'BF16')
    """
    distinct = sorted(set(dtypes))
    if len(distinct) == 1:
        return distinct[0]
    widened = ["BF16" if name.startswith("F8") else name for name in distinct]
    result = TORCH_DTYPES[widened[0]]
    for name in widened[1:]:
        result = torch.promote_types(result, TORCH_DTYPES[name])
    return next(name for name, dtype in TORCH_DTYPES.items() if dtype == result)


def compute_dtype(dtypes: Iterable[str]) -> str:
    """Return the dtype to accumulate in: float64 where one of `dtypes` is, else float32."""
    return "F64" if "F64" in set(dtypes) else "F32"
