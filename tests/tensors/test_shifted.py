"""A number that is added to a tensor is added in float32 and rounded once, whatever the spans."""

import numpy as np
import pytest
import torch

from mergemill.engine.tensors.constant import Constant
from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.shifted import Offset
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace, aligned


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_every_span_is_the_sum_rounded_once(dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    made = Offset(Constant(tuple(values.tolist())), -1.0)
    expected = torch.from_numpy(values - np.float32(1)).to(TORCH_DTYPES[dtype])
    for span in (Span(0, 100), Span(7, 8), Span(40, 100)):
        with Workspace(np.zeros(aligned(made.slab_bytes(span.size, dtype)), np.uint8)) as work:
            found = made.get_ready((made.inner,)).slab(span, work, dtype)  # type: ignore[arg-type]
            assert torch.equal(found, expected[span.start : span.stop])
