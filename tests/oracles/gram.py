"""Oracles of the methods that know their inputs' inner products, from the formulas alone, on the whole arrays."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from oracles import Array


def length(x: Array) -> float:
    """‖x‖ of the flattened array."""
    return float(np.sqrt(np.sum(x * x)))


def multislerp(
    inputs: Sequence[Array],
    *,
    weight: Sequence[float],
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Array:
    """(cos‖τ‖ μ + sin‖τ‖ τ/‖τ‖)·Σwᵢ‖Wᵢ‖; the weighted sum where the directions of two, or of nothing, cancel."""
    if len(inputs) == 1:
        return inputs[0]
    weights = np.array(weight) / sum(weight) if normalize_weights else np.array(weight)
    norms = np.array([length(x) for x in inputs])
    units = [x / (n + eps) for x, n in zip(inputs, norms, strict=True)]
    mean = add(weights, units)
    if length(mean) < eps:
        assert len(inputs) == 2 or norms.max() <= eps
        return add(weights, inputs)
    mean = mean / length(mean)
    tangent = add(weights, [u - np.sum(u * mean) * mean for u in units])
    tau = length(tangent) + eps
    return np.asarray((np.cos(tau) * mean + np.sin(tau) / tau * tangent) * np.sum(weights * norms))


def karcher(inputs: Sequence[Array], *, max_iter: int = 10, tol: float = 1e-5) -> Array:
    """The Karcher mean of the directions, by log and exp maps, times the mean of the norms."""
    if len(inputs) == 1:
        return inputs[0]
    norms = [length(x) for x in inputs]
    units = [x / n for x, n in zip(inputs, norms, strict=True) if n > tol]
    if not units:
        return np.zeros_like(inputs[0])
    mean = add(np.full(len(units), 1 / len(units)), units)
    mean = mean / length(mean) if length(mean) >= tol else units[0]
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for unit in units:
            theta = np.arccos(np.clip(np.sum(unit * mean), -1, 1))
            if tol <= theta <= np.pi - tol:
                tangent += theta / np.sin(theta) * (unit - np.cos(theta) * mean) / len(units)
        step = length(tangent)
        if step < tol:
            break
        mean = np.cos(step) * mean + np.sin(step) * tangent / step
        mean = mean / length(mean)
    return np.asarray(np.mean(norms) * mean)


def nuslerp(a: Array, b: Array, *, weight: Sequence[float], axis: int | None) -> Array:
    """Slerp at w₂/(w₁+w₂) with one angle for everything, or one along `axis`."""
    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    a2, b2, ab = (np.sum(x, axis=axis, keepdims=axis is not None) for x in (a * a, b * b, a * b))
    cos = np.clip(ab / (np.maximum(np.sqrt(a2), 1e-7) * np.maximum(np.sqrt(b2), 1e-7)), -1, 1)
    straight = 1 - cos**2 <= 1e-16
    theta = np.arccos(np.where(straight, 0.0, cos))
    sine = np.where(straight, 1.0, np.sin(theta))
    arc = (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / sine
    return np.asarray(np.where(straight, (1 - t) * a + t * b, arc))


def model_stock(base: Array, deltas: Sequence[Array], *, filter_wise: bool = False) -> Array:
    """t·mean(Wᵢ) + (1−t)·W_0 with t = N·c/(1+(N−1)·c), c the mean cosine of the pairs, of each row if filter_wise."""
    axis = -1 if filter_wise and base.ndim else None
    pairs = [cosine(left, right, axis) for left, right in combinations(deltas, 2)]
    c, count = np.mean(pairs, axis=0), len(deltas)
    below = 1 + (count - 1) * c
    t = np.where(np.abs(below) < 1e-6, 0.0, count * c / np.where(np.abs(below) < 1e-6, 1.0, below))
    mean = add(np.full(count, 1 / count), [base + delta for delta in deltas])
    return np.asarray(t * mean + (1 - t) * base)


def cosine(left: Array, right: Array, axis: int | None) -> Array:
    """The cosine along `axis`, the product of the norms at least 1e-6."""
    products = [np.sum(x, axis=axis, keepdims=axis is not None) for x in (left * left, right * right, left * right)]
    return np.asarray(np.clip(products[2] / np.maximum(np.sqrt(products[0]) * np.sqrt(products[1]), 1e-6), -1, 1))


def geometric_median(
    deltas: Sequence[Array], *, weight: Sequence[float], max_iter: int = 100, tol: float = 1e-6
) -> Array:
    """Weiszfeld's iteration from the weighted mean; at an input the step of Vardi & Zhang."""
    weights = np.array(weight)
    longest = max(length(d) for d in deltas)
    y = add(weights / weights.sum(), deltas)
    for _ in range(max_iter):
        distances = np.array([length(y - d) for d in deltas])
        near = distances <= 1e-7 * longest
        pulls = np.where(near, 0.0, weights / np.where(near, 1.0, distances))
        if not pulls.any():
            break
        target = add(pulls / pulls.sum(), deltas)
        pull, holding = pulls.sum() * length(target - y), weights[near].sum()
        kept = min(1.0, holding / pull) if pull else 1.0
        step = (1 - kept) * (target - y)
        y = y + step
        if length(step) <= tol * np.sum(weights * distances) / weights.sum():
            break
    return np.asarray(y)


def add(coefficients: Sequence[float] | Array, arrays: Sequence[Array]) -> Array:
    """The weighted sum of arrays."""
    return np.asarray(sum(c * x for c, x in zip(coefficients, arrays, strict=True)))
