"""What comes before and after the merge method: coefficients, steps, and the guard that watches the result."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from mergemill.engine.recipe.faults import describe, make_predicate, make_sentence, shorten, suggest
from mergemill.engine.recipe.leaves import Text
from mergemill.engine.recipe.settings import Parameters
from mergemill.engine.recipe.shapes import Value

POLICIES = ("warn", "keep-base", "fail")
GROWTH = 10.0


class GivenStep(Value):
    """One step by its name and its settings, side by side: ``{method: lines, alpha: 0.3, beta: 0.7}``."""

    called: ClassVar[str] = "a step"

    method: Text
    """The name of the step's method."""
    parameters: Parameters = Parameters()
    """Its settings; in a recipe they stand beside `method`."""

    @classmethod
    def _name_keys(cls) -> str:
        return "the key method and its settings"

    @model_validator(mode="before")
    @classmethod
    def _gather_parameters(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if "method" not in data:
            raise make_sentence(f"{cls.called} needs the key 'method'")
        rest = {key: value for key, value in data.items() if key != "method"}
        return {"method": data["method"], "parameters": rest}

    @model_serializer(mode="wrap")
    def _dump_flat(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped = dump(self)
        return {"method": dumped["method"], **dumped["parameters"]}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        written = handler.resolve_ref_schema(handler(schema))
        return {
            **written,
            "properties": {"method": written["properties"]["method"]},
            "additionalProperties": written["properties"]["parameters"]["additionalProperties"],
        }


def _check_policy(value: object) -> object:
    if not isinstance(value, str) or value not in POLICIES:
        hint = suggest(str(value), POLICIES)
        shown = f"'{shorten(value)}'" if isinstance(value, str) else describe(value)
        raise make_predicate(f"is {shown}, and must be one of {', '.join(POLICIES)}; {hint}")
    return value


def _check_growth(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise make_predicate(f"must be a number above 0, not {describe(value)}")
    return float(value)


class Guard(Value):
    """What happens to a tensor of the output that holds NaN or infinities, or changes far more than its inputs do."""

    called: ClassVar[str] = "a guard"

    policy: Annotated[Literal["warn", "keep-base", "fail"], BeforeValidator(_check_policy)] = "warn"
    """`warn` at the end, write the base's tensor instead (`keep-base`), or `fail` before the commit."""
    growth: Annotated[float, BeforeValidator(_check_growth), Field(gt=0)] = GROWTH
    """The most that a tensor's change may be, as a multiple of the largest change among its inputs."""
