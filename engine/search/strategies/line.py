"""Golden section: the minimum of one variable, by ever smaller brackets of the golden ratio.

Source: Kiefer 1953. Each evaluation leaves 0.618 of the bracket; ten of them find the place to a hundredth of the
range.
"""

import math

from mergemill.engine.search.space import Space
from mergemill.engine.search.strategies.asking import Asking

GOLDEN = (math.sqrt(5) - 1) / 2
EVALUATIONS = 10


def ask_line(space: Space) -> Asking:
    """Ask for two points, then for one at a time."""
    low, high = 0.0, 1.0
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = yield [space.to_values([left]), space.to_values([right])]
    for _ in range(EVALUATIONS - 2):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            (at_left,) = yield [space.to_values([left])]
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            (at_right,) = yield [space.to_values([right])]
    return "line"
