"""What finishing a draft refuses, whatever planner made it."""

from collections.abc import Sequence

import pytest
from plan.toy_tool import merge

from mergemill.engine.errors import PlanError
from mergemill.engine.methods.catalogue import get_coefficients
from mergemill.engine.plan.draft import Draft, finish
from mergemill.engine.plan.steps import Scaling
from mergemill.engine.plan.values import Origin, OutputTensor
from mergemill.engine.storage.ranges import Pin
from mergemill.engine.tensors.expressions import Expression, Stored

SMALL, LARGE = (8, 8), (20_000, 2_000)  # the second is cut


def store(i: int, shape: Sequence[int]) -> Stored:
    return Stored(Pin(f"/nowhere/{i}", 0, ""), 0, "F32", tuple(shape))


def scaled(inner: str, shape: Sequence[int]) -> Expression:
    """Return a merge whose second task vector is a merge itself."""
    base, a, b = (store(i, shape) for i in range(3))
    return merge("ties", "w", (base, a, merge(inner, "w", (a, b))))


def draft(expression: Expression) -> Draft:
    scaling = Scaling(get_coefficients("metagpt"), {}, ("a", "b"))
    return Draft(Origin("toy", "toy", {}), [OutputTensor("w", "F32", expression)], [], [], donor="a", scaling=scaling)


def test_norms_of_an_input_that_must_see_its_whole_tensor_are_refused_where_it_is_cut() -> None:
    with pytest.raises(PlanError, match=r"tensor w: metagpt needs the norms .* merge that input into a model first"):
        finish(draft(scaled("slerp", LARGE)), "5GB")


@pytest.mark.parametrize(("inner", "shape"), [("slerp", SMALL), ("linear", LARGE)])
def test_norms_that_a_part_can_know_are_not_refused(inner: str, shape: Sequence[int]) -> None:
    assert finish(draft(scaled(inner, shape)), "5GB").scaling is not None
