"""``mergemill methods``: the merge methods there are, their parameters, and what they cost for a given model."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergemill.cli import console
from mergemill.cli.completion import complete_around
from mergemill.cli.guide import describe_inputs, make_guide
from mergemill.cli.options import Json, Methods

if TYPE_CHECKING:
    from mergemill.engine import values
    from mergemill.engine.methods import Coefficients, Method, Parameter, Step

    Around = Coefficients | Step  # around a method

Name = Annotated[
    str | None,
    typer.Argument(metavar="[NAME]", help="A method, to see its parameters.", autocompletion=complete_around),
]
Model = Annotated[str | None, typer.Option(metavar="PATH", help="A model; what the method takes for such.")]
Guide = Annotated[bool, typer.Option("--guide", help="A page: which method when, on what evidence, at what cost.")]
Models = Annotated[int | None, typer.Option(min=1, metavar="N", help="How many such models, beside a base.")]

HEADS = ("parameter", "type", "default", "range")
KINDS = {
    "element": "each element by itself",
    "gram": "the inner products of the whole tensors first",
    "rank": "the order of magnitudes in the whole tensor first",
    "sums": "sums over the whole tensor first",
    "row": "whole rows",
    "matrix": "the whole matrix at once",
}
SLABS = {"block": "a few blocks of elements", "row": "whole rows", "tensor": "the whole tensor"}
STEPS = {"coefficients": "coefficients, before a method", "post": "post, after a method"}


def methods(
    name: Name = None,
    model: Model = None,
    models: Models = None,
    own: Methods = None,
    guide: Guide = False,
    json: Json = False,
) -> None:
    """List the merge methods, or show one of them.

    Example: mergemill methods ties --model models/base --models 3
    """
    from mergemill.engine.methods import find_all_methods, open_methods

    known, steps = find_all_methods(open_methods(own or ())), _find_steps()
    if guide:
        if name is not None or model is not None:
            raise typer.BadParameter("--guide is for all methods: mergemill methods --guide")
        if json:
            raise typer.BadParameter("--guide is a page to read; its facts are in: mergemill methods --json")
        for line in make_guide(list(known.values()), steps).splitlines():
            console.say(line)
    elif name is None:
        if model is not None:
            raise typer.BadParameter("--model is for one method: mergemill methods NAME --model PATH")
        _show_all(list(known.values()), steps, json=json)
    elif name in known:
        _show_one(known[name], model, models, json=json)
    elif name in steps:
        if model is not None:
            raise typer.BadParameter(f"{name} is no method of its own; --model is for methods")
        _show_step(*steps[name], json=json)
    else:
        near = difflib.get_close_matches(name, [*known, *steps], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join([*known, *steps])}"
        raise typer.BadParameter(f"there is no method {name!r}; {hint}")


def _find_steps() -> "dict[str, tuple[str, Around]]":
    """Return what goes around a method, by name: the recipe's key, and the step."""
    from mergemill.engine.methods import find_coefficients, find_steps

    before: dict[str, tuple[str, Around]] = {
        name: ("coefficients", found) for name, found in find_coefficients().items()
    }
    return before | {name: ("post", found) for name, found in find_steps().items()}


def _show_all(found: "Sequence[Method]", steps: "dict[str, tuple[str, Around]]", *, json: bool) -> None:
    if json:
        console.say_json([*(as_json(method) for method in found), *(_step_json(*step) for step in steps.values())])
        return
    rows: list[tuple[str, ...]] = [
        (method.name, describe_inputs(method), method.reads, _say_title(method.title)) for method in found
    ]
    rows += [(name, STEPS[key], "", _say_title(step.title)) for name, (key, step) in steps.items()]
    console.say_table(rows, heads=("method", "models", "reads", "what it does"))


def _show_one(method: "Method", model: str | None, models: int | None, *, json: bool) -> None:
    from mergemill.engine import estimate_cost

    cost = estimate_cost(method, model, models=models) if model is not None else None
    if json:
        console.say_json(as_json(method) | ({} if cost is None else {"cost": asdict(cost)}))
        return
    console.say(method.title)
    console.say()
    console.say_table(list(list_method_facts(method)))
    _show_parameters(method.parameters)
    if cost is not None:
        console.say()
        console.say_table(list(_cost_rows(cost)))


def _show_step(key: str, step: "Around", *, json: bool) -> None:
    if json:
        console.say_json(_step_json(key, step))
        return
    console.say(step.title)
    console.say()
    console.say_table([("in a recipe", STEPS[key])])
    _show_parameters(step.parameters)


def _show_parameters(parameters: "Sequence[Parameter]") -> None:
    if parameters:
        console.say()
        console.say_table([tuple(_parameter_row(parameter)) for parameter in parameters], heads=HEADS)


def list_method_facts(method: "Method") -> Iterator[tuple[str, str]]:
    """Yield what a method takes and costs, and where it is from, as names and values."""
    yield "models", describe_inputs(method)
    yield "reads", f"{method.reads}: {KINDS[method.reads]}"
    yield "in memory", _say_grain(method)
    yield "passes", _say_passes(method.most_rounds + 1)
    yield "source", method.source or "none"
    if method.purpose:
        yield "for", method.purpose
    if method.evidence:
        yield "evidence", method.evidence


def _say_grain(method: "Method") -> str:
    grain = "changing" if callable(method.grain) else method.grain
    return SLABS.get(grain, "as the tensor's shape and the settings ask: see --model")


def _say_passes(passes: int) -> str:
    if passes == 1:
        return "1 over the inputs"
    return f"{passes} over the inputs, at most: {passes - 1} for what must be known of the whole tensor, 1 to merge"


def _cost_rows(cost: "values.Cost") -> Iterator[tuple[str, str]]:
    from mergemill.engine import format_size

    yield "merging", f"{console.count(cost.models, 'model')} like it{' and a base' if cost.base else ''}"
    yield "largest tensor", f"{cost.tensor}, {cost.dtype} {list(cost.shape)}, in {console.count(cost.parts, 'part')}"
    yield "in memory", SLABS[cost.slab]
    passes = f"; its inputs are read {cost.passes} times at most" if cost.passes > 1 else ""
    yield "streamed", f"{format_size(cost.stream_bytes)} a task{passes}"
    if cost.keep_bytes is not None:
        yield "kept", f"{format_size(cost.keep_bytes)} a task; its inputs are read once"
    elif cost.passes > 1:
        yield "kept", "not: it is cut over several parts, whose inputs are read in each pass"
    yield "least --memory", f"{cost.least_bytes} bytes ({format_size(cost.least_bytes)}), for {cost.least_tensor}"


def as_json(method: "Method") -> dict[str, Any]:
    """Return a method as JSON values."""
    return {
        "name": method.name,
        "kind": "method",
        "title": method.title,
        "source": method.source,
        "purpose": method.purpose,
        "evidence": method.evidence,
        "reads": method.reads,
        "grain": None if callable(method.grain) else method.grain,
        "passes": method.most_rounds + 1,
        "base": method.base,
        "least_inputs": method.least_inputs,
        "most_inputs": method.most_inputs,
        "parameters": [_parameter_json(parameter) for parameter in method.parameters],
    }


def _step_json(key: str, step: "Around") -> dict[str, Any]:
    parameters = [_parameter_json(parameter) for parameter in step.parameters]
    return {
        "name": step.name,
        "kind": key,
        "title": step.title,
        "purpose": step.purpose,
        "evidence": step.evidence,
        "parameters": parameters,
    }


def _parameter_json(parameter: "Parameter") -> dict[str, Any]:
    return {
        "name": parameter.name,
        "type": parameter.kind.__name__,
        "per_model": parameter.per_model,
        "required": parameter.required,
        "default": parameter.default,
        "range": str(parameter.within) if parameter.within else None,
    }


def _say_title(title: str) -> str:
    """The title without the method's name before the colon, which stands beside it."""
    return title.partition(": ")[2] or title


def _parameter_row(parameter: "Parameter") -> Iterator[str]:
    yield parameter.name
    yield parameter.kind.__name__ + (", per model" if parameter.per_model else "")
    yield "required" if parameter.required else _say_default(parameter.default)
    yield str(parameter.within or "")


def _say_default(default: object) -> str:
    """A default as a recipe would write it."""
    if default is None:
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)
