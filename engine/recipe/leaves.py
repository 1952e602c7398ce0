"""The single values of a recipe: texts, booleans, counts, dtypes, chat templates, layer ranges, lists.

Each is a type with the check that says its fault in plain words. A check returns what it is given, or the one
spelling that stands for it.
"""

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from mergemill.engine.recipe.faults import describe, make_faults, make_predicate, shorten, suggest

DtypeName = Literal["float32", "float16", "bfloat16", "float64"]
SchemeName = Literal["fp8_block", "mxfp4"]

_SPELLINGS = {
    **{name: name for name in get_args(DtypeName)},
    **dict.fromkeys(("float", "fp32", "f32", "single"), "float32"),
    **dict.fromkeys(("half", "fp16", "f16"), "float16"),
    **dict.fromkeys(("bf16",), "bfloat16"),
    **dict.fromkeys(("double", "fp64", "f64"), "float64"),
}
_NAME = re.compile(r"[\w.-]*\w[\w.-]*", re.ASCII)
CHAT_TEMPLATES = ("auto", "alpaca", "chatml", "llama3", "mistral", "exaone")


def check_text(value: object) -> object:
    """Return a text that is not blank, or the null that stands for an absent key."""
    if value is None:
        return value
    if not isinstance(value, str):
        quotes = "" if isinstance(value, dict | list) else "; put it in quotes"
        raise make_predicate(f"must be text, not {describe(value)}{quotes}")
    if not value.strip():
        raise make_predicate("must not be an empty text")
    return value


def _check_given_text(value: object) -> object:
    if value is None:
        raise make_predicate("must be text; nothing is written here")
    return check_text(value)


def _check_flag(value: object) -> object:
    if not isinstance(value, bool):
        raise make_predicate(f"must be true or false, not {describe(value)}")
    return value


def check_count(value: object, *, least: int, most: int = (1 << 31) - 1) -> object:
    """Return a whole number from `least` to `most`, or the null that stands for an absent key."""
    if value is None:
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise make_predicate(f"must be a whole number, not {describe(value)}")
    if not least <= value <= most:
        raise make_predicate(f"must be from {least} to {most}, not {describe(value)}")
    return value


def check_number(value: object) -> object:
    """Return a number, or the null that stands for an absent key."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise make_predicate(f"must be a number, not {describe(value)}")
    return value


def _check_name(value: object) -> object:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise make_predicate(f"must be a name of letters, digits and ._-, not {describe(value)}")
    return value


def _check_dtype(value: object) -> object:
    """Return a dtype's one name for any of its spellings; case and a leading ``torch.`` do not matter."""
    if value is None:
        return value
    if not isinstance(value, str):
        raise make_predicate(f"must be the name of a dtype, not {describe(value)}")
    spelled = value.lower().removeprefix("torch.")
    if spelled not in _SPELLINGS:
        near = _SPELLINGS.get(_nearest_spelling(spelled), "")
        hint = f"did you mean '{near}'?" if near else f"known: {', '.join(get_args(DtypeName))}"
        raise make_predicate(f"is '{shorten(value)}', an unknown dtype; {hint}")
    return _SPELLINGS[spelled]


def _check_scheme(value: object) -> object:
    """Return the name of a way to quantise."""
    if value is None or value in get_args(SchemeName):
        return value
    if not isinstance(value, str):
        raise make_predicate(f"must name how to quantize, not {describe(value)}")
    raise make_predicate(f"is '{shorten(value)}', which is unknown; known: {', '.join(get_args(SchemeName))}")


def _nearest_spelling(spelled: str) -> str:
    return suggest(spelled, _SPELLINGS).removeprefix("did you mean '").removesuffix("'?")


def _check_chat_template(value: object) -> object:
    """Return a known name, or a text that can be Jinja: one with ``{{`` or ``{%``."""
    check_text(value)
    if isinstance(value, str) and "{{" not in value and "{%" not in value and value not in CHAT_TEMPLATES:
        hint = suggest(value, CHAT_TEMPLATES)
        raise make_predicate(f"is '{shorten(value)}', neither a known name nor a Jinja template; {hint}")
    return value


def _check_methods(value: object) -> object:
    """Return the names of Python files beside the recipe, also where one stands without a list."""
    if value is None:
        return value
    names = check_items([value] if isinstance(value, str) else value)
    assert isinstance(names, list | tuple)
    for place, name in enumerate(names):
        if fault := _find_fault(name):
            raise make_faults([((place,), make_predicate(fault))]) if names is value else make_predicate(fault)
    return tuple(str(PurePosixPath(name)) for name in names)


def _find_fault(name: object) -> str | None:
    """A recipe that is passed on must find its files, and only its own: below its folder, on this disk."""
    if not isinstance(name, str):
        return f"must be the name of a Python file, not {describe(name)}"
    path = PurePosixPath(name)
    if path.suffix == ".py" and not path.is_absolute() and ".." not in path.parts and not set(name) & set(":\\~"):
        return None
    return f"is '{shorten(name)}'; it must be a Python file below the recipe's folder, such as my_methods.py"


def _check_layer_range(value: object) -> tuple[int, int]:
    wanted = "must be two whole numbers [from, to], for example [0, 32]"
    if not isinstance(value, list | tuple):
        raise make_predicate(f"{wanted}, not {describe(value)}")
    if len(value) != 2:
        raise make_predicate(f"{wanted}; here are {len(value)}")
    for end in value:
        if isinstance(end, bool) or not isinstance(end, int) or abs(end) >= 1 << 31:
            raise make_predicate(f"{wanted}, not {describe(end)}")
    first, stop = value
    if not 0 <= first < stop and (first, stop) != (0, 0):  # which is the slice that gives embedding or head alone
        raise make_predicate(f"is [{first}, {stop}] and must be [from, to] with 0 <= from < to")
    return first, stop


def check_items(value: object) -> object:
    """Return a list that has something in it, or the null that stands for an absent key."""
    if value is None:
        return value
    if not isinstance(value, list | tuple):
        raise make_predicate(f"must be a list, not {describe(value)}")
    if not value:
        raise make_predicate("is an empty list and needs at least one item")
    return value


Text = Annotated[str, BeforeValidator(_check_given_text), Field(min_length=1)]
OptionalText = Annotated[str | None, BeforeValidator(check_text)]
Flag = Annotated[bool, BeforeValidator(_check_flag)]
OptionalFlag = Annotated[bool | None, BeforeValidator(lambda value: value if value is None else _check_flag(value))]
OptionalCount = Annotated[int | None, BeforeValidator(lambda value: check_count(value, least=1))]
OptionalTokenId = Annotated[int | None, BeforeValidator(lambda value: check_count(value, least=0))]
StageName = Annotated[str, BeforeValidator(lambda value: value if value is None else _check_name(value))]
OptionalDtype = Annotated[DtypeName | None, BeforeValidator(_check_dtype)]
OptionalScheme = Annotated[SchemeName | None, BeforeValidator(_check_scheme)]
OptionalMethods = Annotated[
    tuple[str, ...] | None, BeforeValidator(_check_methods, json_schema_input_type=str | tuple[str, ...] | None)
]
OptionalChatTemplate = Annotated[str | None, BeforeValidator(_check_chat_template)]
LayerRange = Annotated[tuple[int, int], BeforeValidator(_check_layer_range, json_schema_input_type=tuple[int, int])]
