"""The methods on whole matrices and the step after a merge, from their papers' formulas; see `oracles`.

`eps` is that of the dtype in which the matrices were stored: what is numerically zero, rounding decides.
"""

from collections.abc import Sequence

import numpy as np

from oracles import Array


def tsv(base: Array, deltas: Sequence[Array], *, eps: float, lambda_: float = 1.0) -> Array:
    """Join each delta's largest singular triples, with the nearest orthonormal factors of the joined vectors."""
    if base.ndim != 2:
        return add_sum(base, deltas, lambda_)
    kept = max(1, min(base.shape) // len(deltas))
    triples = [[part[..., :kept] for part in find_triples(delta, eps)] for delta in deltas]
    left, values, right = (np.concatenate(parts, axis=-1) for parts in zip(*triples, strict=True))
    return base + lambda_ * (find_polar(left, eps) * values) @ find_polar(right, eps).T


def iso_c(base: Array, deltas: Sequence[Array], *, eps: float, lambda_: float = 1.0) -> Array:
    """Give every singular value of the sum their mean, over all of them; those that are zero stay so."""
    if base.ndim != 2:
        return add_sum(base, deltas, lambda_)
    left, values, right = find_triples(np.sum(deltas, axis=0), eps)
    return base + lambda_ * float(np.sum(values)) / min(base.shape) * left @ right.T


def wudi(base: Array, deltas: Sequence[Array], *, ridge: float = 1e-6, lambda_: float = 1.0) -> Array:
    """Solve ``D (Σ Gᵢ + ρ) = Σ DᵢGᵢ``, Gᵢ the Gram matrix of the columns of Dᵢ/‖Dᵢ‖."""
    if base.ndim != 2:
        return add_sum(base, deltas, lambda_)
    present = [delta for delta in deltas if np.any(delta)]
    if not present:
        return base
    grams = [delta.T @ delta / np.sum(delta**2) for delta in present]
    total = np.sum(grams, axis=0)
    total += ridge * np.mean(np.diag(total)) * np.eye(len(total))
    right = np.sum([delta @ gram for delta, gram in zip(present, grams, strict=True)], axis=0)
    return base + lambda_ * np.linalg.solve(total, right.T).T


def svc(merged: Array, deltas: Sequence[Array], *, eps: float, alpha: float = 1.0) -> Array:
    """Return the merged task vector with each singular value times ``K / Σ max(alpha, sᵢ)``."""
    if merged.ndim != 2:
        return merged
    left, values, right = find_triples(merged, eps)
    total = np.sum(
        [np.maximum(alpha, find_shares(left.T @ merged, left, delta, eps, alpha)) for delta in deltas], axis=0
    )
    factors = np.divide(len(deltas), total, out=np.ones_like(total), where=total > 0)
    return np.asarray(merged + (left * (factors - 1) * values) @ right.T)


def find_shares(images: Array, left: Array, delta: Array, eps: float, alpha: float) -> Array:
    """Return ``⟨a, aᵢ⟩/‖aᵢ‖²`` for every left vector; alpha where aᵢ is nothing but the rounding of Dᵢ."""
    own = left.T @ delta
    norms = np.linalg.norm(own, axis=1)
    least = max(eps, max(delta.shape) * np.finfo(float).eps) * np.linalg.norm(delta)
    squares = np.where(norms > least, norms**2, 1)
    return np.where(norms > least, np.sum(images * own, axis=1) / squares, alpha)


def add_sum(base: Array, deltas: Sequence[Array], lambda_: float) -> Array:
    """Return the base and lambda times the sum of the deltas: what there is for vectors."""
    return np.asarray(base + lambda_ * np.sum(deltas, axis=0))


def find_triples(matrix: Array, eps: float) -> tuple[Array, Array, Array]:
    """Return ``U, S, V`` without the singular values that are numerically zero."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    clear = values > max(matrix.shape) * eps * values[0]
    return left[:, clear], values[clear], right[clear].T


def find_polar(matrix: Array, eps: float) -> Array:
    """Return the nearest matrix with orthonormal columns, as far as the columns are independent."""
    left, _, right = find_triples(matrix, eps)
    return np.asarray(left @ right.T)


def iso_cts(base: Array, deltas: Sequence[Array], *, eps: float, common: float = 0.8, lambda_: float = 1.0) -> Array:
    """Give the common directions of the sum, and each delta's own beside these, the mean of their values."""
    if base.ndim != 2:
        return base + lambda_ * np.mean(deltas, axis=0)
    rank, models = min(base.shape), len(deltas)
    own = min(round((rank - int(rank * common)) / models), rank // models)
    shared = [part[..., : rank - models * own] for part in find_triples(np.sum(deltas, axis=0), eps)]
    triples = []
    for delta in deltas:
        left, values, right = np.linalg.svd(delta - shared[0] @ shared[0].T @ delta, full_matrices=False)
        clear = values > max(base.shape) * eps * max(values[0], float(np.linalg.norm(delta)))
        triples.append([part[..., clear][..., :own] for part in (left, values, right.T)])
    left, values, right = (np.concatenate(parts, axis=-1) for parts in zip(*triples, shared, strict=True))
    mean = float(np.sum(values)) / rank
    return np.asarray(base + lambda_ * mean * find_polar(left, eps) @ find_polar(right, eps).T)


def star(base: Array, deltas: Sequence[Array], *, eps: float, eta: float = 0.4, lambda_: float = 1.0) -> Array:
    """Add the mean of the deltas, each of the rank that has eta of its nuclear norm, scaled up to all of that."""
    if base.ndim != 2:
        return base + lambda_ * np.mean(deltas, axis=0)
    return base + lambda_ * np.mean([truncate_and_rescale(delta, eps, eta) for delta in deltas], axis=0)


def truncate_and_rescale(delta: Array, eps: float, eta: float) -> Array:
    """Return the least rank that has eta of the nuclear norm, with the nuclear norm of all."""
    left, values, right = find_triples(delta, eps)
    if not len(values):
        return np.zeros_like(delta)
    rank = min(int(np.searchsorted(np.cumsum(values), eta * np.sum(values))) + 1, len(values))
    factor = np.sum(values) / np.sum(values[:rank])
    return np.asarray(factor * (left[:, :rank] * values[:rank]) @ right[:, :rank].T)


def cart(models: Sequence[Array], *, rank: float = 0.08, lambda_: float = 1.0) -> Array:
    """Return the mean and lambda times the sum of what the models differ by, each of low rank."""
    mean = np.mean(models, axis=0)
    if mean.ndim != 2:
        return np.asarray(mean)
    kept = max(1, int(np.floor(rank * min(mean.shape))))
    parts = []
    for model in models:
        left, values, right = np.linalg.svd(model - mean, full_matrices=False)
        parts.append((left[:, :kept] * values[:kept]) @ right[:kept])
    return np.asarray(mean + lambda_ * np.sum(parts, axis=0))


def subspace_boost(merged: Array, *, eps: float, beta: float = 0.01) -> Array:
    """Raise each singular value to that at which the sum reaches beta of all; those that are zero stay so."""
    left, values, right = find_triples(merged, eps)
    if merged.ndim != 2 or not len(values):
        return merged
    reached = np.cumsum(values) >= beta * np.cumsum(values)[-1]
    return np.asarray(left * np.maximum(values, values[int(np.argmax(reached))]) @ right.T)


def dc_merge(
    base: Array, deltas: Sequence[Array], *, eps: float, density: float = 0.001, lambda_: float = 1.0
) -> Array:
    """Join cores in a cover of all deltas' largest directions by the signs of their sum, block by block."""
    if base.ndim != 2:
        return base + lambda_ * np.mean(deltas, axis=0)
    share = max(1, min(base.shape) // len(deltas))
    triples = [[part[..., :share] for part in find_triples(delta, eps)] for delta in deltas]
    left, right = (find_polar(np.concatenate([each[at] for each in triples], axis=1), eps) for at in (0, 2))
    cores = np.array([left.T @ (u * s) @ v.T @ right for u, s, v in triples])
    kept = max(1, int(density * (share * len(deltas)) ** 2))
    for core in cores:
        least = np.sort(np.abs(core), axis=None)[-min(kept, core.size)]
        core[(np.abs(core) < least) | (np.abs(core) <= eps * np.max(np.abs(core)))] = 0
    agreeing = cores * (np.sign(cores) == np.sign(np.sum(cores, axis=0)))
    owner = np.repeat(np.arange(len(deltas)), [len(s) for _, s, _ in triples])
    joined = np.sum(agreeing, axis=0) / np.maximum(np.sum(agreeing != 0, axis=0), 1)
    return np.asarray(base + lambda_ * left @ np.where(owner[:, None] == owner, joined, 0) @ right.T)


def orthomerge(base: Array, deltas: Sequence[Array], *, lambda_: float = 0.2) -> Array:
    """Rotate the base by the joined Cayley transforms of the nearest rotations, and add the rest of the deltas."""
    if base.ndim != 2:
        return add_sum(base, deltas, lambda_)
    one, rotations, skews = np.eye(base.shape[1]), [], []
    for delta in deltas:
        rotation = find_rotation(base, base + delta)
        turns = np.linalg.eigvals(rotation)
        if np.min(np.abs(turns + 1)) < 1e-7:
            rotation = one
        rotations.append(rotation)
        skews.append((rotation - one) @ np.linalg.inv(rotation + one))
    total, lengths = np.sum(skews, axis=0), [float(np.linalg.norm(skew)) for skew in skews]
    rest = np.sum([base + delta - base @ turn for delta, turn in zip(deltas, rotations, strict=True)], axis=0)
    norm = float(np.linalg.norm(total))
    skew = total * np.mean(lengths) / norm if norm > 1e-8 * np.sum(lengths) else 0 * total
    return np.asarray(base @ (one + skew) @ np.linalg.inv(one - skew) + lambda_ * rest)


def find_rotation(base: Array, model: Array) -> Array:
    """Return the orthogonal matrix of least ``‖model - base R‖`` that is nearest to the identity, by full SVDs."""
    left, values, right = np.linalg.svd(base.T @ model)
    clear = values > len(values) * np.finfo(float).eps * values[0]
    free, kept = (left[:, ~clear], right[~clear].T), left[:, clear] @ right[clear]
    u, _, v = np.linalg.svd(free[0].T @ free[1])
    return np.asarray(kept + free[0] @ u @ v @ free[1].T)
