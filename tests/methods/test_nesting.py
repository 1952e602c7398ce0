"""Merges inside merges: each kind of statistics under each, whole and cut, kept and read again, against the oracles."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from methods.harness import Mill, Task, make_values
from methods.suite import find_subject
from torch import Tensor

from mergemill.engine.conformance.mill import bits_of
from mergemill.engine.methods.catalogue import find_methods
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.merged import Difference, Merged

SHAPE = (311, 500)  # three blocks, the last of them not full
KINDS = {
    "element": "task_arithmetic",
    "sums": "dare_ties",
    "gram": "slerp",
    "rank": "ties",
    "row": "della",
    "matrix": "iso_c",
}


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Mill:
    return Mill(tmp_path_factory.mktemp("mill"))


def make_inputs(count: int = 4, seed: int = 3) -> list[Tensor]:
    return make_values(SHAPE, dtype=torch.bfloat16, count=count, seed=seed)


def put_inside(outer: Merged, inner: Expression) -> Merged:
    """Return the outer merge with the inner one instead of its last input."""
    return dataclasses.replace(outer, inputs=(*outer.inputs[:-1], inner))


def assert_expected(task: Task, found: Tensor) -> None:
    """Compare a method's result with its float64 oracle."""
    assert isinstance(task.method, str) or task.kernel.name
    subject = find_subject(task.kernel.name)
    expected = subject.expect(task)
    error = np.abs(found.double().numpy() - expected.values)
    good = (error <= subject.rounding * np.abs(expected.values).max()) | expected.doubtful
    assert good.all(), f"{task.kernel.name}: {error.max()} from the oracle"


def run_all_ways(mill: Mill, expression: Merged) -> Tensor:
    """Return the result of the expression, the same whole and cut, with its inputs kept or read again."""
    whole = mill.run(expression)
    ways = [mill.run(expression, keep=False), mill.run(expression, parts=3), mill.run(expression, parts=2, keep=False)]
    assert [bits_of(way) == bits_of(whole) for way in ways] == [True] * 3
    return whole


def test_every_kind_of_statistics_is_here() -> None:
    assert {found.reads for found in find_methods().values()} == set(KINDS)
    assert {kind: find_methods()[name].reads for kind, name in KINDS.items()} == {kind: kind for kind in KINDS}


@pytest.mark.parametrize("inner_kind", KINDS)
@pytest.mark.parametrize("outer_kind", KINDS)
def test_each_kind_under_each_gives_the_bytes_of_two_merges_after_each_other(
    mill: Mill, outer_kind: str, inner_kind: str
) -> None:
    inner_task = find_subject(KINDS[inner_kind]).make_task(make_inputs(), tensor="inner.weight")
    inner = mill.express(inner_task)
    made = mill.run(inner)
    assert_expected(inner_task, made)
    outer = find_subject(KINDS[outer_kind])
    outer_task = outer.make_task(make_inputs(seed=4))
    after = dataclasses.replace(outer_task, inputs=(*outer_task.inputs[:-1], made))
    found = run_all_ways(mill, put_inside(mill.express(outer_task), inner))
    assert bits_of(found) == bits_of(mill.merge(after))
    assert_expected(after, found)


def test_three_deep_gives_the_bytes_of_three_merges_after_each_other(mill: Mill) -> None:
    values = make_inputs()
    ties = find_subject("ties").make_task(values, tensor="deepest")
    deepest = mill.express(ties)
    slerp = find_subject("slerp").make_task(make_inputs(seed=5), tensor="middle")
    middle = put_inside(mill.express(slerp), deepest)
    linear = find_subject("linear").make_task(make_inputs(seed=6))
    found = run_all_ways(mill, put_inside(mill.express(linear), middle))
    first = mill.merge(ties)
    second = mill.merge(dataclasses.replace(slerp, inputs=(*slerp.inputs[:-1], first)))
    last = dataclasses.replace(linear, inputs=(*linear.inputs[:-1], second))
    assert bits_of(found) == bits_of(mill.merge(last))
    assert_expected(last, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_over_a_task_vector_from_a_base_of_its_own(mill: Mill, kind: str, dtype: torch.dtype) -> None:
    """A difference is taken in the merge's dtype, as if it had been stored so and put on the base."""
    if kind == "gram":
        pytest.skip("slerp takes no task vectors")
    task = find_subject(KINDS[kind]).make_task([value.to(dtype) for value in make_inputs(count=5)])
    expression = mill.express(task)
    own_base, model = mill.store([value.to(dtype) for value in make_inputs(count=2, seed=8)])
    found = run_all_ways(mill, put_inside(expression, Difference(model, own_base)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base, one, other = (value.to(wide) for value in (task.inputs[0], *load(mill, [own_base, model])))
    after = dataclasses.replace(
        task,
        inputs=(torch.zeros(SHAPE, dtype=wide), *(x.to(wide) - base for x in task.inputs[1:-1]), other - one),
    )
    moved = mill.merge(after)  # on a base of zeros task vectors are models
    assert (found - (base + moved)).abs().max() <= 4e-6 * found.abs().max()


def load(mill: Mill, sources: Sequence[Expression]) -> list[Tensor]:
    """Return stored tensors as they are."""
    zero, one = torch.zeros(SHAPE), find_subject("linear")
    task = one.make_task([zero] * one.models, {"weight": (1.0,) * one.models, "normalize": False})
    plain = mill.express(task)
    return [mill.run(dataclasses.replace(plain, inputs=(source, *plain.inputs[1:]))) for source in sources]
