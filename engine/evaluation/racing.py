"""Races: all candidates of a generation go over half of the windows, and those that are not far behind over the rest.

Who is more than two standard errors behind the best, paired by window, is judged no further. Its loss on the rest is
estimated from the best's there and from how far it was behind, so all scores are of the whole text and compare with
those of other generations; and none that was left behind can be the best.
"""

from collections.abc import Callable, Sequence

from mergemill.engine.errors import InputError
from mergemill.engine.evaluation.sums import find_error
from mergemill.engine.evaluation.texts import ScoredTokens
from mergemill.engine.tensors.lazy import Tensor, torch

LEAST_WINDOWS = 8  # four of a half, or its standard errors say nothing
ERRORS = 2.0  # standard errors behind the best, within which a candidate goes on

JudgeSome = Callable[[Sequence[int], ScoredTokens], Sequence[tuple[Tensor, Tensor]]]
"""Gives loss and entropy [windows, length - 1] of some of the models, by their places."""


def race(tokens: ScoredTokens, models: int, judge: JudgeSome) -> list[tuple[Tensor, Tensor, bool]]:
    """Return loss and entropy [windows, length - 1] of each model, and whether it was left behind.

    Raises `InputError` for a text of too few windows.
    """
    if len(tokens.ids) < LEAST_WINDOWS:
        raise InputError(f"the text has {len(tokens.ids)} windows, and a race needs {LEAST_WINDOWS}: make them shorter")
    halves = tokens.take(slice(0, None, 2)), tokens.take(slice(1, None, 2))
    first = judge(range(models), halves[0])
    best, behind = find_behind(halves[0], [loss for loss, _ in first])
    close = [place for place in range(models) if behind[place] is None]
    second = dict(zip(close, judge(close, halves[1]), strict=True))
    loss, entropy = second[best]
    estimates = {place: (loss + by, entropy) for place, by in enumerate(behind) if by is not None}
    ends = second | estimates
    return [
        (_interleave(loss, ends[place][0]), _interleave(entropy, ends[place][1]), behind[place] is not None)
        for place, (loss, entropy) in enumerate(first)
    ]


def find_behind(tokens: ScoredTokens, losses: Sequence[Tensor]) -> tuple[int, list[float | None]]:
    """Return which model is the best, and by how many nats a token each is behind it; None where it is close."""
    scored = tokens.scored[:, 1:]
    counts = scored.sum(1)
    sums = [(loss * scored).sum(1) for loss in losses]
    best = min(range(len(sums)), key=lambda place: float(sums[place].sum()))
    return best, [_find_gap(own - sums[best], counts) for own in sums]


def _find_gap(difference: Tensor, counts: Tensor) -> float | None:
    """Return the mean difference a token, of sums [windows]; None where it is within its error."""
    count = int(counts.sum())
    mean = float(difference.sum()) / count
    error = find_error(difference - mean * counts, count) or 0.0
    return mean if mean > ERRORS * error else None


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    """Return the windows of two halves in their order."""
    whole = torch.empty((len(first) + len(second), *first.shape[1:]), dtype=first.dtype)
    whole[0::2], whole[1::2] = first, second
    return whole
