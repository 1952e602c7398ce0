"""Landmark PCA: both spaces by their leading directions, turned onto each other by the shared tokens.

P, Q are the leading min(Dx, Dw) right singular vectors of the centred shared rows x and w; R is the orthogonal
Procrustes solution argmin |X P R - W Q| (Schoenemann 1966): with (XP)T(WQ) = U S VT, R = U VT. A row y becomes
``(y - mean x) P R QT + mean w``. All of it follows from D x D sums.
"""

import numpy as np

from mergemill.engine.transplants.affine import Affine, Sums, centre_sums, find_leading


def align(sums: Sums) -> Affine:
    """Return the map that landmark PCA makes of the sums over the pairs of shared rows."""
    mean_x, mean_w, xx, ww, xw = centre_sums(sums)
    count = min(len(mean_x), len(mean_w))
    p, q = find_leading(xx, count), find_leading(ww, count)
    u, _, vt = np.linalg.svd(p.T @ xw @ q)
    return Affine(mean_x, p @ u @ vt @ q.T, mean_w)
