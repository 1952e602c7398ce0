"""Oracles of the methods that rank elements: breadcrumbs, sce, della, arcee_fusion, pcb."""

from collections.abc import Sequence
from math import floor
from typing import Any

import numpy as np
import numpy.typing as npt

from oracles import Array, Bools, join_deltas, sparsify


def find_inner(delta: Array, density: float, gamma: float) -> Bools:
    """Return where breadcrumbs keeps a delta; of equal magnitudes the first by index counts as the larger."""
    if density >= 1:
        return np.ones(delta.shape, bool)
    kept, outliers = floor(density * delta.size), floor(gamma * delta.size)
    dropped_small = max(0, delta.size - kept - outliers)
    ascending = np.argsort(-np.abs(delta).ravel(), kind="stable")[::-1]
    mask = np.zeros(delta.size, bool)
    mask[ascending[dropped_small : dropped_small + kept]] = True
    return mask.reshape(delta.shape)


def breadcrumbs(
    base: Array,
    deltas: Sequence[Array],
    *,
    consensus: bool,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Array:
    """Keep each delta's elements between the smallest and the outliers, and add them to the base."""
    masks = [find_inner(delta, d, g) for delta, d, g in zip(deltas, density, gamma, strict=True)]
    trimmed = sparsify(deltas, masks, rescale=rescale)
    return base + lambda_ * join_deltas(trimmed, weight=weight, consensus=consensus, normalize=normalize)


def sce(base: Array, deltas: Sequence[Array], *, kind: np.dtype[Any], select_topk: float = 1.0) -> Array:
    """Keep where the models differ most, weigh them by their squares, and average those of the elected sign.

    kind: elements are ranked by the spread as rounded to it.
    """
    kept = find_spread_most(deltas, select_topk, kind)
    masked = [np.where(kept, delta, 0.0) for delta in deltas]
    squares = [float(np.mean(np.square(delta))) for delta in masked]
    whole = sum(squares)
    shares = [1 / len(squares) if whole < 1e-6 else square / whole for square in squares]
    elected = np.where(np.sum(masked, axis=0) >= 0, 1.0, -1.0)
    agree = [(np.sign(delta) == elected) * share for delta, share in zip(masked, shares, strict=True)]
    total = np.sum([delta * share for delta, share in zip(masked, agree, strict=True)], axis=0)
    return np.asarray(base + total / np.maximum(np.sum(agree, axis=0), 1e-6))


def find_spread_most(deltas: Sequence[Array], select_topk: float, kind: np.dtype[Any]) -> Bools:
    """Return where the ⌊select_topk · #{v≠0}⌋ largest variances over the models are; the first by index of equals."""
    if select_topk >= 1:
        return np.ones(deltas[0].shape, bool)
    spread = np.std(np.array(deltas), axis=0).astype(kind)
    count = floor(select_topk * np.count_nonzero(spread))
    kept = np.zeros(spread.size, bool)
    kept[np.argsort(-spread.ravel(), kind="stable")[:count]] = True
    return kept.reshape(spread.shape)


def find_probabilities(delta: Array, density: float, epsilon: float) -> Array:
    """Return with which probability della keeps each element, by its rank in its row."""
    if not 0 < density < 1:
        return np.full(delta.shape, float(density >= 1))
    rows = np.abs(delta.reshape(-1, delta.shape[-1] if delta.ndim else 1))
    columns = rows.shape[1]
    if columns == 1:
        return np.full(delta.shape, density)
    ranks = np.empty(rows.shape)
    for row, order in zip(ranks, np.argsort(rows, axis=1, kind="stable"), strict=True):
        row[order] = np.arange(1, columns + 1)
    return np.asarray(density - epsilon + 2 * epsilon * (ranks - 1) / (columns - 1)).reshape(delta.shape)


def arcee_fusion(base: Array, delta: Array, other: Array, *, kind: np.dtype[Any]) -> Array:
    """Add the delta where its importance is at least the median and one and a half times the middle half's range.

    kind: the dtype in which the importance is ranked.
    """
    importance = (np.abs(delta).astype(kind) * find_divergence(base, other).astype(kind)).ravel()
    ranked = np.sort(importance)
    lower, median, upper = (float(ranked[floor(q * (ranked.size - 1))]) for q in (0.25, 0.5, 0.75))
    kept = importance >= kind.type(median + 1.5 * (upper - lower))
    return np.asarray(base + np.where(kept.reshape(base.shape), delta, 0.0))


def find_divergence(base: Array, other: Array) -> Array:
    """Return KL(softmax(other) ‖ softmax(base)) over the last axis, as an axis of one."""
    p, q = (soften(np.atleast_1d(x)) + 1e-8 for x in (other, base))
    divergence = np.maximum(np.sum(p * np.log(p / q), axis=-1, keepdims=True), 0.0)
    return divergence if base.ndim else divergence.reshape(())


def soften(rows: Array) -> Array:
    """Return the softmax over the last axis."""
    powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def pcb(
    base: Array, deltas: Sequence[Array], *, kind: np.dtype[Any], ratio: float = 0.1, lambda_: float = 1.2
) -> Array:
    """Average the deltas by their competition scores.

    kind: the dtype in which scores, over exp(K), are ranked and shared.
    """
    total, count = np.sum(deltas, axis=0), len(deltas)
    shares = []
    for delta in deltas:
        self = normalise(np.abs(delta)) ** 2
        score = np.exp(count * self) * np.tanh(delta * total)
        shares.append(find_shares((score / np.exp(count)).astype(kind), ratio))
    return np.asarray(
        base
        + lambda_
        * np.sum([share * delta for share, delta in zip(shares, deltas, strict=True)], axis=0)
        / np.maximum(np.sum(shares, axis=0), 1e-12)
    )


def find_shares(score: npt.NDArray[Any], ratio: float) -> Array:
    """Return the largest scores on a scale from 0 to 1, where all are equal 1; nothing of the others."""
    kept = np.argsort(-score.ravel(), kind="stable")[: max(1, floor(ratio * score.size))]
    chosen = score.ravel()[kept].astype(np.float64)
    share = np.zeros(score.size)
    share[kept] = normalise(chosen) if chosen.max() > chosen.min() else 1.0
    return share.reshape(score.shape)


def normalise(values: Array) -> Array:
    """Return the values on a scale from 0 to 1; nothing where all are equal."""
    span = values.max() - values.min()
    return np.asarray((values - values.min()) / span if span > 0 else np.zeros_like(values))
