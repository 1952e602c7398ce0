"""Oracles of the methods that rank elements: breadcrumbs, sce, della, arcee_fusion, pcb."""

from collections.abc import Sequence
from math import floor

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
