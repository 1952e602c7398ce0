"""New rows drawn from the normal distribution of the model's own.

Source: John Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021: N(mean, population
covariance). A covariance that is not positive definite, as where a matrix has fewer rows than columns, gets
``epsilon * trace / D`` on its diagonal.
"""

import numpy as np

from mergemill.engine.transplants.affine import Affine, Doubles

EPSILON = 1e-6


def fit_normal(count: int, total: Doubles, products: Doubles) -> Affine:
    """Return what makes rows of N(0, 1) into ones of the distribution: of sums over rows, of w and of w wT."""
    mean = total / max(1, count)
    covariance = products / max(1, count) - np.outer(mean, mean)
    return Affine(np.zeros_like(mean), _factorise(covariance).T, mean)


def _factorise(covariance: Doubles) -> Doubles:
    """Return the lower Cholesky factor of a covariance, of one that is singular with the least that is needed."""
    each = float(np.trace(covariance)) / len(covariance)
    for epsilon in (0.0, *(EPSILON * 10**i for i in range(4))):
        try:
            return np.linalg.cholesky(covariance + epsilon * each * np.eye(len(covariance)))
        except np.linalg.LinAlgError:
            continue
    return np.zeros_like(covariance)  # of rows that are all equal
