"""What the suite knows of a method: how it is called, its oracle, and which claims hold for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracles
import torch
from methods.harness import Settings, Task
from oracles import Array, Bools
from tensors.masks import random_mask

from mergemill.engine.conformance import Based, Expected

__all__ = [
    "Based",
    "Entry",
    "Expected",
    "as_arrays",
    "certain",
    "doubt_signs",
    "make_deltas",
    "make_masks",
    "take_arguments",
]


@dataclass(frozen=True, slots=True)
class Entry:
    """How the suite calls one method; `variants` are settings for `models` models."""

    models: int
    variants: tuple[Settings, ...]  # the first is the one that most tests use
    oracle: Callable[[Task], Expected]
    symmetric: bool  # permuting the models with their parameters changes nothing
    random: bool = False
    even: Settings | None = None  # with these, a random method keeps every element with the density itself
    equal: Settings | None = None  # with these, equal models give that model
    rounding: float = 2e-6  # of the largest value: how far float32 may be from the oracle
    wide_rounding: float | None = None  # how far float64 may be; None: 5e-9 of `rounding`
    everywhere: bool = True  # the same bits whatever the machine; not so where LAPACK is asked


def as_arrays(task: Task) -> list[Array]:
    """Return the task's inputs as float64."""
    return task.arrays()


def certain(values: Array) -> Expected:
    """Return an expectation without doubt."""
    return Expected(np.asarray(values), np.zeros(np.shape(values), bool))


def make_deltas(task: Task) -> list[Array]:
    """Return the task vectors, rounded as the engine's are, so that both rank the same magnitudes."""
    wide = any(tensor.dtype == torch.float64 for tensor in task.inputs)
    kind = torch.float64 if wide else torch.float32
    base, *others = (tensor.to(kind) for tensor in task.inputs)
    return [np.asarray((other - base).double().numpy()) for other in others]


def take_arguments(settings: Settings, *left_out: str) -> dict[str, Any]:
    """Return settings as Python's arguments."""
    return {{"lambda": "lambda_"}.get(key, key): v for key, v in settings.items() if key not in left_out}


def make_masks(task: Task) -> list[Bools]:
    """Return what each model of a random method keeps."""
    return [
        random_mask(x.numel(), share, seed=task.seed, model=model, tensor=task.tensor).reshape(tuple(x.shape))
        for x, share, model in zip(task.inputs[1:], task.settings["density"], task.places, strict=True)
    ]


def doubt_signs(task: Task, deltas: Sequence[Array], masks: Sequence[Bools]) -> Bools:
    """Return where the weighted deltas cancel but for rounding, so that the elected sign is anybody's."""
    sparse = oracles.sparsify(deltas, masks, rescale=task.settings["rescale"])
    weighted = np.array([w * x for w, x in zip(task.settings["weight"], sparse, strict=True)])
    return np.asarray((np.abs(weighted.sum(0)) < 1e-6 * np.abs(weighted).sum(0)) & (np.abs(weighted).sum(0) > 0))
