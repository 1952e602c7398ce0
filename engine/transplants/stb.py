"""Sparse token basis: the main directions of the narrower space, each a sum of few shared tokens, in both spaces.

Source: arXiv:2506.06607 and mergekit-tokensurgeon. The eigenvectors of the covariance of the narrower model's centred
shared rows are each written by orthogonal matching pursuit with k of these rows; the same sums of centred rows are the
bases B_x and B_w. ``a = argmin |y - mean x - sum a_i B_x,i|``, and a row becomes ``sum a_i B_w,i + mean w``: one map.
"""

import numpy as np

from mergemill.engine.tensors.lazy import torch
from mergemill.engine.transplants.affine import Affine, Sums, centre_sums, find_leading
from mergemill.engine.transplants.omp import pursue
from mergemill.engine.transplants.streams import Combination, Pass, Passes, combine_rows


def find_basis(sums: Sums, passes_x: Passes, passes_w: Passes, k: int) -> Affine:
    """Return the map; the passes go over the shared rows of both models, in the same order."""
    mean_x, mean_w, xx, ww, _ = centre_sums(sums)
    count = min(len(mean_x), len(mean_w))
    narrow_x = len(mean_x) <= len(mean_w)
    directions = torch.from_numpy(find_leading(xx if narrow_x else ww, count).T.copy())
    narrow, mean = (passes_x, mean_x) if narrow_x else (passes_w, mean_w)
    found = pursue(directions, _centred(narrow, mean), k)
    bases = [_combine(passes, found, each) for passes, each in ((passes_x, mean_x), (passes_w, mean_w))]
    return Affine(mean_x, np.linalg.pinv(bases[0]) @ bases[1], mean_w)


def _combine(passes: Passes, found: Combination, mean: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> "np.ndarray":
    return combine_rows(_centred(passes, mean), found, len(mean)).numpy()


def _centred(passes: Passes, mean: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> Passes:
    """Return passes over rows less their mean, in float64."""
    centre = torch.from_numpy(np.ascontiguousarray(mean))

    def go() -> Pass:
        for first, slab in passes():
            yield first, slab.double() - centre

    return go
