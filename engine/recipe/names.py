"""What a recipe says of tensors by their names: what others call them, and which of them are not merged."""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from mergemill.engine.recipe.faults import describe, make_faults, make_predicate, make_sentence, shorten, suggest
from mergemill.engine.recipe.references import ModelRef
from mergemill.engine.recipe.settings import REGEX, check_filter, matches_filter
from mergemill.engine.recipe.shapes import FrozenMap, Value

ACTIONS = ("merge", "copy", "drop")


def _check_other(value: object) -> object:
    if not isinstance(value, str):
        raise make_predicate(f"must be text, not {describe(value)}; put it in quotes")
    return value


Other = Annotated[str, BeforeValidator(_check_other, json_schema_input_type=str)]


class NameMap(FrozenMap[Other]):
    """Parts of names, or `re:` and a regular expression, and what stands in their place; one after the other."""

    __slots__ = ()

    holds: ClassVar[Any] = Other

    def __init__(self, items: dict[str, str] | None = None) -> None:
        super().__init__(items)
        for part, other in self.items():
            if fault := _find_fault(part, other):
                raise make_faults([((part,), make_predicate(fault))])


def _find_fault(part: str, other: str) -> str | None:
    if not part.startswith(REGEX):
        return None
    try:
        re.sub(part.removeprefix(REGEX), other, "")
    except (re.error, IndexError, OverflowError, RecursionError) as error:
        return f"with '{shorten(other)}' is no substitution of a regular expression: {error}"
    return None


def _check_action(value: object) -> object:
    if not isinstance(value, str) or value not in ACTIONS:
        shown = f"'{shorten(value)}'" if isinstance(value, str) else describe(value)
        raise make_predicate(f"is {shown}, and must be one of {', '.join(ACTIONS)}; {suggest(str(value), ACTIONS)}")
    return value


class Policy(Value):
    """What becomes of the tensors whose names pass a filter; of several the first that matches holds."""

    called: ClassVar[str] = "a policy"

    filter: Annotated[str | None, BeforeValidator(check_filter)] = None
    """A part of the output tensor's name, or `re:` and a regular expression; absent or `*` matches all."""
    action: Annotated[Literal["merge", "copy", "drop"], BeforeValidator(_check_action)]
    """`merge` as the method says, `copy` from one model, or `drop`: the output lacks it."""
    model: ModelRef | None = None
    """Of `copy`: one of the recipe's models; by default the donor, whose config the output has."""

    @model_validator(mode="after")
    def _check_model(self) -> "Policy":
        if self.model is not None and self.action != "copy":
            raise make_faults([(("model",), make_sentence(f"'model' is of copy alone, not of {self.action}"))])
        return self

    def matches(self, tensor_name: str) -> bool:
        """Whether this holds for the output tensor of that name."""
        return matches_filter(self.filter, tensor_name)


class TransposedWeights(Value):
    """Matrices that one model stores [in, out], where the donor, whose layout the output has, stores [out, in]."""

    called: ClassVar[str] = "a rule of transposed"

    model: ModelRef
    """One of the recipe's models, not the donor."""
    filter: Annotated[str | None, BeforeValidator(check_filter)] = None
    """A part of the output tensor's name, or `re:` and a regular expression; absent or `*` matches all its matrices."""

    def matches(self, tensor_name: str) -> bool:
        """Whether this is of the output tensor of that name."""
        return matches_filter(self.filter, tensor_name)
