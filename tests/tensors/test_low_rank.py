"""Weights with an adapter's product: native loops give torch's bits for every span, form of weight and layout."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tensors.made import KINDS
from torch import Tensor

from mergemill.engine.storage.ranges import pin_file
from mergemill.engine.tensors import native
from mergemill.engine.tensors.expressions import Expression, Stored
from mergemill.engine.tensors.low_rank import Factor, LowRank
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.rounds import finish_rounds
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.stored import StoredSlab
from mergemill.engine.tensors.workspace import Workspace

pytestmark = pytest.mark.skipif(native.load() is None, reason="the native loops are not built here")
SHAPES = [(1, 37, 70, 5), (3, 6, 33, 16), (1, 2, 1500, 3), (2, 50, 3, 1), (1, 18, 8300, 16)]


def store(folder: Path, name: str, values: Tensor) -> Stored:
    path = folder / name
    path.write_bytes(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    kind = next(known for known, dtype in KINDS.items() if dtype == values.dtype)
    return Stored(pin_file(str(path)), 0, kind, tuple(values.shape))


def make(folder: Path, shape: tuple[int, int, int, int], kind: str, *, turned: bool) -> tuple[LowRank, Tensor]:
    """Return a weight with a product, and float64 of it."""
    matrices, rows, columns, rank = shape
    drawn = torch.Generator().manual_seed(rank)
    weight = torch.randn(matrices, rows, columns, generator=drawn).to(KINDS[kind])
    left, right = (torch.randn(matrices, n, rank, generator=drawn) for n in (rows, columns))
    right = right.to(torch.bfloat16)
    wanted = weight.double() + 0.5 * left.double() @ right.double().mT
    first, second = (left, right.mT) if turned else (left.mT, right)
    steps = [(1, rows), (rank, 1)] if not turned else [(rank, 1), (1, columns)]
    factors = [
        Factor(store(folder, name, values), *step, n * rank)
        for name, values, step, n in zip("lr", (first, second), steps, (rows, columns), strict=True)
    ]
    return LowRank(store(folder, "w", weight), *factors, rank, 0.5, rows, columns), wanted.view(-1)


def take(made: Expression, span: Span) -> Tensor:
    ready = finish_rounds(made.rounds(), (), lambda _: ())
    return ready.slab(span, Workspace(np.zeros(1 << 23, np.uint8)), "F32").clone()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_span_has_the_bits_of_torch_and_of_the_whole(
    shape: tuple[int, int, int, int], kind: str, turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, wanted = make(tmp_path, shape, kind, turned=turned)
    twice = LowRank(made, made.left, made.right, made.rank, -0.25, made.rows, made.columns)
    whole = take(made, Span(0, made.size))
    assert (whole - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    cuts = [0, *sorted(min(at, made.size) for at in (7, made.size // 3, made.size // 3 + 90)), made.size]
    spans = [Span(*ends) for ends in itertools.pairwise(cuts) if ends[0] < ends[1]]
    found = [torch.cat([take(each, span) for span in spans]) for each in (made, twice)]
    monkeypatch.setattr(native, "load", lambda: None)
    for each, bits in zip((made, twice), found, strict=True):
        assert torch.equal(take(each, Span(0, each.size)).view(torch.int32), bits.view(torch.int32))
    assert torch.equal(found[0].view(torch.int32), whole.view(torch.int32))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_is_that_of_the_whole(shape: tuple[int, int, int, int], tmp_path: Path) -> None:
    """Its elements are made alone; a pass that takes all at once goes on from there."""
    made, _ = make(tmp_path, shape, "BF16", turned=False)
    work, span = Workspace(np.zeros(1 << 23, np.uint8), keep=True), Span(0, made.size)
    data, dtype = finish_rounds(made.rounds(), (), lambda _: ()).lower(span, work)
    place = Place("x", made.shape, 7, (0,))
    slab = StoredSlab((data,), (dtype,), False, (False,), (), place, made.size, work)
    whole, run = take(made, span).abs().view(torch.int32).numpy().view(np.uint32), 64
    starts = range(5, made.size - run + 1, 130)
    for _ in range(2):
        assert np.array_equal(slab.sample(0, 5, 130, run), [whole[at : at + run] for at in starts])
        (largest,) = slab.find_extremes()
        assert np.float32(largest.most).view(np.uint32) == whole.max()
