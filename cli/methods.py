"""``mergemill methods``: the merge methods there are, and their parameters."""

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergemill.cli import console
from mergemill.cli.options import Json

if TYPE_CHECKING:
    from mergemill.engine.methods.contract import Method, Parameter

Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="A method, to see its parameters.")]

HEADS = ("parameter", "type", "default", "range")


def methods(name: Name = None, json: Json = False) -> None:
    """List the merge methods, or show one of them.

    Example: mergemill methods ties
    """
    from mergemill.engine import find_methods

    known = find_methods()
    if name is None:
        _show_all(list(known.values()), json=json)
        return
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise typer.BadParameter(f"there is no method {name!r}; {hint}")
    _show_one(known[name], json=json)


def _show_all(found: "list[Method]", *, json: bool) -> None:
    if json:
        console.say_json([as_json(method) for method in found])
        return
    rows = [(method.name, describe_inputs(method), method.reads, _say_title(method)) for method in found]
    console.say_table(rows, heads=("method", "models", "reads", "what it does"))


def _show_one(method: "Method", *, json: bool) -> None:
    if json:
        console.say_json(as_json(method))
        return
    console.say(method.title)
    console.say()
    facts = {"models": describe_inputs(method), "reads": method.reads, "source": method.source or "none"}
    console.say_table(list(facts.items()))
    if method.parameters:
        console.say()
        console.say_table([tuple(_parameter_row(parameter)) for parameter in method.parameters], heads=HEADS)


def as_json(method: "Method") -> dict[str, Any]:
    """Return a method as JSON values."""
    return {
        "name": method.name,
        "title": method.title,
        "source": method.source,
        "reads": method.reads,
        "base": method.base,
        "least_inputs": method.least_inputs,
        "most_inputs": method.most_inputs,
        "parameters": [_parameter_json(parameter) for parameter in method.parameters],
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


def describe_inputs(method: "Method") -> str:
    """Say how many models a method takes, and whether one of them is the base."""
    least, most = method.least_inputs, method.most_inputs
    models = f"{least}" if least == most else f"{least} to {most}" if most else f"{least} or more"
    return models + {"none": "", "required": " and a base", "first of two": ", one the base"}[method.base]


def _say_title(method: "Method") -> str:
    """The title without the method's name before the colon, which stands beside it."""
    return method.title.partition(": ")[2] or method.title


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
