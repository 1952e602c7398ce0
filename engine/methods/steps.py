"""What a step after a merge is: one decorated function that is given the merged task vector and the models' own.

Such a function takes, flat and in the dtype of the accumulation,

=========  ===================================================================================================
`merged`   what the method made, less the base ``[n]``; the step's own, to be overwritten and returned
`deltas`   the task vectors as the method was given them, a list of tensors ``[n]``; only lent, the next step's as well
`place`    where the slab lies (`Place`)
=========  ===================================================================================================

and its keyword-only parameters are those of the step in a recipe. `Stepped` is a method with its steps, as one kernel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mergemill.engine.errors import MergeError, PlanError
from mergemill.engine.methods.contract import Grain, Method, Parameter, find_block, read_signature
from mergemill.engine.methods.docstrings import Documented
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.kernels import Rounds
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place

F = TypeVar("F", bound=Callable[..., Tensor])

GIVEN = ("merged", "deltas", "place")


@dataclass(frozen=True, slots=True)
class Step(Documented):
    """A step after a merge, and what its signature and decorator say about it."""

    name: str
    function: Callable[..., Tensor]
    parameters: tuple[Parameter, ...]
    suits: Callable[[tuple[int, ...]], bool]  # whether it changes tensors of a shape at all
    grain: Grain | Callable[..., Grain | int]
    extra_slabs: int
    extra_slabs_each: int

    def block(self, shape: tuple[int, ...], settings: Mapping[str, Any]) -> int:
        """Return the elements at whose multiples a tensor of `shape` may be cut into slabs."""
        return find_block(self.grain, shape, self._arguments(settings))

    def apply(self, merged: Tensor, deltas: list[Tensor], place: Place, settings: Mapping[str, Any]) -> Tensor:
        """Call the step on one slab."""
        return self.function(merged, deltas, place, **self._arguments(settings))

    def _arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {parameter.argument: settings[parameter.name] for parameter in self.parameters}


def any_shape(shape: tuple[int, ...]) -> bool:
    """Whether a step that changes every tensor changes one of `shape`."""
    return True


def post_step(
    *,
    suits: Callable[[tuple[int, ...]], bool] = any_shape,
    grain: Grain | Callable[..., Grain | int] = "block",
    extra_slabs: int = 4,
    extra_slabs_each: int = 0,
) -> Callable[[F], F]:
    """Declare a function to be a step after a merge; the function itself stays as it is.

    Tensors of a shape that it does not suit keep the bytes that the method gave them. `grain`, `extra_slabs` and
    `extra_slabs_each` are those of `merge_method`; what it returns counts as allocated where it is new.
    """

    def declare(function: F) -> F:
        given, parameters = read_signature(function, GIVEN)
        if given != GIVEN:
            raise TypeError(f"{function.__name__}: a step takes {', '.join(GIVEN)}")
        function.step = Step(  # type: ignore[attr-defined]
            name=function.__name__,
            function=function,
            parameters=parameters,
            suits=suits,
            grain=grain,
            extra_slabs=extra_slabs,
            extra_slabs_each=extra_slabs_each,
        )
        return function

    return declare


@dataclass(frozen=True, slots=True)
class Stepped:
    """A method on task vectors and the steps after it, as one kernel; it needs a base."""

    method: Method
    steps: tuple[tuple[Step, Mapping[str, Any]], ...]  # each with its settings, in their order

    def __post_init__(self) -> None:
        if not self.method.takes_deltas or self.method.base not in ("required", "optional"):
            raise PlanError(
                f"merge_method {self.method.name!r} has no task vectors; {self._steps_name} goes after one that has"
            )

    @property
    def name(self) -> str:
        """The method's name and, since the plan's digest depends on them, its steps with their settings."""
        return f"{self.method.name}, then {self._steps_name}"

    @property
    def takes_deltas(self) -> bool:
        """Always, as the method."""
        return True

    @property
    def on_device(self) -> bool:
        """As the method."""
        return self.method.on_device

    @property
    def takes_matrices(self) -> bool:
        """The steps that there are do."""
        return True

    @property
    def needs_double(self) -> bool:
        """Steps decompose matrices."""
        return True

    @property
    def fuses(self) -> bool:
        """Whether native loops know the method; they do what no step changes."""
        return self.method.fuses

    @property
    def usual_rounds(self) -> int:
        """The method's; steps have no statistics."""
        return self.method.usual_rounds

    @property
    def most_rounds(self) -> int:
        """The method's."""
        return self.method.most_rounds

    @property
    def extra_slabs(self) -> int:
        """The copy of the base; and the method's, or what it returned and a step's."""
        return 1 + max([self.method.extra_slabs, *(1 + step.extra_slabs for step, _ in self.steps)])

    @property
    def extra_slabs_each(self) -> int:
        """A copy of each task vector; and the method's or a step's."""
        return 1 + max([self.method.extra_slabs_each, *(step.extra_slabs_each for step, _ in self.steps)])

    @property
    def extra_bytes(self) -> int:
        """The method's."""
        return self.method.extra_bytes

    def block(self, shape: tuple[int, ...], settings: Mapping[str, Any]) -> int:
        """Return the largest block that the method, with `settings`, or a step needs."""
        needed = [step.block(shape, chosen) for step, chosen in self._steps_for(shape)]
        return max([self.method.block(shape, settings), *needed])

    def start(self, place: Place, settings: Mapping[str, Any], dtype: str) -> Rounds | None:
        """Begin the method's statistics."""
        return self.method.start(place, settings, dtype)

    def fuse(self, statistics: Any, place: Place, settings: Mapping[str, Any]) -> Fusion | None:
        """The method's, where no step changes a tensor of this shape."""
        return None if self._steps_for(place.shape) else self.method.fuse(statistics, place, settings)

    def fuse_whole(self, size: int, settings: Mapping[str, Any]) -> Fusion | None:
        """Not known: steps look at the shape."""
        return None

    def combine(
        self,
        tensors: list[Tensor],
        base: Tensor | None,
        statistics: Any,
        place: Place,
        settings: Mapping[str, Any],
        importances: list[Tensor] | None = None,
    ) -> Tensor:
        """Merge one slab, take the base away, go through the steps and put the base back."""
        steps = self._steps_for(place.shape)
        if not steps:
            return self.method.combine(tensors, base, statistics, place, settings)
        if base is None:
            raise MergeError(f"{self.name}: steps need a base")
        deltas, kept = [tensor.clone() for tensor in tensors], base.clone()  # the method overwrites its own
        merged = self.method.combine(tensors, base, statistics, place, settings).sub_(kept)
        for step, chosen in steps:
            merged = step.apply(merged, deltas, place, chosen)
        return merged.add_(kept)

    def _steps_for(self, shape: tuple[int, ...]) -> list[tuple[Step, Mapping[str, Any]]]:
        return [(step, chosen) for step, chosen in self.steps if step.suits(shape)]

    @property
    def _steps_name(self) -> str:
        return ", ".join(
            f"{step.name}({', '.join(f'{key}={value}' for key, value in sorted(chosen.items()))})"
            for step, chosen in self.steps
        )
