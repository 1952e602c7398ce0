"""The suite that users put their own methods through: it passes what is right, and names what is wrong."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from mergemill.engine.conformance import Based, Claim, Mill, Subject, Task, check_method, list_claims
from mergemill.engine.conformance.mill import Array
from mergemill.engine.conformance.subject import ClaimKeywords
from mergemill.engine.methods import Density, PerModel, merge_method
from mergemill.engine.methods.own import load_methods, open_methods

EXAMPLE = Path(__file__).parents[2] / "configs" / "recipes" / "my_methods.py"


def expect_midpoint(task: Task) -> Array:
    base, *models = task.arrays()
    weighted = [w * (model - base) for w, model in zip(task.settings["weight"], models, strict=True)]
    return base + task.settings["lambda"] * sum(weighted) / len(models)


def test_the_example_keeps_to_the_suite() -> None:
    """What the page of methods says to write in a test of one's own."""
    spec = importlib.util.spec_from_file_location("my_methods", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    my_methods = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(my_methods)
    (method,) = load_methods(*open_methods([EXAMPLE])).values()
    assert method.function.__code__.co_code == my_methods.midpoint.__code__.co_code
    check_method(
        method,
        models=3,
        settings=[{"weight": (1.0, 0.6, 0.3)}, {"weight": (1.0, -0.5, 0.0), "lambda": 1.5}],
        oracle=expect_midpoint,
        symmetric=True,
        equal={"lambda": 1.0},
    )


def mean(models: Sequence[Array]) -> Array:
    return np.asarray(sum(models) / len(models))


@merge_method(reads="element")
def average(models: list[Tensor]) -> Tensor:
    return sum(models[1:], models[0]).div_(len(models))


@merge_method(reads="element")
def first_twice(models: list[Tensor]) -> Tensor:
    return sum(models[1:], models[0] * 2).div_(len(models) + 1)


@merge_method(reads="element")
def cut_dependent(models: list[Tensor]) -> Tensor:
    return models[0].sub_(models[0].mean())


@merge_method(reads="element")
def dividing(models: list[Tensor]) -> Tensor:
    return models[0].div_(models[0])


COUNT = iter(range(1000))


@merge_method(reads="element")
def forgetful(models: list[Tensor]) -> Tensor:
    return models[0].add_(next(COUNT))


@merge_method(reads="element")
def unseeded(models: list[Tensor]) -> Tensor:
    return models[0]


@merge_method(reads="element", base="required")
def all_kept(base: Tensor, deltas: list[Tensor], *, weight: PerModel[float], density: PerModel[Density]) -> Tensor:
    return base.add_(deltas[0].mul_(weight[0]))


def test_a_sound_method_passes() -> None:
    check_method(average, oracle=lambda task: mean(task.arrays()), symmetric=True, equal={})


@pytest.mark.parametrize(
    ("method", "claims", "words"),
    [
        (first_twice, {"oracle": lambda task: mean(task.arrays())}, "first_twice: agrees with the oracle: variant 0: "),
        (first_twice, {"symmetric": True}, "permuting the models changes nothing"),
        (cut_dependent, {}, "any slab gives the same bits"),
        (dividing, {}, "finite from finite: variant 0, zeros: values that are not finite"),
        (forgetful, {}, "the same task gives the same bits"),
        (unseeded, {"random": True}, "seed tensor and place matter to random methods alone"),
        (average, {"oracle": lambda task: task.arrays()[0]}, "agrees with the oracle"),
    ],
)
def test_what_is_wrong_is_named(method: object, claims: dict[str, object], words: str) -> None:
    with pytest.raises(AssertionError) as raised:
        check_method(method, **claims)  # type: ignore[arg-type]
    assert words in str(raised.value)


def list_texts(**claims: object) -> list[str]:
    settings = {"weight": (1.0,), "density": (0.5,)}
    subject = Subject(all_kept.method, 1, (settings,), None, False, **claims)  # type: ignore
    return [str(claim) for claim in list_claims(subject)]


def test_claims_are_made_only_where_they_can_hold(tmp_path: Path) -> None:
    plain, random = list_texts(), list_texts(random=True)
    assert not any("oracle" in text or "mask" in text or "density" in text for text in plain)
    assert "as many stay as the density says: 0.5" in random
    subject = Subject(all_kept.method, 1, ({"weight": (1.0,), "density": (0.5,)},), None, False, True)  # type: ignore
    (claim,) = [claim for claim in list_claims(subject) if str(claim) == "as many stay as the density says: 0.5"]
    assert isinstance(claim, Claim)
    with pytest.raises(AssertionError):
        claim.run(Mill(tmp_path))


def test_a_variant_says_whether_an_optional_base_is_there(tmp_path: Path) -> None:
    @merge_method(reads="element", base="optional")
    def either(base: Tensor | None, deltas: list[Tensor]) -> Tensor:
        return deltas[0] if base is None else base

    subject = Subject(either.method, 1, ({},), None, False)  # type: ignore[attr-defined]
    values = [torch.zeros(3), torch.ones(3)]
    assert subject.make_task(values).has_base is False
    assert subject.make_task(values, Based()).has_base is True
    assert len(subject.make_task(values, Based()).inputs) == 2


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(TypeError, match="is no merge method; decorate it with @merge_method"):
        check_method(mean)


def test_claims_are_fields_of_the_subject_that_is_checked() -> None:
    fields = get_type_hints(Subject)
    assert get_type_hints(ClaimKeywords) == {name: fields[name] for name in ClaimKeywords.__annotations__}
