"""The bytes of a quantised tensor do not show how it was cut, and take no more memory than it says."""

import numpy as np
import pytest
import torch

from mergemill.engine.tensors.codes_made import CODINGS
from mergemill.engine.tensors.expressions import Held
from mergemill.engine.tensors.quantizing import Quantized
from mergemill.engine.tensors.slabs import SLAB, Span, iter_slabs
from mergemill.engine.tensors.workspace import Workspace, aligned


def write(expression: Quantized, spans: list[Span], *, anew: bool) -> bytes:
    """Return the bytes of spans, one after the other; anew: each is a piece of its own, which knows of no other."""
    ready = expression.get_ready((expression.inner,))  # type: ignore[arg-type]
    made = b""
    for span in spans:
        ready = expression.get_ready((expression.inner,)) if anew else ready  # type: ignore[arg-type]
        arena = np.zeros(aligned(expression.step_bytes(span.size, "U8")), np.uint8)
        with Workspace(arena) as work:
            made += ready.encode(span, work, "U8").tobytes()
    return made


@pytest.mark.parametrize("coding", ["fp8_block", "mxfp4", "q8_0"])
@pytest.mark.parametrize("shape", [(384, 256), (3, 200, 96), (64,)])
def test_any_cut_gives_the_same_bytes(coding: str, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expression = Quantized(Held(tensor), coding, filled_bytes=5)
    whole = Span(0, expression.size)
    expected = b"".join(part.numpy().tobytes() for part in make_by_matrix(coding, tensor)) + bytes(5)
    assert write(expression, [whole], anew=False) == expected
    for slab in (1, SLAB):
        spans = list(iter_slabs(whole, slab, expression.block))
        assert write(expression, spans, anew=False) == expected
        assert write(expression, spans, anew=True) == expected
    assert len(list(iter_slabs(whole, 1, expression.block))) > 1


def make_by_matrix(coding: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    matrices = tensor.view(-1, *tensor.shape[-2:]) if tensor.dim() > 1 else tensor[None, None]
    made = [CODINGS[coding].make(each.clone()) for each in matrices]
    return [codes for codes, _ in made] + [scales for _, scales in made]


def test_a_block_is_whole_rows_of_blocks() -> None:
    expression = Quantized(Held(torch.zeros(512, 96)), "fp8_block")
    assert expression.block == 128 * 96
    assert expression.shape == (512 * 96 + 4 * 4,)
    assert Quantized(Held(torch.zeros(2, 200, 96)), "fp8_block").block == 200 * 96
