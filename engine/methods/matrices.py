"""What the methods on whole matrices share: singular values in float64 on one thread, and what is no matrix.

For float32 the singular vectors come from the eigenvectors of the Gram matrix of the smaller side, in float64: half
the time of LAPACK's own SVD in float64 or less, and far more exact than that in float32. The Gram matrix squares the
condition, which float64 has room for as long as singular values under ``max(m, n) · eps`` of the largest count as
zero (eps of float32); float64 itself has no such room and goes through LAPACK's SVD.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from mergemill.engine.errors import MergeError
from mergemill.engine.methods.contract import Grain
from mergemill.engine.methods.task_vectors import add_deltas
from mergemill.engine.tensors.lazy import Dtype, Tensor, torch
from mergemill.engine.tensors.place import Place

# Of a square matrix LAPACK's SVD takes a copy, both vectors and four more for its work; rounded up.
SVD_SLABS = 8


class Triples(NamedTuple):
    """Singular values, the largest first, and their vectors: ``left · diag(values) · rightᵀ``, all float64."""

    left: Tensor  # [m, r], orthonormal columns
    values: Tensor  # [r]
    right: Tensor  # [n, r], orthonormal columns


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` is a matrix of any elements."""
    return len(shape) == 2 and math.prod(shape) > 0


def whole_matrices(shape: tuple[int, ...]) -> Grain:
    """The grain of a method that needs matrices whole and takes anything else in blocks."""
    return "tensor" if is_matrix(shape) else "block"


def add_matrix(
    base: Tensor,
    deltas: list[Tensor],
    place: Place,
    join: Callable[[list[Tensor]], Tensor],
    *,
    lambda_: float,
    normalize: bool = False,
) -> Tensor:
    """Return ``base + lambda · join(deltas)``; task arithmetic with weights of 1 where the tensor is no matrix.

    `join` is given matrices ``[m, n]`` and returns one, float64. Of what is not finite there is no decomposition: the
    whole result is NaN then. With `normalize` task arithmetic takes the mean instead of the sum. Shapes: `base` and
    `deltas` flat ``[n]``, overwritten.
    """
    if not is_matrix(place.shape):
        return add_deltas(base, deltas, (1.0,) * len(deltas), lambda_=lambda_, normalize=normalize)
    if not are_finite(deltas):
        return base.fill_(math.nan)
    with on_one_thread(place):
        joined = join([delta.view(place.shape) for delta in deltas]).mul_(lambda_)
        return base.view(place.shape).add_(joined).view(-1)


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every element of every tensor is finite."""
    return all(math.isfinite(end) for tensor in tensors for end in torch.stack(torch.aminmax(tensor)).cpu().tolist())


@contextmanager
def on_one_thread(place: Place) -> Iterator[None]:
    """Keep LAPACK from splitting sums among threads; where it does not converge, `MergeError` names the tensor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise MergeError(f"{place.tensor}: its decomposition does not converge: {error}") from error
    finally:
        torch.set_num_threads(threads)


def decompose(matrix: Tensor, stored: Dtype, most: int | None = None, *, unit: float = 0.0) -> Triples:
    """Return the `most` largest singular triples of a matrix (all by default) that is exact to `stored`'s rounding.

    Left out are singular values of at most ``max(m, n) · eps`` of the largest, or of `unit` where that is larger (the
    norm of what the matrix is a difference of), with the eps of `stored`: rounding decides their vectors. So there may
    be fewer triples than asked for, of a matrix of zeros none.
    """
    most = min(matrix.shape) if most is None else most
    triples = _decompose_directly(matrix) if stored == torch.float64 else _decompose_gram(matrix, most)
    least = max(matrix.shape) * torch.finfo(stored).eps * triples.values[:1].clamp(min=unit)
    clear = min(most, int((triples.values > least).sum()))
    return Triples(triples.left[:, :clear], triples.values[:clear], triples.right[:, :clear])


def _decompose_directly(matrix: Tensor) -> Triples:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return Triples(left, values, right.T)


def _decompose_gram(matrix: Tensor, most: int) -> Triples:
    """Return the `most` largest singular triples, those of a value of zero without a meaning."""
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = _decompose_gram(matrix.T, most)
        return Triples(right, values, left)
    right = torch.linalg.eigh(_gram(matrix))[1][:, -most:].flip(1)
    left = matrix.to(torch.float64) @ right
    values = left.square().sum(0).sqrt_()
    return Triples(left.div_(values), values, right)


def _gram(matrix: Tensor) -> Tensor:
    wide = matrix.to(torch.float64)
    return wide.T @ wide


def join_triples(found: Iterable[Triples], like: Tensor, most: int) -> Triples:
    """Return at most `most` triples in all, one decomposition's beside the other's. Float64, beside a matrix `like`."""
    m, n = like.shape
    left, values, right = (like.new_empty((*rows, most), dtype=torch.float64) for rows in ((m,), (), (n,)))
    columns = 0
    for triples in found:
        at = slice(columns, columns + len(triples.values))
        left[:, at], values[at], right[:, at] = triples
        columns = at.stop
    return Triples(left[:, :columns], values[:columns], right[:, :columns])


def make_orthonormal(joined: Tensor, stored: Dtype) -> Tensor:
    """Return the nearest matrix of orthonormal columns; its columns are as dependent as the given ones."""
    if not joined.numel():
        return torch.zeros_like(joined)
    left, _, right = decompose(joined, stored)
    return left @ right.T


def find_norm(matrix: Tensor) -> float:
    """Return the Frobenius norm, without a square that overflows or vanishes."""
    largest = float(max(map(abs, torch.stack(torch.aminmax(matrix)).cpu().tolist())))
    if not largest:
        return 0.0
    scaled = matrix.to(torch.float64, copy=True).div_(largest)
    return largest * math.sqrt(float(scaled.square_().sum()))
