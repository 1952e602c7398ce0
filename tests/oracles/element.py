"""Oracles of the methods that look at each element by itself, from the formulas alone; deltas are W - W_0."""

from collections.abc import Sequence

import numpy as np

from oracles import Array, Bools, find_largest, join_deltas, sparsify


def expo(base: Array, deltas: Sequence[Array], *, weight: Sequence[float]) -> Array:
    """W_0 + Σ wᵢDᵢ."""
    return base + np.sum([w * d for w, d in zip(weight, deltas, strict=True)], axis=0)


def magmax(base: Array, deltas: Sequence[Array], *, lambda_: float = 0.5) -> Array:
    """W_0 + lambda · the delta of largest magnitude, the last of equals."""
    sizes = np.abs(np.array(deltas))[::-1]
    last = len(deltas) - 1 - np.argmax(sizes, axis=0)
    return base + lambda_ * np.take_along_axis(np.array(deltas), last[None], axis=0)[0]


def nearswap(base: Array, other: Array, *, t: float) -> Array:
    """r·W_1 + (1−r)·W_0 with r = clip(t / max(|W_0−W_1|, 1e-6), 0, 1)."""
    r = np.clip(t / np.maximum(np.abs(base - other), 1e-6), 0, 1)
    return np.asarray(r * other + (1 - r) * base)


def ram(base: Array, deltas: Sequence[Array], *, epsilon: float = 1e-5) -> Array:
    """W_0 + Σ aᵢDᵢ/c where c = Σaᵢ ≥ 1, with aᵢ = |Dᵢ| > epsilon."""
    return ramplus_tl(base, deltas, epsilon=epsilon, r=0.0)


def ramplus_tl(
    base: Array, deltas: Sequence[Array], *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2
) -> Array:
    """As ram; what one model alone changes is times 1 + r·clip(shared / max(unique, epsilon), 0, alpha)."""
    changed = np.abs(np.array(deltas)) > epsilon
    count = changed.sum(0)
    result = base.copy()
    for delta, mine in zip(deltas, changed, strict=True):
        shared, unique = np.sum(mine & (count > 1)), np.sum(mine & (count == 1))
        factor = 1 + r * np.clip(shared / max(unique, epsilon), 0, alpha) if unique else 1.0
        result += np.where(mine & (count == 1), factor * delta, 0.0)
        result += np.where(mine & (count > 1), delta / np.maximum(count, 1), 0.0)
    return result


def consensus_masks(merged: Array, deltas: Sequence[Array], lambda_mask: Sequence[float]) -> list[Bools]:
    """|Dᵢ| ≥ lambda_maskᵢ · |D_MTL − Dᵢ| for each model."""
    return [np.abs(d) >= factor * np.abs(merged - d) for d, factor in zip(deltas, lambda_mask, strict=True)]


def consensus(
    base: Array, merged: Array, deltas: Sequence[Array], *, lambda_mask: Sequence[float], k: int, lambda_: float
) -> Array:
    """W_0 + lambda · D_MTL where at least k masks agree, else W_0."""
    agree = np.sum(consensus_masks(merged, deltas, lambda_mask), axis=0) >= k
    return base + np.where(agree, lambda_ * merged, 0.0)


def merge_linearly(deltas: Sequence[Array], *, weight: Sequence[float]) -> Array:
    """D_MTL of consensus_ta: Σ wᵢDᵢ."""
    return join_deltas(deltas, weight=weight, consensus=False, normalize=False)


def merge_by_ties(
    deltas: Sequence[Array], *, weight: Sequence[float], density: Sequence[float], normalize: bool, rescale: bool
) -> Array:
    """D_MTL of consensus_ties: trimmed, of the elected sign."""
    masks = [find_largest(delta, share) for delta, share in zip(deltas, density, strict=True)]
    return join_deltas(sparsify(deltas, masks, rescale=rescale), weight=weight, consensus=True, normalize=normalize)


def emr(base: Array, deltas: Sequence[Array], *, lambda_: float = 1.0) -> Array:
    """W_0 + lambda · γ · max |Dᵢ| over those whose sign is γ, the sign of ΣDᵢ."""
    sign = np.sign(np.sum(deltas, axis=0))
    return np.asarray(base + lambda_ * sign * np.max([np.where(np.sign(d) == sign, np.abs(d), 0) for d in deltas], 0))


def negmerge(base: Array, deltas: Sequence[Array], *, lambda_: float = 1.0) -> Array:
    """W_0 − lambda · the mean of the deltas where ``|Σ sign Dᵢ| = K``."""
    agreed = np.abs(np.sum(np.sign(deltas), axis=0)) == len(deltas)
    return base - lambda_ * np.where(agreed, np.mean(deltas, axis=0), 0.0)


def localize_stitch(base: Array, deltas: Sequence[Array], *, density: Sequence[float], lambda_: float = 1.0) -> Array:
    """W_0 + lambda · Σ mᵢDᵢ / Σ mᵢ, mᵢ the largest elements of Dᵢ, none of them 0."""
    masks = [find_largest(d, share) & (d != 0) for d, share in zip(deltas, density, strict=True)]
    total = np.sum([np.where(m, d, 0.0) for m, d in zip(masks, deltas, strict=True)], axis=0)
    return np.asarray(base + lambda_ * total / np.maximum(np.sum(masks, axis=0), 1))


def cabs(
    base: Array, deltas: Sequence[Array], *, weight: Sequence[float], n: int, m: int, lambda_: float = 1.0
) -> Array:
    """W_0 + lambda · Σ wᵢ · the n largest of every m elements of Dᵢ that no model before has kept."""
    taken, total = np.zeros(base.size, bool), np.zeros(base.size)
    for w, delta in zip(weight, deltas, strict=True):
        left = np.where(taken, 0.0, delta.ravel())
        for start in range(0, base.size, m):
            group = left[start : start + m]
            first = np.argsort(-np.abs(group), kind="stable")[: n * len(group) // m]
            kept = start + first[group[first] != 0]
            total[kept] += w * left[kept]
            taken[kept] = True
    return np.asarray(base + lambda_ * total.reshape(base.shape))


def widen(
    base: Array, deltas: Sequence[Array], *, by_token: bool = False, ratio: float = 1.0, calibration: float = 1.0
) -> Array:
    """W_0 + Σ wᵢDᵢ, wᵢ the mean of a column's scores by length and by direction."""
    if base.ndim != 2:
        scores = find_scores(np.abs(np.array(deltas)), ratio, calibration)
        return np.asarray(base + np.sum(scores * deltas, axis=0))
    if by_token:
        return widen(base.T, [d.T for d in deltas], ratio=ratio, calibration=calibration).T
    lengths = [np.abs(np.linalg.norm(base + d, axis=0) - np.linalg.norm(base, axis=0)) for d in deltas]
    turns = [1 - find_cosines(base, base + d) for d in deltas]
    ranks = [np.argsort(np.argsort(np.array(each), axis=1, kind="stable"), axis=1) for each in (lengths, turns)]
    mean = (base.shape[1] - 1) / 2
    soft = [find_scores(rank / base.shape[1], np.inf, calibration) for rank in ranks]
    scores = np.mean([np.where(r > ratio * mean, calibration, s) for r, s in zip(ranks, soft, strict=True)], axis=0)
    return np.asarray(base + np.sum(scores[:, None, :] * deltas, axis=0))


def find_cosines(left: Array, right: Array) -> Array:
    """Return the cosine of each pair of columns."""
    norms = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=0)
    return np.asarray(np.sum(left * right, axis=0) / norms)


def find_scores(significance: Array, ratio: float, calibration: float) -> Array:
    """Return the softmax over the models; calibration where a value exceeds ratio times the model's mean."""
    powers = np.exp(significance - np.max(significance, axis=0))
    mean = np.mean(significance.reshape(len(significance), -1), axis=1).reshape(-1, *[1] * (significance.ndim - 1))
    return np.where(significance > ratio * mean, calibration, powers / np.sum(powers, axis=0))
