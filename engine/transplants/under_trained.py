"""Tokens whose rows were hardly trained, found by the rows alone.

Source: Land and Bartolo, "Fishing for Magikarp", arXiv:2405.05417: where a model has a head, its rows of least norm;
and rows that point where those of tokens point that are not used at all. The bounds are mergekit-tokensurgeon's.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mergemill.engine.tensors.row_maps import Places

Floats = np.ndarray[Any, np.dtype[np.float64]]
RowPasses = Callable[[], Iterator[Floats]]
"""Goes over the rows of a matrix in their order, ``[some, width]`` at a time."""

LEAST, MOST = 0.01, 0.99  # quantiles of norms, and of cosines
ALIKE = 0.5  # the least cosine that is taken for alike


def find_under_trained(embedding: RowPasses, head: RowPasses | None, unused: Sequence[int]) -> Places:
    """Return the ids, ascending; head: None where it is tied, unused: ids of no token, or of one that says so.

    They are the unused ones; rows of the embedding under the quantile `LEAST` of its norms, where there is a head; and,
    of embedding and head, rows whose cosine to the mean unused row is over the quantile `MOST`, and over `ALIKE`.
    """
    found = set(unused)
    if head is not None:
        norms = np.concatenate([np.linalg.norm(rows, axis=1) for rows in embedding()])
        found.update(np.flatnonzero(norms < np.quantile(norms, LEAST)).tolist())
    for passes in (embedding, head):
        if passes is not None and unused:
            cosines = _find_cosines(passes, np.asarray(unused, np.int64))
            found.update(np.flatnonzero(cosines > max(ALIKE, float(np.quantile(cosines, MOST)))).tolist())
    return np.array(sorted(found), np.int64)


def _find_cosines(passes: RowPasses, unused: Places) -> Floats:
    """Return the cosine of each row to the mean of the unused ones; of zeros 0."""
    total: Any = 0.0
    first = 0
    for rows in passes():
        inside = unused[(unused >= first) & (unused < first + len(rows))]
        total = total + rows[inside - first].sum(0)
        first += len(rows)
    found = []
    for rows in passes():
        sizes = np.linalg.norm(rows, axis=1) * np.linalg.norm(total)
        found.append(np.divide(rows @ total, sizes, out=np.zeros(len(rows)), where=sizes > 0))
    return np.concatenate(found)
