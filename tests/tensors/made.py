"""Slabs as they are stored, for tests of the loops over them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.stored import StoredSlab
from mergemill.engine.tensors.workspace import Workspace

KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    """NaN equals NaN, whatever its payload: torch's own hangs on the width of its registers."""
    assert left.dtype == right.dtype
    assert torch.equal(left.isnan(), right.isnan())
    same = left.contiguous().view(-1).view(torch.uint8) == right.contiguous().view(-1).view(torch.uint8)
    assert bool((same.view(left.numel(), -1).all(1) | left.isnan().view(-1)).all())


def make_slab(
    inputs: Sequence[Tensor], shape: tuple[int, ...], *, has_base: bool = False, block: int = 1 << 16
) -> StoredSlab:
    names = {kind: name for name, kind in KINDS.items()}
    place = Place("x", shape, 7, (0, 1, 2), block=block)
    return StoredSlab(
        arrays=tuple(x.contiguous().view(-1).view(torch.uint8).numpy() for x in inputs),
        dtypes=tuple(names[x.dtype] for x in inputs),
        has_base=has_base,
        vectors=(False,) * (len(inputs) - has_base),
        scales=(),
        place=place,
        size=inputs[0].numel(),
        work=Workspace(np.full(1 << 24, 0xFF, np.uint8), keep=True),
    )
