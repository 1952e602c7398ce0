"""What is gathered of two tensors is the same by native loops, by NumPy and for any slabs; ranks are near the true."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tensors.made import KINDS

from mergemill.engine.tensors import native
from mergemill.engine.tensors.comparing import Gathered, SlabAsked, compare_slabs, compare_stored, read_total
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.sketch import find_effective_rank, make_signs
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace

WORK = Workspace(np.empty(0, np.uint8))


def gather(tensors: Sequence[torch.Tensor], block: int, columns: int, step: int, *, stored: bool) -> Gathered:
    """Return what slabs of so many elements give, one after the other."""
    total: Partial = ()
    names = {kind: name for name, kind in KINDS.items()}
    size = tensors[0].numel()
    for start in range(0, size, step):
        asked = SlabAsked(
            Span(start, min(start + step, size)), block, columns, by_row=step >= size, sketched=columns > 0
        )
        slabs = [each.flatten()[start : start + step] for each in tensors]
        pairs = ((0, 1), (0, 2), (1, 2))[: 1 if len(slabs) == 2 else 3]
        alike = [slabs[i].dtype == slabs[k].dtype for i, k in pairs]
        unlike = [
            int((_as_bytes(slabs[i]) != _as_bytes(slabs[k])).any(1).sum()) if known else len(slabs[i])
            for (i, k), known in zip(pairs, alike, strict=True)
        ]
        if stored:
            given = [(each.contiguous().view(torch.uint8).numpy(), names[each.dtype]) for each in slabs]
            others = [0 if known else each.numel() for known, each in zip(alike, slabs, strict=False)]
            total = compare_stored(given, asked, alike, others, WORK, total)
        else:
            total = compare_slabs([each.float() for each in slabs], asked, unlike, total)
    return read_total(total, based=len(tensors) == 3, is_number=True)


def _as_bytes(slab: torch.Tensor) -> torch.Tensor:
    return slab.contiguous().view(torch.uint8).view(len(slab), -1)


def assert_same(one: Gathered, other: Gathered) -> None:
    """All to the bit, but sums of rows and sketches."""
    np.testing.assert_array_equal(one.squares, other.squares)
    assert (one.agreeing, one.signed, one.apart) == (other.agreeing, other.signed, other.apart)
    for left, right in zip(one.sides, other.sides, strict=True):
        for name in ("squares", "own", "zeros", "unlike", "largest", "histogram"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
        np.testing.assert_allclose(left.fourths, right.fourths, rtol=1e-5)
        np.testing.assert_allclose(left.sketch, right.sketch, rtol=1e-4, atol=1e-4)
        if left.rows.shape == right.rows.shape:
            np.testing.assert_allclose(left.rows, right.rows, rtol=1e-12)


@pytest.mark.skipif(native.load() is None, reason="the native loops are not built here")
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize(("rows", "columns", "block"), [(300, 500, 65500), (3, 70_000, 70_000), (4099, 1, 4099)])
def test_native_loops_count_and_add_as_numpy_does(rows: int, columns: int, block: int, *, based: bool) -> None:
    stream = torch.Generator().manual_seed(rows)
    base = torch.randn(rows * columns, generator=stream)
    first = base + 0.1 * torch.randn(len(base), generator=stream) * (torch.rand(len(base), generator=stream) > 0.3)
    second = torch.where(torch.rand(len(base), generator=stream) > 0.5, base, -base)
    for kinds in (("BF16", "BF16", "F32"), ("F16", "F16", "F16"), ("F32", "BF16", "BF16")):
        tensors = [each.to(KINDS[kind]) for each, kind in zip((first, second, base), kinds, strict=True)]
        given, asked = tensors if based else tensors[:2], columns if columns > 1 else 0
        there = gather(given, block, asked, len(base), stored=True)
        assert_same(there, gather(given, block, asked, len(base), stored=False))
        assert_same(there, gather(given, block, asked, block, stored=True))


@pytest.mark.skipif(native.load() is None, reason="the native loops are not built here")
def test_native_loops_take_what_is_not_finite_as_numpy_does() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(2))
    values[::7], values[3::50], values[5::90], values[11::130], values[13::60] = 0, -0.0, torch.inf, torch.nan, 1e-40
    for kind in KINDS.values():
        tensors = [values.to(kind), values.flip(0).to(kind)]
        assert_same(gather(tensors, 2000, 0, 2000, stored=True), gather(tensors, 2000, 0, 2000, stored=False))


def make_huge() -> list[torch.Tensor]:
    """Differences of which float32 has no number, of finite numbers; and one of which there is none at all."""
    values = torch.randn(64 * 50, generator=torch.Generator().manual_seed(4))
    values[5::40] = 3e38
    return [values, torch.where(values > 1e38, -values, values * 1.5), values.roll(3)]


@pytest.mark.skipif(native.load() is None, reason="the native loops are not built here")
def test_native_loops_take_differences_beyond_float32_as_numpy_does() -> None:
    for kind in (torch.bfloat16, torch.float32):
        for tensors in ([each.to(kind) for each in make_huge()], [each.to(kind) for each in make_huge()[:2]]):
            one, other = (gather(tensors, 3200, 50, 3200, stored=stored) for stored in (True, False))
            for left, right in zip(one.sides, other.sides, strict=True):
                left.sketch[:] = right.sketch[:] = 0
            assert_same(one, other)


@pytest.mark.parametrize("stored", [False, *([True] if native.load() is not None else [])])
def test_differences_beyond_float32_are_those_of_float64(*, stored: bool) -> None:
    first, second, _ = make_huge()
    (side,) = gather([first, second], 3200, 50, 3200, stored=stored).sides
    delta = second.double() - first.double()
    assert side.squares == pytest.approx(float((delta**2).sum()), rel=1e-12)
    assert side.largest == float(delta.abs().max()) > 5.9e38
    assert side.rows[0].sum() == pytest.approx(float((delta**2).sum()), rel=1e-12)
    assert side.fourths == pytest.approx(float(((delta**2).view(64, 50).sum(1) ** 2).sum()), rel=1e-5)
    assert side.histogram[-1] == (first[::8] > 1e38).sum()
    assert side.histogram.sum() == 400


@pytest.mark.parametrize(
    ("spectrum", "most_wrong"),
    [(np.ones(256), 0.15), (np.ones(16), 0.2), (1 / np.arange(1, 257), 0.6), (np.ones(1), 1e-6)],
)
def test_the_effective_rank_is_near_the_true_one(spectrum: np.ndarray, most_wrong: float) -> None:
    """Some three times the standard errors that sketch.py states."""
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.standard_normal((size, len(spectrum))))[0] for size in (640, 320))
    matrix = (left * spectrum) @ right.T
    squares, true = (matrix**2).sum(axis=1), (spectrum**2).sum() ** 2 / (spectrum**4).sum()
    found = find_effective_rank(make_signs(64, 640) @ matrix, squares.sum(), (squares**2).sum())
    assert found == pytest.approx(true, rel=most_wrong)
    few = find_effective_rank(make_signs(96, 32) @ matrix[:32], squares[:32].sum(), (squares[:32] ** 2).sum())
    values = np.linalg.svd(matrix[:32], compute_uv=False) ** 2
    assert few == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-6)


@pytest.mark.parametrize("unit", [1e-42, 1e38])
def test_the_effective_rank_is_known_at_both_ends_of_float32(unit: float) -> None:
    matrix = np.full((4, 4), unit)
    squares = (matrix**2).sum(axis=1)
    assert find_effective_rank(make_signs(0, 4) @ matrix, squares.sum(), (squares**2).sum()) == pytest.approx(1)
