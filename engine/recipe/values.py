"""A recipe as a frozen value: what is merged, how, and with which settings."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic.json_schema import SkipJsonSchema

from mergemill.engine.recipe.access import OptionalStorageOptions
from mergemill.engine.recipe.faults import make_faults, make_sentence
from mergemill.engine.recipe.leaves import (
    LayerRange,
    OptionalChatTemplate,
    OptionalDtype,
    OptionalFlag,
    OptionalMethods,
    OptionalScheme,
    OptionalText,
    StageName,
    Text,
    check_items,
    check_number,
)
from mergemill.engine.recipe.names import NameMap, Policy, TransposedWeights
from mergemill.engine.recipe.references import ModelRef
from mergemill.engine.recipe.settings import Parameters
from mergemill.engine.recipe.shapes import FrozenMap, Value
from mergemill.engine.recipe.steps import GivenStep, Guard
from mergemill.engine.recipe.vocabulary import Tokenizer, list_sources


class ImportanceOf(Value):
    """How much each weight of a model matters, beside it."""

    called: ClassVar[str] = "an importance"

    model: ModelRef
    """A checkpoint of tensors that are called as the model's: of their shapes, or Gram matrices of a layer's inputs."""


class ModelEntry(Value):
    """A whole model among those that are merged."""

    called: ClassVar[str] = "an item of models"
    elsewhere: ClassVar[Mapping[str, str]] = {"lora": "an adapter stands in the model: '{model: {model: …, lora: …}}'"}

    model: ModelRef
    """The model."""
    delta_base: ModelRef | None = None
    """The model that this one's task vector is taken from, instead of the base model."""
    importance: ImportanceOf | None = None
    """What says how much each of its weights matters, for the methods fisher and regmean: `{model: …}`."""
    parameters: Parameters = Parameters()
    """Settings of this model."""


class Source(Value):
    """Some layers of one model, as an input of a slice."""

    called: ClassVar[str] = "a source"

    model: ModelRef
    """The model that the layers are taken from."""
    layer_range: LayerRange
    """The first layer, and the one after the last: [from, to)."""
    delta_base: ModelRef | None = None
    """The model that this one's task vector is taken from, layer by layer, instead of the base model."""
    importance: ImportanceOf | None = None
    """What says how much each of its weights matters, for the methods fisher and regmean: `{model: …}`."""
    parameters: Parameters = Parameters()
    """Settings of this source."""

    @property
    def layers(self) -> int:
        """How many layers this source gives."""
        return self.layer_range[1] - self.layer_range[0]


class Slice(Value):
    """Layers of the output: as many as each of its sources gives."""

    called: ClassVar[str] = "a slice"

    sources: Annotated[tuple[Source, ...], BeforeValidator(check_items), Field(min_length=1)]
    """The inputs that are merged; all have the same number of layers."""
    base_model: ModelRef | None = None
    """The base of this slice, instead of the recipe's."""
    residual_weight: Annotated[float | None, BeforeValidator(check_number)] = None
    """Does nothing, as in mergekit, whose recipes may hold it; the plan says so."""
    parameters: Parameters = Parameters()
    """Settings of this slice."""

    @property
    def layers(self) -> int:
        """How many layers of the output this slice makes."""
        return self.sources[0].layers

    @model_validator(mode="after")
    def _check_layers(self) -> "Slice":
        faults = [
            (
                ("sources", place, "layer_range"),
                make_sentence(
                    f"layer_range {list(source.layer_range)} has {source.layers} layers,"
                    f" but the slice's first source has {self.layers}"
                ),
            )
            for place, source in enumerate(self.sources)
            if source.layers != self.layers
        ]
        if faults:
            raise make_faults(faults)
        return self


OptionalModels = Annotated[tuple[ModelEntry, ...] | None, BeforeValidator(check_items)]
OptionalSlices = Annotated[tuple[Slice, ...] | None, BeforeValidator(check_items)]


class Module(Value):
    """One named stack of layers of a model that has several; exactly one of `models` and `slices`."""

    called: ClassVar[str] = "a module"
    one_of: ClassVar[tuple[str, ...]] = ("models", "slices")

    models: OptionalModels = None
    """Whole stacks that are merged."""
    slices: OptionalSlices = None
    """The layers of the output's stack, slice after slice."""
    parameters: Parameters = Parameters()
    """Settings of this module."""


class Modules(FrozenMap[Module]):
    """Stacks of layers by name, in the order written."""

    __slots__ = ()

    holds: ClassVar[Any] = Module


def _check_modules(value: object) -> object:
    if isinstance(value, Mapping) and not value:
        raise make_sentence("'modules' is an empty mapping and needs at least one module")
    return value


# Of mergekit's first multi-stage recipes, of its evolve and of bakllama, which come as files of the same look.
_ELSEWHERE = {
    "out_path": "where a result goes is an argument; what another document takes has a 'name'",
    "input_model_parameters": "settings of a model are the 'parameters' beside it",
    "genome": "a genome is searched: mergemill evolve FILE OUT",
    "tasks": "what a search is judged by is its 'objective': mergemill evolve FILE OUT",
    "layer_slices": "mergemill recipe bakllama FILE prints a recipe of it",
}


OTHER_STAGES: dict[str, type[Value]] = {}
"""What a stage may be beside a recipe, by the key that tells it; mixtures, which are made of recipes, enter it."""


def _read_stages(value: object) -> object:
    """Return the documents of a list, each as what its keys say that it is."""
    items = check_items(value)
    return None if items is None else tuple(map(_read_stage, items))  # type: ignore[call-overload]


def _read_stage(value: object) -> object:
    if isinstance(value, Value):
        return value
    keys = value if isinstance(value, Mapping) else ()
    return next((OTHER_STAGES[key] for key in OTHER_STAGES if key in keys), Recipe).model_validate(value)


_STAGES_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["name"]}}


# Of recipes and of mixtures, which are made of these; what each is, its keys say.
Stages = Annotated[tuple[Any, ...] | None, BeforeValidator(_read_stages), WithJsonSchema(_STAGES_SCHEMA)]


class Recipe(Value):
    """A model merge; exactly one of `models`, `slices` and `modules` says what is merged.

    Two recipes are equal where their canonical forms (`recipe_to_json`) are: `text` and `file` do not count.
    """

    called: ClassVar[str] = "a recipe"
    one_of: ClassVar[tuple[str, ...]] = ("models", "slices", "modules")
    elsewhere: ClassVar[Mapping[str, str]] = _ELSEWHERE

    merge_method: Text
    """The name of the merge method."""
    base_model: ModelRef | None = None
    """The model that task vectors are taken from; also the donor of config and tokenizer."""
    models: OptionalModels = None
    """Whole models that are merged."""
    slices: OptionalSlices = None
    """The output's layers, slice after slice."""
    modules: Annotated[Modules | None, BeforeValidator(_check_modules)] = None
    """Models or slices for each named stack of layers."""
    parameters: Parameters = Parameters()
    """Settings that hold everywhere."""
    methods: OptionalMethods = None
    """Python files of merge methods beside the recipe, whose code the merge runs: `my_methods.py`, or a list."""
    coefficients: GivenStep | None = None
    """Factors on the task vectors before the method sees them: `{method: lines | metagpt, …}`."""
    post: Annotated[tuple[GivenStep, ...] | None, BeforeValidator(check_items)] = None
    """Steps after the method, in order: `[{method: svc, alpha: 1.0}]`."""
    name_map: NameMap | None = None
    """What stands for parts of the names of tensors that the donor lacks: `{blocks.: layers.}`, `re:` for patterns."""
    transposed: Annotated[tuple[TransposedWeights, ...] | None, BeforeValidator(check_items)] = None
    """Matrices that a model stores the other way round than the donor: `[{model: org/name, filter: c_attn}]`."""
    match_experts: OptionalFlag = None
    """Whether experts of other mixtures are put into the order of the donor's first, by their routers' rows."""
    policy: Annotated[tuple[Policy, ...] | None, BeforeValidator(check_items)] = None
    """What is not merged, the first that matches: `[{filter: vision, action: copy, model: org/name}]`."""
    guard: Guard | None = None
    """What happens to tensors that come out broken; the default warns."""
    dtype: OptionalDtype = None
    """The dtype of the merge, and of the output where `out_dtype` says nothing else."""
    out_dtype: OptionalDtype = None
    """The dtype that is written."""
    quantize: OptionalScheme = None
    """How the result is quantised: `fp8_block`, or `mxfp4` for gpt-oss; the dtype is then that of the rest."""
    tokenizer: Tokenizer | None = None
    """How the vocabulary is made; not together with `tokenizer_source`."""
    chat_template: OptionalChatTemplate = None
    """`auto`, a built-in name (alpaca, chatml, llama3, mistral, exaone), or a Jinja template."""
    storage_options: OptionalStorageOptions = None
    """How storage is reached, by the scheme of its URLs, without secrets: `{s3: {profile: team, endpoint_url: …}}`."""
    name: StageName | None = None
    """What the other documents of the file call the result of this one."""
    stages: Stages = None
    """Merges and mixtures by name, whose results stand where a model may; in a file they are its other documents."""
    keep: OptionalText = None
    """Where a stage is written too, by a merge of its own before that of the result: a folder or a URL."""
    round_stages: OptionalFlag = None
    """Whether a stage's tensors are rounded to the dtypes that its file would have, for the bytes of one by one."""
    text: Annotated[SkipJsonSchema[str], Field(exclude=True, repr=False)] = ""
    """The recipe file's text as it was read; empty for a recipe made in Python."""
    file: Annotated[SkipJsonSchema[str], Field(exclude=True, repr=False)] = ""
    """The name that messages give the file."""

    @model_validator(mode="before")
    @classmethod
    def _read_tokenizer_source(cls, data: Any) -> Any:
        """Write ``tokenizer_source: x`` as ``tokenizer: {source: x}``, so that one field says it."""
        if not isinstance(data, Mapping) or "tokenizer_source" not in data:
            return data
        rest = {key: value for key, value in data.items() if key != "tokenizer_source"}
        if data["tokenizer_source"] is None:
            return rest
        if rest.get("tokenizer") is not None:
            later = [key for key in data if key in ("tokenizer", "tokenizer_source")][-1]
            words = "a recipe has at most one of tokenizer and tokenizer_source; both are here"
            raise make_faults([((later,), make_sentence(words))])
        return rest | {"tokenizer": {"source": data["tokenizer_source"]}}

    @classmethod
    def known_keys(cls) -> list[str]:
        """Return the keys that a user may write."""
        return [*super().known_keys(), "tokenizer_source"]

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        """Its models, in the order in which it has them; an unlisted base model follows them.

        At last come those that only the vocabulary needs.
        """
        refs = [*_entries(self.models), *_sources(self.slices)]
        for module in (self.modules or {}).values():
            refs += [*_entries(module.models), *_sources(module.slices)]
        base = [] if self.base_model is None else [self.base_model]
        return (*refs, *base, *([] if self.tokenizer is None else list_sources(self.tokenizer)))

    @property
    def storage(self) -> dict[str, dict[str, Any]]:
        """The storage options as plain values."""
        return {scheme: dict(options) for scheme, options in (self.storage_options or {}).items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._canonical() == other._canonical()

    def __hash__(self) -> int:
        return hash(self._canonical())

    def _canonical(self) -> str:
        return self.model_dump_json(exclude_none=True)


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """Return the canonical form: JSON that parses to an equal recipe and is the same for equal recipes."""
    return recipe.model_dump(mode="json", exclude_none=True)


def _entries(models: Sequence[ModelEntry] | None) -> Iterator[ModelRef]:
    return (ref for entry in models or () for ref in (entry.model, entry.delta_base) if ref is not None)


def _sources(slices: Sequence[Slice] | None) -> Iterator[ModelRef]:
    for part in slices or ():
        for source in part.sources:
            yield from (ref for ref in (source.model, source.delta_base) if ref is not None)
        if part.base_model is not None:
            yield part.base_model
