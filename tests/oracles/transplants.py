"""The approximations of new rows, written straight from their formulas: NumPy, float64, one row at a time."""

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def omp(y: Array, x: Array, w: Array, k: int) -> Array:
    taken: list[int] = []
    left, shares = y, np.zeros(0)
    for _ in range(k):
        if np.linalg.norm(left) <= 1e-6 * np.linalg.norm(y):
            break
        scores = np.abs(x @ left)
        scores[taken] = -1
        best = int(np.argmax(scores))
        beside = x[best] - (x[taken].T @ np.linalg.lstsq(x[taken].T, x[best])[0] if taken else 0)
        if np.linalg.norm(beside) <= 1e-6 * np.linalg.norm(x[best]):
            break
        taken.append(best)
        shares = np.linalg.lstsq(x[taken].T, y)[0]
        left = y - x[taken].T @ shares
    return shares @ w[taken]


def near(y: Array, x: Array, k: int, metric: str) -> tuple[list[int], Array]:
    distance = np.linalg.norm(x - y, axis=1)
    cosine = x @ y / np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(y), 1e-6)
    order = np.argsort(distance if metric == "euclidean" else -cosine, kind="stable")[:k]
    return order.tolist(), (distance if metric == "euclidean" else cosine)[order]


def interpolation(y: Array, x: Array, w: Array, k: int, metric: str, weights: str) -> Array:
    rows, nearness = near(y, x, k, metric)
    n = len(rows)
    if weights == "distance_proportional":
        raw = nearness if metric == "cosine" else 1 / np.maximum(nearness, 1e-6)
        shares = raw / max(raw.sum(), 1e-6)
    elif weights == "least_squares":
        shares = np.linalg.lstsq(x[rows].T, y)[0]
    else:
        bordered = np.block([[x[rows] @ x[rows].T, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
        shares = np.linalg.lstsq(bordered, np.append(x[rows] @ y, 1.0))[0][:-1]
    return shares @ w[rows]


def wechsel(y: Array, x: Array, w: Array, k: int = 10, temperature: float = 0.1) -> Array:
    rows, cosine = near(y, x, k, "cosine")
    shares = np.exp(cosine / temperature)
    return shares / shares.sum() @ w[rows]


def focus(y: Array, x: Array, w: Array) -> Array:
    scores = x @ y / (np.linalg.norm(x, axis=1) * np.linalg.norm(y))
    low, high = scores.max() - 1, scores.max()
    for _ in range(200):  # the threshold at which what is above adds up to 1
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(scores - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(scores - low, 0) @ w


def landmark_pca(y: Array, x: Array, w: Array) -> Array:
    count = min(x.shape[1], w.shape[1])
    xc, wc = x - x.mean(0), w - w.mean(0)
    p, q = (np.linalg.svd(each, full_matrices=False)[2][:count].T for each in (xc, wc))
    u, _, vt = np.linalg.svd((xc @ p).T @ (wc @ q))
    return (y - x.mean(0)) @ p @ (u @ vt) @ q.T + w.mean(0)


def stb(y: Array, x: Array, w: Array, k: int) -> Array:
    xc, wc = x - x.mean(0), w - w.mean(0)
    narrow = xc if x.shape[1] <= w.shape[1] else wc
    directions = np.linalg.svd(narrow, full_matrices=False)[2][: min(x.shape[1], w.shape[1])]
    bases = [np.array([omp(each, narrow, rows, k) for each in directions]) for rows in (xc, wc)]
    shares = np.linalg.lstsq(bases[0].T, y - x.mean(0))[0]
    return shares @ bases[1] + w.mean(0)


def turned(row: Array, position: float, head: int, theta: float) -> Array:
    found, half = row.copy(), head // 2
    for start in range(0, len(row), head):
        for i in range(half):
            angle = position * theta ** (-2 * i / head)
            a, b = row[start + i], row[start + i + half]
            found[start + i] = a * math.cos(angle) - b * math.sin(angle)
            found[start + i + half] = a * math.sin(angle) + b * math.cos(angle)
    return found


def best_position(row: Array, left: Array, head: int, theta: float) -> float:
    def fit(other: Array) -> float:
        above, below, half = 0.0, 0.0, head // 2
        for start in range(0, len(row), head):
            for i in range(half):
                f = theta ** (-2 * i / head)
                one, two = (complex(each[start + i], each[start + i + half]) for each in (row, other))
                above += f * math.atan2((one.conjugate() * two).imag, (one.conjugate() * two).real)
                below += f * f
        return above / below

    return min(fit(left), fit(-left), key=abs)


def mp_rope(y: Array, x: Array, w: Array, k: int, of_x: tuple[int, float], of_w: tuple[int, float]) -> Array:
    taken: list[int] = []
    atoms: list[Array] = []
    rows: list[Array] = []
    left = y
    for _ in range(k):
        scores = np.abs(x @ left)
        scores[taken] = -1
        best = int(np.argmax(scores))
        position = best_position(x[best], left, *of_x)
        taken.append(best)
        atoms.append(turned(x[best], position, *of_x))
        rows.append(turned(w[best], position, *of_w))
        left = left - (left @ atoms[-1]) / (atoms[-1] @ atoms[-1]) * atoms[-1]
    return np.linalg.lstsq(np.array(atoms).T, y)[0] @ np.array(rows)
