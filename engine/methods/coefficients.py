"""What a coefficient method is: one decorated function that gives each task vector a factor before the merge method.

Its positional parameters come from a closed set:

==========  ==========================================================================================================
`depth`     where the tensor lies in the output's layers: layer l of L at ``l/(L-1)``; 0 before the layers, 1 after them
`squares`   ``‖Dᵢ‖²`` of each task vector over the whole model, gathered in one pass over all inputs before the merge
==========  ==========================================================================================================

Its keyword-only parameters are the recipe's, beside `method` in ``coefficients:``. It returns one factor for all task
vectors, or one for each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mergemill.engine.methods.contract import Parameter, read_signature
from mergemill.engine.methods.docstrings import Documented

F = TypeVar("F", bound=Callable[..., float | Sequence[float]])

GIVEN = ("depth", "squares")


@dataclass(frozen=True, slots=True)
class Coefficients(Documented):
    """A coefficient method and what its signature says about it."""

    name: str
    function: Callable[..., float | Sequence[float]]
    given: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    @property
    def takes_squares(self) -> bool:
        """Whether it must know the task vectors of the whole model."""
        return "squares" in self.given

    def find_factors(
        self, settings: Mapping[str, Any], count: int, *, depth: float = 0.0, squares: Sequence[float] = ()
    ) -> tuple[float, ...]:
        """Return the factors of `count` task vectors."""
        known = {"depth": depth, "squares": squares}
        arguments = {parameter.argument: settings[parameter.name] for parameter in self.parameters}
        found = self.function(*(known[name] for name in self.given), **arguments)
        return (found,) * count if isinstance(found, float) else tuple(found)


def coefficients(function: F) -> F:
    """Declare a function to be a coefficient method; the function itself stays as it is."""
    given, parameters = read_signature(function, GIVEN)
    function.coefficients = Coefficients(function.__name__, function, given, parameters)  # type: ignore[attr-defined]
    return function
