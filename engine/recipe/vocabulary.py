"""How the output's vocabulary is made: its source, and the rows of single tokens."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from mergemill.engine.recipe.faults import describe, make_faults, make_predicate, shorten, suggest
from mergemill.engine.recipe.leaves import Flag, OptionalCount, OptionalText, OptionalTokenId, Text
from mergemill.engine.recipe.references import ModelRef
from mergemill.engine.recipe.shapes import FrozenMap, Value


class ZeroRow(Value):
    """A row of zeros."""

    called: ClassVar[str] = "a token's source"

    kind: Literal["zero"] = "zero"


class ModelRow(Value):
    """The row of one token of one model; exactly one of `token` and `token_id`."""

    called: ClassVar[str] = "a token's source of kind model_token"
    one_of: ClassVar[tuple[str, ...]] = ("token", "token_id")

    kind: Literal["model_token"] = "model_token"
    model: ModelRef
    """The model that has the row."""
    token: OptionalText = None
    """The token in that model's vocabulary."""
    token_id: OptionalTokenId = None
    """The token's id in that model's vocabulary."""


_KINDS: Mapping[str, type[ZeroRow | ModelRow]] = {"zero": ZeroRow, "model_token": ModelRow}


def _check_token_source(value: object) -> ModelRef | ZeroRow | ModelRow | None:
    if value is None or isinstance(value, ModelRef | ZeroRow | ModelRow):
        return value
    if not isinstance(value, Mapping) or "kind" not in value:
        return ModelRef.model_validate(value)
    kind = value["kind"]
    if not isinstance(kind, str):
        raise make_faults([(("kind",), make_predicate(f"must be zero or model_token, not {describe(kind)}"))])
    if kind not in _KINDS:
        words = f"is '{shorten(kind)}', an unknown kind of row; {suggest(kind, _KINDS)}"
        raise make_faults([(("kind",), make_predicate(words))])
    return _KINDS[kind].model_validate(value)


def _check_tokenizer_source(value: object) -> Literal["union", "base"] | ModelRef:
    if value is None or value == "union":
        return "union"
    if isinstance(value, str):
        value = value.removeprefix("model:")  # as mergekit once had it
    return "base" if value == "base" else ModelRef.model_validate(value)


TokenSource = ModelRef | ZeroRow | ModelRow
TokenizerSource = Literal["union", "base"] | ModelRef


class Token(Value):
    """Where the rows of one token come from."""

    called: ClassVar[str] = "a token"

    source: Annotated[
        TokenSource | None,
        BeforeValidator(_check_token_source, json_schema_input_type=TokenSource | None),
    ] = None
    """A model (its row of this token), `{kind: zero}`, or `{kind: model_token, model, token | token_id}`."""
    force: Flag = False
    """Give the row to every input, also to those that have the token."""


class Tokens(FrozenMap[Token]):
    """Single tokens by their text, in the order written."""

    __slots__ = ()

    holds: ClassVar[Any] = Token


class Missing(Value):
    """How rows of tokens that a model lacks are made of its own rows; the words are those of a transplant."""

    called: ClassVar[str] = "missing"

    method: Text = "omp"
    """Of `mergemill transplant --method`; not mp_rope."""
    k: OptionalCount = None
    """Rows that a new one is made of, 64 at most by default."""
    metric: OptionalText = None
    """Of common_interpolation: `euclidean` or `cosine`."""
    weights: OptionalText = None
    """Of common_interpolation: `distance_proportional`, `barycentric` or `least_squares`."""
    subword: OptionalText = None
    """Of subword: `mean`, `sum`, `weighted_mean` or `first_last`."""


class Tokenizer(Value):
    """How the output's vocabulary is made; `tokenizer_source: x` is read as ``{source: x}``."""

    called: ClassVar[str] = "a tokenizer"

    source: Annotated[
        TokenizerSource,
        BeforeValidator(_check_tokenizer_source, json_schema_input_type=TokenizerSource | None),
    ] = "union"
    """`union`, `base`, or a model."""
    tokens: Tokens = Tokens()
    """Single tokens whose rows are configured."""
    pad_to_multiple_of: OptionalCount = None
    """Pad the vocabulary with rows until its size is a multiple of this."""
    missing: Missing | None = None
    """Make rows of tokens that a model lacks of its own rows, instead of taking those of another model."""


def list_sources(tokenizer: Tokenizer) -> list[ModelRef]:
    """Return the models that a tokenizer names, in its order."""
    named = [tokenizer.source, *(token.source for token in tokenizer.tokens.values())]
    refs = [each.model if isinstance(each, ModelRow) else each for each in named]
    return [ref for ref in refs if isinstance(ref, ModelRef)]
