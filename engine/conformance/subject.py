"""What the suite is told of a method: how to call it, what must come out, and which claims hold for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mergemill.engine.conformance.mill import Array, Settings, Task, fill_settings
from mergemill.engine.methods.contract import Method

TENSOR = "model.layers.3.mlp.up_proj.weight"


@dataclass(frozen=True, slots=True)
class Expected:
    """What an oracle says."""

    values: Array
    doubtful: npt.NDArray[np.bool_]  # where the last bit of a sum decides, so that either answer is right


class Based(dict[str, Any]):
    """Settings of a variant in which an optional base is there."""


Oracle = Callable[[Task], Expected | Array]


class ClaimKeywords(TypedDict, total=False):
    """What is claimed of a method beside its values, as keywords: see `Subject`."""

    symmetric: bool
    random: bool
    even: Settings | None
    equal: Settings | None
    rounding: float
    wide_rounding: float | None


@dataclass(frozen=True, slots=True)
class Subject:
    """A method, and what is claimed of it; `variants` are settings for `models` models."""

    method: Method
    models: int
    variants: tuple[Settings, ...]  # the first is the one that most claims use
    oracle: Oracle | None  # in float64, written from the formula; None: nothing is known of the values
    symmetric: bool = False  # permuting the models with their parameters changes nothing
    random: bool = False  # seed, name of the tensor and places of the models matter
    even: Settings | None = None  # with these, a random method keeps every element with the density itself
    equal: Settings | None = None  # with these, equal models give that model
    rounding: float = 2e-6  # of the largest value: how far float32 may be from the oracle
    wide_rounding: float | None = None  # how far float64 may be; None: 5e-9 of `rounding`

    def make_task(
        self,
        values: Sequence[Tensor],
        given: Settings | None = None,
        *,
        tensor: str = TENSOR,
        seed: int = 7,
        models: tuple[int, ...] | None = None,
    ) -> Task:
        """Return a task over as many of `values` as the method takes: its base first, then its models."""
        given = self.variants[0] if given is None else given
        optional_base = self.method.base == "optional" and isinstance(given, Based)
        count = self.models + int(optional_base or self.method.base == "required")
        settings = fill_settings(self.method, given, self.models)
        return Task(self.method, tuple(values[:count]), settings, tensor, seed, models, optional_base)

    def expect(self, task: Task) -> Expected:
        """Return what must come out of a task."""
        assert self.oracle is not None
        said = self.oracle(task)
        if isinstance(said, Expected):
            return said
        return Expected(np.asarray(said), np.zeros(np.shape(said), bool))
