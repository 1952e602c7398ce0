"""The box that a search moves in: each number of each variable is one side of it, from 0 to 1."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergemill.engine.recipe.searches import Variable
from mergemill.engine.recipe.settings import Scalar
from mergemill.engine.recipe.templates import Values

DIGITS = 12  # of a value: what other machines' last bits make of a point is the same recipe

Point = Sequence[float]


@dataclass(frozen=True, slots=True)
class Space:
    """Variables by name, in order."""

    variables: Mapping[str, Variable]

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return sum(each.layers or 1 for each in self.variables.values())

    @property
    def start(self) -> list[float]:
        """The point where a search begins."""
        return [x for each in self.variables.values() for x in [_find_start(each)] * (each.layers or 1)]

    @property
    def steps(self) -> list[float]:
        """How far apart the values of whole numbers are in the box; 0 for other numbers."""
        return [x for each in self.variables.values() for x in [_find_step(each)] * (each.layers or 1)]

    def to_values(self, point: Point) -> Values:
        """Return the values of a point of the box."""
        left, values = list(point), dict[str, Scalar | tuple[Scalar, ...]]()
        for name, variable in self.variables.items():
            taken, left = left[: variable.layers or 1], left[variable.layers or 1 :]
            found = tuple(to_value(variable, x) for x in taken)
            values[name] = found if variable.layers else found[0]
        return values

    def corners(self) -> tuple[Values, Values]:
        """Return the values at the two ends of the box."""
        return self.to_values([0.0] * self.size), self.to_values([1.0] * self.size)


def to_value(variable: Variable, x: float) -> Scalar:
    """Return the value at `x` of a variable's side, 0 to 1.

    >>> to_value(Variable(low=0.01, high=1, log=True), 0.5), to_value(Variable(low=1, high=4, integer=True), 0.99)
    (0.1, 4)
    >>> to_value(Variable(choices=["ties", "sce"]), 0.5)
    'sce'
    """
    x = min(max(x, 0.0), 1.0)
    if variable.choices is not None:
        return variable.choices[min(int(x * len(variable.choices)), len(variable.choices) - 1)]
    assert variable.low is not None
    assert variable.high is not None
    if variable.integer:
        count = int(variable.high - variable.low) + 1
        return int(variable.low) + min(int(x * count), count - 1)
    if variable.log:
        return round_value(math.exp(math.log(variable.low) + x * math.log(variable.high / variable.low)))
    return round_value(variable.low + x * (variable.high - variable.low))


def _find_start(variable: Variable) -> float:
    """Return the place of a variable's start, the middle where it has none."""
    if variable.start is None:
        return 0.5
    assert variable.low is not None
    assert variable.high is not None
    if variable.integer:
        return (variable.start - variable.low) / (variable.high - variable.low)
    if variable.log:
        return math.log(variable.start / variable.low) / math.log(variable.high / variable.low)
    return (variable.start - variable.low) / (variable.high - variable.low)


def _find_step(variable: Variable) -> float:
    if not variable.integer:
        return 0.0
    assert variable.low is not None
    assert variable.high is not None
    return 1 / (variable.high - variable.low)


def round_value(x: float) -> float:
    """Return `x` with as many digits as count.

    >>> round_value(0.1 + 0.2), round_value(1.0)
    (0.3, 1.0)
    """
    return float(f"{x:.{DIGITS}g}")
