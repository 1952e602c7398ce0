"""WIDEN: task vectors weighed by how much each of a matrix's columns changes in length and in direction.

Source: Yu et al., "Extend model merging from fine-tuned to pre-trained large language models via weight
disentanglement", arXiv:2408.03092, section 3; scores of vectors, the rows of embeddings and the strict comparison with
the mean as in the authors' code (MergeLLM).

For: models that lie far from their base, as after continued pretraining, beside fine-tunes.

Evidence: LLMs of 7 to 14B (the source).
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergemill.engine.methods.contract import merge_method
from mergemill.engine.methods.rows import multiply_rows, view_rows
from mergemill.engine.tensors.device import add_rows, divide_, put_beside, to_host
from mergemill.engine.tensors.elementary import exp_
from mergemill.engine.tensors.exact import ExactSum, Extremes, find_extremes, sum_absolute
from mergemill.engine.tensors.fusion import Fusion, Join
from mergemill.engine.tensors.kernels import Gather, Partial, StoredGather, add_partials
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.stored import StoredSlab

Array = npt.NDArray[np.float64]
_DIGIT, _DIGITS = 2.0**40, 3  # in which sums of columns are added up, of products less than 1
_BY_TOKEN = ("embed", "wte")  # in the name of a tensor whose rows are judged, one a token, instead of its columns


@dataclass(frozen=True, slots=True, eq=False)
class Significance:
    """What is known of the whole tensor."""

    weights: tuple[Array, ...]  # on each task vector, one a column or row; none for what is no matrix
    means: tuple[float, ...]  # of the magnitudes of each task vector, for what is no matrix


def _judge(place: Place, ratio: float, calibration: float) -> Generator[Gather, Any, Significance]:
    """Find the weight of each column, or the mean magnitude of what is no matrix."""
    if len(place.shape) != 2:
        sums = yield _Magnitudes()
        return Significance((), tuple(float(total) / place.size for total in sums))
    extremes = yield _LargestSizes()
    largest = sum(extremes, Extremes()).most
    if not 0 < largest < math.inf:
        return Significance((np.full(_count(place), math.nan if largest else 0.0),) * len(place.models), ())
    unit = 2.0 ** math.frexp(largest)[1]
    squares = yield (_RowSquares(unit) if _is_by_token(place) else _ColumnSquares(unit))
    return Significance(_weigh(_read_squares(squares), ratio, calibration), ())


def _fuse(statistics: Significance, place: Place) -> Fusion | None:
    if not statistics.weights:
        return None
    weights = np.stack(statistics.weights).astype(np.float32)
    return Fusion(Join("lines", (), lines=weights, columns=place.shape[1], by_row=_is_by_token(place)))


@merge_method(
    reads="sums",
    base="required",
    statistics=_judge,
    rounds=2,
    grain="row",
    extra_slabs=5,
    extra_slabs_each=1,
    extra_bytes=16 << 20,
    fused=_fuse,
)
def widen(
    base: Tensor,
    deltas: list[Tensor],
    statistics: Significance,
    place: Place,
    *,
    ratio: float = 1.0,
    calibration: float = 1.0,
) -> Tensor:
    """Return ``base + Σᵢ wᵢ · Dᵢ`` with a weight for each column of each model, the mean of two scores.

    Columns are ranked within a model, by the change of their norm, and by ``1 - cos`` to the base's column. Of ranks
    ``r/n`` a score is the softmax over the models, or `calibration` where a rank exceeds `ratio` times the mean rank.
    What is no matrix has such scores of its elements' magnitudes ``|Dᵢ|``. Of embeddings rows take the place of
    columns. Shapes: all ``[n]``, whole rows.
    """
    if len(place.shape) != 2:
        scores = _score_elements(deltas, statistics.means, ratio, calibration)
        for delta, score in zip(deltas, scores, strict=True):
            base.add_(delta.mul_(score))
        return base
    rows = slice(place.start // place.shape[1], (place.start + len(base)) // place.shape[1])
    for delta, weight in zip(deltas, statistics.weights, strict=True):
        here = weight[rows, None] if _is_by_token(place) else weight[None]
        view_rows(delta, place).mul_(put_beside(here, delta).to(delta.dtype))
        base.add_(delta)
    return base


def _is_by_token(place: Place) -> bool:
    return any(part in place.tensor for part in _BY_TOKEN)


def _count(place: Place) -> int:
    return place.shape[0 if _is_by_token(place) else 1]


def _score_elements(deltas: Sequence[Tensor], means: Sequence[float], ratio: float, calibration: float) -> list[Tensor]:
    """Return the scores of elements, in the dtype of the deltas."""
    sizes = [delta.abs().to(torch.float64) for delta in deltas]
    scores = _soften(sizes)
    marks = (size > ratio * mean for size, mean in zip(sizes, means, strict=True))
    return [
        score.masked_fill_(mark, calibration).to(delta.dtype)
        for score, mark, delta in zip(scores, marks, deltas, strict=True)
    ]


def _soften(values: Sequence[Tensor]) -> list[Tensor]:
    """Return the softmax over the flat float64 values, element by element."""
    most = values[0].clone()
    for value in values[1:]:
        torch.maximum(most, value, out=most)
    powers = [exp_(value - most) for value in values]
    total = torch.zeros_like(most)
    for power in powers:
        total.add_(power)
    return [power.div_(total) for power in powers]


def _weigh(squares: Array, ratio: float, calibration: float) -> tuple[Array, ...]:
    """Return each model's weights from the sums ``[1 + 2·models, columns]``: of W₀², and of W₀·D and D² of each."""
    before, crossed, changed = squares[0], squares[1::2], squares[2::2]
    norm = np.sqrt(before)
    after = np.sqrt(np.maximum(before + (2 * crossed + changed), 0.0))
    lengths = _divide(np.abs(2 * crossed + changed), norm + after)
    product, inner = norm * after, before + crossed
    # 1 - cos = (‖a‖²‖b‖² - ⟨a, b⟩²) / (‖a‖‖b‖(‖a‖‖b‖ + ⟨a, b⟩)), in which ⟨a, b⟩² cancels but for the changes.
    near = _divide(np.maximum(before * changed - crossed**2, 0.0), product * (product + inner))
    turns = np.where(inner > 0, near, 1 - _divide(inner, product))
    turns = np.where(product > 0, turns, np.where(norm == after, 0.0, 1.0))
    scores = [_score_ranks(_rank(found), ratio, calibration) for found in (lengths, turns)]
    return tuple(0.5 * (scores[0] + scores[1]))


def _divide(left: Array, right: Array) -> Array:
    return np.divide(left, right, out=np.zeros_like(left), where=right > 0)


def _rank(found: Array) -> Array:
    """Return each row's ranks, 0 for the smallest; of equal ones the first ranks lower."""
    ranks = np.empty_like(found)
    order = np.argsort(found, axis=1, kind="stable")
    np.put_along_axis(ranks, order, np.arange(found.shape[1]) + np.zeros_like(found), axis=1)
    return ranks


def _score_ranks(ranks: Array, ratio: float, calibration: float) -> Array:
    columns = ranks.shape[1]
    soft = np.stack([to_host(each) for each in _soften([torch.from_numpy(each / columns) for each in ranks])])
    return np.where(ranks > ratio * (columns - 1) / 2, calibration, soft)  # the mean of every row


class _LargestSizes(StoredGather):
    """Gathers the least and the largest magnitude of the base and of each task vector."""

    with_base = True
    whole = True  # they are few numbers

    def __call__(self, tensors: Sequence[Tensor], place: Place) -> tuple[Extremes, ...]:
        return tuple(find_extremes(tensor.abs_()) for tensor in tensors)

    def add_stored(self, slab: StoredSlab, total: Partial) -> Partial:
        """The same from stored bytes."""
        return add_partials(total, (slab.find_base_extremes(), *slab.find_extremes()))


class _Magnitudes:
    """Gathers the L1 norm of each task vector."""

    def __call__(self, deltas: Sequence[Tensor], place: Place) -> tuple[ExactSum, ...]:
        return tuple(sum_absolute(delta, place.block) for delta in deltas)


@dataclass(frozen=True)
class _ColumnSquares(StoredGather):
    """Gathers for each column the sums of W₀², and of W₀·D and D² of each task vector, over the unit's square.

    A block's rows are added one after the other, and blocks as integers, exactly.
    """

    with_base = True

    unit: float

    def __call__(self, tensors: Sequence[Tensor], place: Place) -> tuple[npt.NDArray[np.int64]]:
        total = np.zeros((2 * len(tensors) - 1, _DIGITS, place.shape[1]), np.int64)
        for start in range(0, len(tensors[0]), place.block):
            block = [_widen(x[start : start + place.block], self.unit, place) for x in tensors]
            total += _take_digits(np.stack([to_host(add_rows(product)) for product in _multiply(block)]))
        return (total,)

    def add_stored(self, slab: StoredSlab, total: Partial) -> Partial:
        """The same from stored bytes."""
        (digits,) = total or (np.zeros((2 * slab.count + 1, _DIGITS, slab.place.shape[1]), np.int64),)
        slab.sum_columns(self.unit, digits)
        return (digits,)


@dataclass(frozen=True)
class _RowSquares(StoredGather):
    """Gathers the same for each row; no row is in two slabs."""

    with_base = True

    unit: float

    def __call__(self, tensors: Sequence[Tensor], place: Place) -> tuple[Array]:
        rows, columns = place.shape
        wide = [_widen(x, self.unit, place) for x in tensors]
        found = np.zeros((2 * len(tensors) - 1, rows))
        here = slice(place.start // columns, (place.start + len(tensors[0])) // columns)
        ones = torch.ones_like(wide[0])
        for at, product in enumerate(_multiply(wide)):
            found[at, here] = to_host(multiply_rows(product, ones, product))
        return (found,)

    def add_stored(self, slab: StoredSlab, total: Partial) -> Partial:
        """The same from stored bytes."""
        rows, columns = slab.place.shape
        (sums,) = total or (np.zeros((2 * slab.count + 1, rows)),)
        slab.sum_rows(self.unit, columns, sums)
        return (sums,)


def _widen(slab: Tensor, unit: float, place: Place) -> Tensor:
    """Return rows in the unit, float64."""
    return divide_(view_rows(slab, place).to(torch.float64, copy=True), unit)


def _multiply(tensors: Sequence[Tensor]) -> list[Tensor]:
    base, *deltas = tensors
    return [base * base, *(product for delta in deltas for product in (base * delta, delta * delta))]


def _take_digits(sums: Array) -> npt.NDArray[np.int64]:
    """Return sums ``[k, columns]``, which are overwritten, as digits ``[k, 3, columns]``, 2**-40 of each other."""
    digits = np.empty((len(sums), _DIGITS, sums.shape[1]), np.int64)
    for at in range(_DIGITS):
        whole = np.floor(sums)
        digits[:, at] = whole
        sums -= whole
        sums *= _DIGIT
    return digits


def _read_squares(gathered: tuple[npt.NDArray[Any]]) -> Array:
    (found,) = gathered
    if found.ndim == 2:
        return np.asarray(found)
    return np.asarray(found[:, 0] + found[:, 1] / _DIGIT + found[:, 2] / _DIGIT**2)
