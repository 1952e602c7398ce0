"""A method's signature is its whole contract, and the folder is the list of methods."""

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

from mergemill.engine.errors import PlanError
from mergemill.engine.methods import catalogue
from mergemill.engine.methods.catalogue import find_methods, get_method, methods_of
from mergemill.engine.methods.contract import Density, Method, Parameter, PerModel, Within, merge_method

SEVEN = ["dare_linear", "dare_ties", "linear", "passthrough", "slerp", "task_arithmetic", "ties"]


@merge_method(reads="element", base="required", inputs=(2, 5), extra_slabs=9)
def everything(
    base: Tensor,
    deltas: list[Tensor],
    *,
    weight: PerModel[float],
    density: PerModel[Density] = (1.0,),
    share: PerModel[float | None] = (None,),
    steps: int = 10,
    t: float,
    limit: Density = 0.5,
    normalize: bool = True,
    lambda_: float = 1.0,
    keep_: float = 2.0,
) -> Tensor:
    """Return nothing of use."""
    return base.add_(deltas[0].mul_(weight[0] * lambda_))


METHOD: Method = everything.method  # type: ignore[attr-defined]
PARAMETERS = {parameter.argument: parameter for parameter in METHOD.parameters}


def test_the_signature_is_the_contract() -> None:
    assert (METHOD.name, METHOD.reads, METHOD.base) == ("everything", "element", "required")
    assert METHOD.given == ("base", "deltas")
    assert METHOD.takes_deltas
    assert (METHOD.least_inputs, METHOD.most_inputs, METHOD.extra_slabs) == (2, 5, 9)
    assert [parameter.argument for parameter in METHOD.parameters] == [
        "weight", "density", "share", "steps", "t", "limit", "normalize", "lambda_", "keep_",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "parameter",
    [
        Parameter("weight", "weight", float, True, True, None, None),
        Parameter("density", "density", float, True, False, 1.0, Within(0, 1)),
        Parameter("share", "share", float, True, False, None, None),
        Parameter("steps", "steps", int, False, False, 10, None),
        Parameter("t", "t", float, False, True, None, None),
        Parameter("limit", "limit", float, False, False, 0.5, Within(0, 1)),
        Parameter("normalize", "normalize", bool, False, False, True, None),
        Parameter("lambda", "lambda_", float, False, False, 1.0, None),
        Parameter("keep_", "keep_", float, False, False, 2.0, None),
    ],
    ids=lambda parameter: parameter.argument,
)
def test_a_parameter_is_read_from_the_signature(parameter: Parameter) -> None:
    assert PARAMETERS[parameter.argument] == parameter


def test_the_function_itself_stays_as_it_is() -> None:
    assert inspect.isfunction(everything)
    assert METHOD.function is everything


def test_an_unknown_input_is_a_type_error_that_lists_the_known() -> None:
    def wrong(models: list[Tensor], wieghts: list[float]) -> Tensor:
        return models[0]

    with pytest.raises(
        TypeError,
        match="wrong: unknown input 'wieghts'; a method takes models, deltas, importances, base, statistics, place",
    ):
        merge_method(reads="element")(wrong)


@pytest.mark.parametrize(
    ("within", "text", "inside", "outside"),
    [
        (Within(0, 1), "from 0 to 1", (0, 0.5, 1), (-0.1, 1.1)),
        (Within(0), "at least 0", (0, 1e9), (-1,)),
        (Within(most=3), "at most 3", (-1e9, 3), (3.1,)),
    ],
)
def test_a_range_is_closed_and_says_so(
    within: Within, text: str, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    assert str(within) == text
    assert all(map(within.holds, inside))
    assert not any(map(within.holds, outside))
    assert not within.holds(float("nan"))


def test_the_registry_finds_every_method_of_the_folder() -> None:
    folder = Path(catalogue.__file__).parent
    files = {path: path.read_text() for path in folder.glob("*.py") if path.name != "contract.py"}
    written = [
        name for text in files.values() for name in re.findall(r"\n@merge_method\(.*?\ndef (\w+)", text, re.DOTALL)
    ]
    assert sorted(written) == list(find_methods())
    assert set(SEVEN) <= set(written)
    assert list(find_methods()) == sorted(find_methods())


def test_a_module_gives_only_methods_that_it_defines() -> None:
    module = ModuleType(everything.__module__)
    module.everything = everything  # type: ignore[attr-defined]
    assert list(methods_of(module)) == [METHOD]
    borrowed = ModuleType("elsewhere")
    borrowed.everything = everything  # type: ignore[attr-defined]
    assert list(methods_of(borrowed)) == []


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(PlanError, match="unknown merge_method 'dare_linaer'; did you mean 'dare_linear'"):
        get_method("dare_linaer")


def test_an_unknown_method_near_none_lists_all() -> None:
    with pytest.raises(PlanError, match=f"unknown merge_method 'qqq'; there are {', '.join(find_methods())}"):
        get_method("qqq")


@pytest.mark.parametrize("name", find_methods())
def test_every_method_says_what_it_is_and_where_it_is_from(name: str) -> None:
    method = get_method(name)
    assert method.title.endswith(".")
    assert len(method.source) > 20
    assert method.function.__doc__


@pytest.mark.parametrize("name", find_methods())
def test_every_parameter_is_typed(name: str) -> None:
    assert all(parameter.kind in (float, int, bool) for parameter in get_method(name).parameters)


def test_the_parameters_of_the_specification() -> None:
    """spec/methods.md: name, per model (*), default (! required)."""
    written = {
        name: [
            f"{p.name}{'*' if p.per_model else ''} {'!' if p.required else p.default}"
            for p in sorted(get_method(name).parameters, key=lambda p: p.name)
        ]
        for name in SEVEN
    }
    sparse = ["density* 1.0", "lambda 1.0"]
    assert written == {
        "linear": ["normalize True", "weight* !"],
        "slerp": ["t !"],
        "passthrough": ["scale* None"],
        "task_arithmetic": ["lambda 1.0", "normalize False", "weight* !"],
        "ties": [*sparse, "normalize True", "rescale False", "weight* !"],
        "dare_linear": [*sparse, "normalize False", "rescale True", "weight* !"],
        "dare_ties": [*sparse, "normalize False", "rescale True", "weight* !"],
    }
