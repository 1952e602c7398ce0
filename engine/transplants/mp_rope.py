"""Matching pursuit whose rows are turned as rotary positions turn them; experimental.

Source: mergekit-tokensurgeon's `mp_rope`; rotary embedding: arXiv:2104.09864. r = y; k times: the shared row not taken
of largest |<r, x_j>| is turned to the position p that fits r best, and what it explains is taken off r. At last least
squares on the turned rows, y = sum c_j turn(x_j, p_j); the new row is sum c_j turn(w_j, p_j) in the model's own heads.
A row is read as heads of pairs (i, i + half), each pair turned by p times its frequency.
"""

from dataclasses import dataclass

from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.transplants.least_squares import solve_least
from mergemill.engine.transplants.omp import LEAST, find_best
from mergemill.engine.transplants.streams import NONE, Combination, Passes


@dataclass(frozen=True, slots=True)
class Rotary:
    """How a model's positions turn its heads."""

    head_width: int
    theta: float  # base of the frequencies

    def make_frequencies(self) -> Tensor:
        """Return ``theta ** (-2 i / head width)`` for each pair, float64."""
        return self.theta ** (-torch.arange(0, self.head_width, 2, dtype=torch.float64) / self.head_width)


def pursue_turned(targets: Tensor, passes: Passes, k: int, rotary: Rotary) -> tuple[Combination, Tensor]:
    """Return each target ``[new, width]`` as a sum of k turned shared rows, and the positions ``[new, k]``, float64."""
    count, width = targets.shape
    numbers = torch.full((count, k), NONE, dtype=torch.int64)
    positions = torch.zeros(count, k, dtype=torch.float64)
    turned = torch.zeros(count, k, width, dtype=torch.float64)
    left, lengths = targets.double(), targets.double().norm(dim=1)
    going = torch.ones(count, dtype=torch.bool)
    for step in range(k):
        going &= left.norm(dim=1) > LEAST * lengths
        if not going.any():
            break
        found, rows = find_best(left.to(targets.dtype), passes, numbers[:, :step])
        going &= found != NONE
        rows = rows.double() * going[:, None]
        positions[:, step] = find_positions(rows, left, rotary) * going
        here = turn(rows, positions[:, step], rotary)
        turned[:, step] = here
        numbers[:, step] = torch.where(going, found, NONE)
        size = (here * here).sum(1)
        share = torch.where(size > 0, (left * here).sum(1) / size.clamp_min(1e-300), 0.0)
        left = left - share[:, None] * here
    return Combination(numbers, solve_least(turned, targets.double())), positions


def find_positions(rows: Tensor, left: Tensor, rotary: Rotary) -> Tensor:
    """Return for each row the position that turns it best onto `left`, or onto its opposite: the smaller of both.

    The angle of each pair is that between the row's and the other's; p = <angles, f> / |f|^2 over heads and pairs.
    """
    frequencies = rotary.make_frequencies()
    positions = [_fit(rows, side, frequencies, rotary) for side in (left, -left)]
    return torch.where(positions[0].abs() <= positions[1].abs(), positions[0], positions[1])


def turn(rows: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """Return rows ``[…, width]`` turned to their positions ``[…]``, float64."""
    a, b = _split(rows, rotary)
    angles = positions[..., None, None] * rotary.make_frequencies()
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -2).reshape(rows.shape)


def _fit(rows: Tensor, others: Tensor, frequencies: Tensor, rotary: Rotary) -> Tensor:
    (a, b), (c, d) = _split(rows, rotary), _split(others, rotary)
    angles = torch.atan2(a * d - b * c, a * c + b * d)
    heads = angles.shape[-2]
    return (angles * frequencies).sum((-2, -1)) / (heads * (frequencies * frequencies).sum())


def _split(rows: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Return both halves of each head's pairs, ``[…, heads, pairs]``."""
    pairs = rows.reshape(*rows.shape[:-1], -1, 2, rotary.head_width // 2)
    return pairs[..., 0, :], pairs[..., 1, :]
