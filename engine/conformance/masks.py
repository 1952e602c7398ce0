"""Claims about random methods that keep elements of task vectors with a `density`: how many, and which."""

from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergemill.engine.conformance.claim import Cases, Check, each, once, where
from mergemill.engine.conformance.mill import Mill, Settings, Task, fill_settings
from mergemill.engine.conformance.subject import Subject
from mergemill.engine.tensors.slabs import BLOCK

SIGMAS = 4.5
CHI_SQUARE = 21.1  # 3 degrees of freedom, p = 1e-4


def is_masking(subject: Subject) -> bool:
    """Whether the method is random, and has the parameters by which its masks can be seen."""
    own = {parameter.name for parameter in subject.method.parameters if parameter.per_model}
    return subject.random and subject.method.base == "required" and {"weight", "density"} <= own


def plainly(subject: Subject, weight: tuple[float, ...], density: float, *, rescale: bool = False) -> Settings:
    """Return settings with which the result is the sum of the masks."""
    given = {"weight": weight, "density": (density,) * len(weight), "rescale": rescale, "normalize": False}
    known = {parameter.name for parameter in subject.method.parameters}
    given = {key: value for key, value in given.items() if key in known} | dict(subject.even or {})
    return fill_settings(subject.method, given, len(weight))


def find_mask(
    mill: Mill, subject: Subject, density: float, *, size: int = 3 * BLOCK + 5, place: int = 1, **other: Any
) -> Tensor:
    """Return, as 0 and 1, what the method keeps of a task vector of ones."""
    inputs = (torch.zeros(size), torch.ones(size))
    return mill.merge(Task(subject.method, inputs, plainly(subject, (1.0,), density), models=(place,), **other))


def as_many_stay_as_the_density_says(mill: Mill, subject: Subject, density: float) -> None:
    """A binomial test, over the tensor and over its blocks."""
    mask = find_mask(mill, subject, density)
    assert bool(((mask == 0) | (mask == 1)).all()), "an element is neither kept nor dropped"
    spread = sqrt(len(mask) * density * (1 - density))
    assert abs(float(mask.double().sum()) - len(mask) * density) < SIGMAS * spread
    for block in mask.split(BLOCK)[:3]:  # type: ignore[no-untyped-call]
        assert abs(float(block.double().sum()) - BLOCK * density) < SIGMAS * sqrt(BLOCK * density * (1 - density))


def masks_are_independent(mill: Mill, subject: Subject, density: float) -> None:
    """Of other models, tensors, seeds, and of their own neighbours."""

    def score(left: Tensor, right: Tensor) -> float:
        """Return how far the count of elements in both masks is from chance, in standard deviations."""
        both = float((left * right).double().sum())
        chance = float(left.double().sum() * right.double().sum()) / len(left)
        return (both - chance) / (sqrt(len(left)) * density * (1 - density))

    mask = find_mask(mill, subject, density)
    pairs = {
        "another model": (mask, find_mask(mill, subject, density, place=2)),
        "another tensor": (mask, find_mask(mill, subject, density, tensor="model.layers.4.mlp.up_proj.weight")),
        "another seed": (mask, find_mask(mill, subject, density, seed=8)),
        "the block before": (mask[:BLOCK], mask[BLOCK : 2 * BLOCK]),
        "the element before": (mask[:-1], mask[1:]),
        "a row before": (mask[:-1024], mask[1024:]),
    }
    scores = {pair: score(*masks) for pair, masks in pairs.items()}
    assert all(abs(value) < SIGMAS for value in scores.values()), scores


def two_models_of_one_merge_have_masks_of_their_own(mill: Mill, subject: Subject) -> None:
    """All four pairs of kept and dropped are equally frequent at a density of a half."""
    size = 2 * BLOCK
    inputs = (torch.zeros(size), torch.ones(size), torch.ones(size))
    result = mill.merge(Task(subject.method, inputs, plainly(subject, (1.0, 2.0), 0.5)))
    counts = np.bincount(result.int().numpy(), minlength=4)
    assert float(((counts - size / 4) ** 2 / (size / 4)).sum()) < CHI_SQUARE, counts


CHECKS: tuple[tuple[Check, Cases], ...] = (
    (as_many_stay_as_the_density_says, where(is_masking, each(0.003, 0.1, 0.5, 0.9, 0.99))),
    (masks_are_independent, where(is_masking, each(0.1, 0.5))),
    (two_models_of_one_merge_have_masks_of_their_own, where(is_masking, once)),
)
