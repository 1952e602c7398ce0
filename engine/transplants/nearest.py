"""The shared rows nearest to new ones, by distance or by cosine, in one pass; and what interpolates between them.

Source: arXiv:2506.06607, common-vocabulary interpolation; arXiv:2112.06598 (WECHSEL, section 3.2): the softmax of
cosines over a temperature.
"""

from dataclasses import dataclass
from typing import Literal

from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.transplants.least_squares import solve_barycentric, solve_least
from mergemill.engine.transplants.streams import Combination, Passes, gather_rows

Metric = Literal["euclidean", "cosine"]
Weights = Literal["distance_proportional", "barycentric", "least_squares"]

LEAST = 1e-6  # of a distance, of a product of norms, of a sum of weights
_SPARE = 8  # candidates beside the k: distances of the pass are rounded, those that decide are in float64


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The k nearest shared rows of each new one, the nearest first, of equals the first."""

    numbers: Tensor  # [new, k]
    nearness: Tensor  # [new, k], float64: the distance, or the cosine
    rows: Tensor  # [new, k, width], float64


def interpolate(targets: Tensor, passes: Passes, k: int, metric: Metric, weights: Weights) -> Combination:
    """Return each target ``[new, width]`` as a sum of the k shared rows nearest to it."""
    near = find_nearest(targets, passes, k, metric)
    if weights == "distance_proportional":
        raw = near.nearness if metric == "cosine" else 1 / near.nearness.clamp_min(LEAST)
        found = raw / raw.sum(1, keepdim=True).clamp_min(LEAST)
    else:
        solve = solve_barycentric if weights == "barycentric" else solve_least
        found = solve(near.rows, targets.double())
    return Combination(near.numbers, found)


def soften(targets: Tensor, passes: Passes, k: int, temperature: float) -> Combination:
    """Return the weights ``softmax(cos / temperature)`` over the k shared rows of largest cosine."""
    near = find_nearest(targets, passes, k, "cosine")
    return Combination(near.numbers, torch.softmax(near.nearness / temperature, 1))


def find_nearest(targets: Tensor, passes: Passes, k: int, metric: Metric) -> Neighbours:
    """Return the k nearest shared rows of each target."""
    count, width = targets.shape
    wanted = k + _SPARE
    best, numbers = targets.new_full((count, 0), 0.0), torch.empty(count, 0, dtype=torch.int64)
    for first, slab in passes():
        here = _score(targets, slab, metric)
        best = torch.cat([best, torch.where(here.isnan(), -torch.inf, here)], 1)
        numbers = torch.cat([numbers, torch.arange(first, first + len(slab)).expand(count, -1)], 1)
        best, at = best.sort(dim=1, descending=True, stable=True)
        best, numbers = best[:, :wanted], numbers.gather(1, at[:, :wanted])
    numbers = numbers.sort(1).values
    rows = gather_rows(passes, numbers, width).double()
    nearness = _measure(targets.double(), rows, metric)
    order = nearness.argsort(dim=1, descending=metric == "cosine", stable=True)[:, :k]
    return Neighbours(
        numbers.gather(1, order), nearness.gather(1, order), rows.gather(1, order[:, :, None].expand(-1, -1, width))
    )


def _score(targets: Tensor, slab: Tensor, metric: Metric) -> Tensor:
    """Return what is larger for nearer rows, ``[new, rows]``."""
    products = targets @ slab.T
    found: Tensor = products.mul(2) - (slab * slab).sum(1)
    if metric == "cosine":
        found = products / (targets.norm(dim=1)[:, None] * slab.norm(dim=1)).clamp_min(LEAST)
    return found


def _measure(targets: Tensor, rows: Tensor, metric: Metric) -> Tensor:
    """Return the distance, or the cosine, of each target to its own rows, ``[new, k]``."""
    found: Tensor = (rows - targets[:, None]).norm(dim=2)
    if metric == "cosine":
        products = (rows @ targets[:, :, None])[:, :, 0]
        found = products / (targets.norm(dim=1)[:, None] * rows.norm(dim=2)).clamp_min(LEAST)
    return found
