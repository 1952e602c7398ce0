"""A new row from the model's own tokens that spell it."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from mergemill.engine.tensors.lazy import torch
from mergemill.engine.tensors.row_maps import Ints
from mergemill.engine.transplants.streams import NONE, Combination

Subword = Literal["mean", "sum", "weighted_mean", "first_last"]


def weigh_pieces(spellings: Sequence[Ints], how: Subword, *, is_head: bool) -> Combination:
    """Return the sums over pieces, ids of the model, of each row; of no pieces there is none.

    *weighted_mean* weighs with 1…n: in the embedding most on the last piece, which follows all others, in the head on
    the first, which is said first; *first_last* takes that piece alone.
    """
    most = max((len(each) for each in spellings), default=0)
    numbers = np.full((len(spellings), most), NONE, np.int64)
    weights = np.zeros((len(spellings), most))
    for row, pieces in enumerate(spellings):
        numbers[row, : len(pieces)] = pieces
        weights[row, : len(pieces)] = _weigh(len(pieces), how, is_head=is_head)
    return Combination(torch.from_numpy(numbers), torch.from_numpy(weights))


def _weigh(count: int, how: Subword, *, is_head: bool) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Return the weights of so many pieces.

    >>> _weigh(3, "weighted_mean", is_head=False).tolist(), _weigh(2, "first_last", is_head=True).tolist()
    ([0.16666666666666666, 0.3333333333333333, 0.5], [1.0, 0.0])
    """
    if how in ("mean", "sum"):
        return np.full(count, 1 / max(1, count) if how == "mean" else 1.0)
    rising = np.arange(1.0, count + 1) if how == "weighted_mean" else (np.arange(count) == count - 1).astype(np.float64)
    weights = rising[::-1] if is_head else rising
    total: float = weights.sum()
    return np.asarray(weights / max(1.0, total), np.float64)
