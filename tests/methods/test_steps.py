"""Steps after a merge: how they are declared, and what a method with its steps is."""

import dataclasses
from typing import Annotated

import pytest
import torch
from methods.harness import Mill, Task, bits_of, fill_settings, make_values, pickled
from torch import Tensor

from mergemill.engine.errors import PlanError
from mergemill.engine.methods.catalogue import find_steps, get_method, get_step
from mergemill.engine.methods.contract import Parameter, Within
from mergemill.engine.methods.steps import Step, Stepped, post_step
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.slabs import BLOCK, row_block


def has_rows(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1


@post_step(suits=has_rows, grain="row", extra_slabs=3, extra_slabs_each=1)
def add_first(
    merged: Tensor, deltas: list[Tensor], place: Place, *, lambda_: Annotated[float, Within(0, 2)] = 0.5, steps: int
) -> Tensor:
    return merged.add_(deltas[0] * lambda_ * steps)


@post_step()
def double(merged: Tensor, deltas: list[Tensor], place: Place) -> Tensor:
    return merged.mul_(2)


ADD: Step = add_first.step  # type: ignore[attr-defined]
DOUBLE: Step = double.step  # type: ignore[attr-defined]
STEPS = ((ADD, {"lambda": 0.25, "steps": 2}), (DOUBLE, {}))


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Mill:
    return Mill(tmp_path_factory.mktemp("mill"))


def make_task(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Task:
    """Return a merge of two models and a base."""
    settings = fill_settings(get_method(name), {"weight": (1.0, 0.5)}, 2)
    return Task(name, tuple(make_values(shape, dtype=dtype, count=3)), settings)


def express(mill: Mill, task: Task, steps: tuple[tuple[Step, dict[str, float]], ...]) -> Merged:
    """Return the task with steps after it."""
    expression, kernel = mill.express(task), Stepped(get_method(task.method), steps)
    place = expression.place._replace(block=kernel.block(expression.shape, task.settings))
    return dataclasses.replace(expression, kernel=kernel, place=place)


def test_the_signature_and_the_decorator_say_what_a_step_is() -> None:
    assert (ADD.name, ADD.extra_slabs, ADD.extra_slabs_each, ADD.grain) == ("add_first", 3, 1, "row")
    assert ADD.parameters == (
        Parameter("lambda", "lambda_", float, False, False, 0.5, Within(0, 2)),
        Parameter("steps", "steps", int, False, True, None, None),
    )
    assert ADD.title.startswith("Steps after a merge")


def test_a_step_takes_what_was_merged_the_deltas_and_the_place() -> None:
    with pytest.raises(TypeError, match="wrong: unknown input 'base'"):

        @post_step()
        def wrong(merged: Tensor, base: Tensor) -> Tensor:
            return merged

    with pytest.raises(TypeError, match="short: a step takes merged, deltas, place"):

        @post_step()
        def short(merged: Tensor, deltas: list[Tensor]) -> Tensor:
            return merged


def test_the_folder_is_the_list_of_steps() -> None:
    assert "svc" in find_steps()
    assert get_step("svc").title == (
        "SVC: singular values of the merged task vector, scaled down where the models share a direction."
    )
    with pytest.raises(PlanError, match="unknown step after a merge 'svd'; did you mean 'svc'"):
        get_step("svd")


def test_steps_are_given_the_merged_task_vector_one_after_the_other(mill: Mill) -> None:
    task = make_task("task_arithmetic", (40, 50), torch.float64)
    base, first, second = task.inputs
    result = mill.run(express(mill, task, STEPS))
    wanted = base + 2 * ((first - base) + 0.5 * (second - base) + 0.25 * 2 * (first - base))
    assert torch.allclose(result, wanted, rtol=0, atol=1e-13)


def test_steps_see_the_task_vectors_as_they_were_before_the_method(mill: Mill) -> None:
    task = make_task("ties", (40, 50), torch.float64)
    task = dataclasses.replace(task, settings={**task.settings, "density": (0.1, 0.1)})
    base, first, _ = task.inputs
    result = mill.run(express(mill, task, STEPS[:1]))
    assert torch.allclose(result, mill.merge(task) + 0.5 * (first - base), rtol=0, atol=1e-13)


def test_where_no_step_suits_the_bytes_are_the_methods_own(mill: Mill) -> None:
    task = make_task("ties", (BLOCK + 3,))
    assert bits_of(mill.run(express(mill, task, STEPS[:1]))) == bits_of(mill.merge(task))
    assert bits_of(mill.run(express(mill, task, ()))) == bits_of(mill.merge(task))


def test_slabs_hold_what_the_method_and_the_steps_need_whole() -> None:
    method, settings = get_method("ties"), fill_settings(get_method("ties"), {"weight": (1.0, 1.0)}, 2)
    shape = (300, 40_000)
    assert Stepped(method, STEPS).block((30, 100_000), settings) == row_block((30, 100_000)) == 100_000
    assert Stepped(method, ((get_step("svc"), {"alpha": 1.0}),)).block(shape, settings) == 300 * 40_000
    assert Stepped(method, ((get_step("svc"), {"alpha": 1.0}),)).block((300, 400, 5), settings) == BLOCK


def test_any_cut_gives_the_same_bits(mill: Mill) -> None:
    expression = express(mill, make_task("ties", (900, 300)), STEPS)
    whole = bits_of(mill.run(expression))
    assert bits_of(mill.run(expression, parts=3)) == whole
    assert bits_of(mill.run(expression, parts=2, slab=BLOCK)) == whole


def test_copies_and_steps_are_counted() -> None:
    method = get_method("task_arithmetic")
    stepped = Stepped(method, STEPS)
    assert stepped.extra_slabs == 1 + max(method.extra_slabs, 1 + 3, 1 + 4)
    assert stepped.extra_slabs_each == 1 + max(method.extra_slabs_each, 1)
    assert (stepped.most_rounds, stepped.extra_bytes) == (method.most_rounds, method.extra_bytes)


def test_the_name_holds_the_steps_and_their_settings_so_that_the_plans_digest_does() -> None:
    assert Stepped(get_method("ties"), STEPS).name == "ties, then add_first(lambda=0.25, steps=2), double()"


def test_a_method_with_steps_pickles() -> None:
    stepped = Stepped(get_method("ties"), ((get_step("svc"), {"alpha": 0.5}),))
    assert pickled(stepped) == stepped


@pytest.mark.parametrize("name", ["linear", "slerp", "passthrough"])
def test_a_method_without_task_vectors_has_no_steps(name: str) -> None:
    with pytest.raises(PlanError, match=rf"'{name}' has no task vectors; double\(\) goes after one that has"):
        Stepped(get_method(name), ((DOUBLE, {}),))
