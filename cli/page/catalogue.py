"""What can be written into a recipe: methods with their parameters, keys and dtypes, for help and completion."""

from typing import Any

from mergemill.cli.guide import describe_inputs
from mergemill.cli.methods import as_json, list_method_facts
from mergemill.engine import recipe_schema
from mergemill.engine.methods import find_all_methods, find_coefficients, find_steps, open_methods

DTYPES = ("bfloat16", "float16", "float32", "float64")


def make_catalogue(own: tuple[str, ...]) -> dict[str, Any]:
    """Return methods, steps, keys and dtypes as JSON values. own: files of methods of one's own."""
    schema = recipe_schema()["properties"]
    return {
        "methods": [_describe(method) for method in find_all_methods(open_methods(own)).values()],
        "steps": {"coefficients": list(find_coefficients()), "post": list(find_steps())},
        "keys": {key: shape.get("description", "") for key, shape in schema.items() if key != "methods"},
        "entry_keys": ["model", "parameters", "delta_base"],
        "dtypes": DTYPES,
    }


def _describe(method: Any) -> dict[str, Any]:
    told = as_json(method)
    told["inputs"] = describe_inputs(method)
    told["facts"] = list(list_method_facts(method))
    formula = (method.function.__doc__ or "").partition("\n\n")[0].partition(" Shapes: ")[0]
    told["formula"] = " ".join(formula.replace("``", "").split())
    for parameter in told["parameters"]:
        parameter["default"] = None if parameter["default"] is None else _say_default(parameter["default"])
    return told


def _say_default(value: object) -> str:
    """Return a default as a recipe writes it; of one a model, the first."""
    if isinstance(value, tuple):
        return ", ".join(map(_say_default, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
