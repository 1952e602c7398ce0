"""Races: all candidates of a generation go over half of the windows, and those that are not far behind over the rest.

Who is more than two standard errors behind the best, paired by window, is judged no further. Its loss on the rest is
estimated from the best's there and from how far it was behind, so all scores are of the whole text and compare with
those of other generations; and none that was left behind can be the best.
"""

from collections.abc import Callable, Sequence

from mergemill.engine.errors import InputError
from mergemill.engine.evaluation.sums import RowSums, find_error
from mergemill.engine.evaluation.texts import ScoredTokens
from mergemill.engine.tensors.lazy import Tensor, torch

LEAST_WINDOWS = 8  # four of a half, or its standard errors say nothing
ERRORS = 2.0  # standard errors behind the best, within which a candidate goes on

JudgeSome = Callable[[Sequence[int], ScoredTokens], Sequence[RowSums]]
"""Gives what some of the models, by their places, make of windows."""


def race(tokens: ScoredTokens, models: int, judge: JudgeSome) -> list[tuple[RowSums, bool]]:
    """Return what each model makes of the windows, and whether it was left behind.

    Raises `InputError` for a text of too few windows.
    """
    if len(tokens.ids) < LEAST_WINDOWS:
        raise InputError(f"the text has {len(tokens.ids)} windows, and a race needs {LEAST_WINDOWS}: make them shorter")
    halves = tokens.take(slice(0, None, 2)), tokens.take(slice(1, None, 2))
    first = judge(range(models), halves[0])
    best, behind = find_behind(halves[0], [each.loss for each in first])
    close = [place for place in range(models) if behind[place] is None]
    second = dict(zip(close, judge(close, halves[1]), strict=True))
    counts = halves[1].scored.sum(1)
    for place, by in enumerate(behind):
        if by is not None:
            second[place] = RowSums(second[best].loss + by * counts, second[best].entropy)
    return [
        (
            RowSums(_interleave(own.loss, second[place].loss), _interleave(own.entropy, second[place].entropy)),
            behind[place] is not None,
        )
        for place, own in enumerate(first)
    ]


def find_behind(tokens: ScoredTokens, sums: Sequence[Tensor]) -> tuple[int, list[float | None]]:
    """Return which model is the best, and by how many nats a token each is behind it; None where it is close.

    sums: the loss of each window, of each model.
    """
    best = min(range(len(sums)), key=lambda place: float(sums[place].sum()))
    return best, [_find_gap(own - sums[best], tokens.scored.sum(1)) for own in sums]


def _find_gap(difference: Tensor, counts: Tensor) -> float | None:
    """Return the mean difference a token, of sums [windows]; None where it is within its error."""
    count = int(counts.sum())
    mean = float(difference.sum()) / count
    error = find_error(difference - mean * counts, count) or 0.0
    return mean if mean > ERRORS * error else None


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    """Return the windows of two halves in their order."""
    whole = torch.empty(len(first) + len(second), dtype=first.dtype)
    whole[0::2], whole[1::2] = first, second
    return whole
