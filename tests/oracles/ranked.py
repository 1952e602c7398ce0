"""Oracles of the methods that rank elements: breadcrumbs, sce, della, arcee_fusion, pcb."""

from collections.abc import Sequence
from math import floor
from typing import Any

import numpy as np

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
