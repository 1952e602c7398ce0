"""FOCUS: a new row as the sparsemax of its cosines to all shared ones.

Source: arXiv:2305.14481, section 3; sparsemax: arXiv:1602.02068, algorithm 1. The auxiliary space is the donor's.
"""

from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.transplants.streams import NONE, Combination, Passes

_LEAST_NORMS = 1e-6  # product of norms


def weigh_by_sparsemax(targets: Tensor, passes: Passes) -> Combination:
    """Return ``sparsemax(cos(target, shared rows))``: the nearest point of the simplex. Targets ``[new, width]``."""
    pieces = [
        targets @ slab.T / (targets.norm(dim=1)[:, None] * slab.norm(dim=1)).clamp_min(_LEAST_NORMS)
        for _, slab in passes()
    ]
    cosines = torch.cat(pieces, 1).nan_to_num_(nan=-torch.inf) if pieces else targets.new_zeros(len(targets), 0)
    found = [_project(each) for each in cosines]
    most = max((len(numbers) for numbers, _ in found), default=0)
    numbers = torch.full((len(targets), most), NONE, dtype=torch.int64)
    weights = torch.zeros(len(targets), most, dtype=torch.float64)
    for i, (rows, shares) in enumerate(found):
        numbers[i, : len(rows)], weights[i, : len(rows)] = rows, shares
    return Combination(numbers, weights)


def _project(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the support of a sparsemax and its weights: max(z - tau, 0), where they add up to 1."""
    near = (scores > scores.max() - 1).nonzero(as_tuple=True)[0]  # none else is in the support
    if not len(near):  # where no shared row has numbers
        return near, scores[near].double()
    ordered = scores[near].double().sort(descending=True).values
    sums = ordered.cumsum(0)
    count = int((1 + torch.arange(1, len(ordered) + 1) * ordered > sums).sum())
    threshold = (sums[count - 1] - 1) / count
    shares = (scores[near].double() - threshold).clamp_min(0)
    inside = shares > 0
    return near[inside], shares[inside]
