"""A mixture of experts as a frozen value: a document with `experts:`, whose words are those of mergekit-moe.

Words of ours beside them: `count`, `reinit` and `prompts_file` of an expert, `contrast`, `gates`, `layout` and
`granularity`. An architecture is what begins as mergekit's names for them do: ``qwen`` is Qwen2 and Qwen3, the first
that fits.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe.access import OptionalStorageOptions
from mergemill.engine.recipe.faults import describe, make_faults, make_predicate, make_sentence, shorten, suggest
from mergemill.engine.recipe.leaves import (
    OptionalDtype,
    OptionalFlag,
    OptionalText,
    StageName,
    check_count,
    check_items,
    check_number,
)
from mergemill.engine.recipe.references import ModelRef
from mergemill.engine.recipe.shapes import Value
from mergemill.engine.recipe.values import OTHER_STAGES, Recipe, Stages
from mergemill.engine.storage.bounds import PROMPTS_BYTES
from mergemill.engine.storage.regular import read_regular

GATE_MODES = (
    "hidden",
    "hidden_last",
    "hidden_avg",
    "router_input",
    "cheap_embed",
    "random",
    "uniform_random",
    "file",
)
DRAWN = ("random", "uniform_random")  # which need no prompts; nor does "file"
LAYOUTS = ("separate", "packed")
ARCHITECTURES = {"mixtral": "mixtral", "deepseek": "deepseek moe", "qwen": "qwen moe", "qwen3": "qwen3 moe"}
"""Our names, and mergekit's in small letters."""
PROMPTED = "positive_prompts or prompts_file"


def _check_word(value: object, known: tuple[str, ...]) -> object:
    if not isinstance(value, str) or value not in known:
        shown = f"'{shorten(value)}'" if isinstance(value, str) else describe(value)
        raise make_predicate(f"is {shown}, and must be one of {', '.join(known)}; {suggest(str(value), known)}")
    return value


def _check_mode(value: object) -> object:
    return "hidden" if value in (None, "hidden_last") else _check_word(value, GATE_MODES)


def _check_architecture(value: object) -> object:
    """Return the name in small letters: what any of the architectures begins with."""
    if value is None:
        return value
    spelt = str(value).lower().strip()
    names = (*ARCHITECTURES, *ARCHITECTURES.values())
    if isinstance(value, str) and spelt and any(name.startswith(spelt) for name in names):
        return spelt
    shown = f"'{shorten(value)}'" if isinstance(value, str) else describe(value)
    raise make_predicate(
        f"is {shown}, and must be one of {', '.join(ARCHITECTURES)}; {suggest(spelt, [*ARCHITECTURES])}"
    )


def _check_prompts(value: object) -> object:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise make_predicate(f"must be a list of texts, not {describe(value)}")
    for place, prompt in enumerate(value):
        if not isinstance(prompt, str) or not prompt.strip():
            raise make_faults([((place,), make_predicate(f"must be text, not {describe(prompt)}"))])
    return tuple(value)


def _check_number(value: object, least: float, most: float, default: float) -> object:
    if value is None:
        return default
    check_number(value)
    if not least <= float(value) <= most:  # type: ignore[arg-type]
        within = f"from {least:g} to {most:g}" if most < float("inf") else f"a number from {least:g} on"
        raise make_predicate(f"must be {within}, not {describe(value)}")
    return float(value)  # type: ignore[arg-type]


_HUGE = 3.0e38  # of float32

Prompts = Annotated[tuple[str, ...], BeforeValidator(_check_prompts)]
Noise = Annotated[float, BeforeValidator(lambda value: _check_number(value, 0.0, _HUGE, 0.0))]
Factor = Annotated[float, BeforeValidator(lambda value: _check_number(value, -_HUGE, _HUGE, 1.0))]
Share = Annotated[float, BeforeValidator(lambda value: _check_number(value, 0.0, 1.0, 0.0))]


_MOST = 4096  # experts, or parts of one: what stands for a typing error would fill the memory with tensors of a plan


def _check_count(default: int) -> BeforeValidator:
    return BeforeValidator(lambda value: check_count(default if value is None else value, least=1, most=_MOST))


Count = Annotated[int, _check_count(1)]


class Expert(Value):
    """A model whose MLPs become an expert."""

    called: ClassVar[str] = "an expert"

    source_model: ModelRef
    """The model."""
    positive_prompts: Prompts = ()
    """Texts that this expert is for."""
    negative_prompts: Prompts = ()
    """Texts that it is not for."""
    prompts_file: OptionalText = None
    """A file of further positive prompts: one a line, or JSONL with `text`."""
    noise_scale: Noise = 0.0
    """The standard deviation of noise on all of its matrices."""
    residual_scale: Factor = 1.0
    """What its last matrices are multiplied by."""
    reinit: Share = 0.0
    """The share of its intermediate channels that are drawn anew (Drop-Upcycling)."""
    count: Count = 1
    """How many such experts there are, each with noise of its own."""


OptionalExperts = Annotated[tuple[Expert, ...], BeforeValidator(lambda value: () if value is None else value)]


class Mixture(Value):
    """A mixture of experts; the base model gives all but the experts."""

    called: ClassVar[str] = "a mixture"

    base_model: ModelRef
    """The model that attention, norms, embeddings, config and tokenizer are taken from."""
    experts: Annotated[tuple[Expert, ...], BeforeValidator(check_items), Field(min_length=1)]
    """The experts, in this order."""
    shared_experts: OptionalExperts = ()
    """Experts that are always active, where the architecture has such."""
    gate_mode: Annotated[str, BeforeValidator(_check_mode)] = "hidden"
    """How the router is made: hidden, hidden_avg, router_input, cheap_embed, random, uniform_random, file."""
    contrast: OptionalFlag = None
    """Whether the mean of all experts' vectors is subtracted from each, before they become rows of the router."""
    gates: OptionalText = None
    """Of gate_mode file: a file of gates, such as `gates.safetensors` of an earlier mixture."""
    experts_per_token: Annotated[
        int, BeforeValidator(lambda value: 2 if value is None else check_count(value, least=1))
    ] = 2
    """How many experts work on a token."""
    granularity: Count = 1
    """Into how many experts each MLP is cut, of as many times fewer channels; as many times more work on a token."""
    architecture: Annotated[str | None, BeforeValidator(_check_architecture)] = None
    """mixtral, deepseek, qwen or qwen3; by default the first that fits."""
    layout: Annotated[
        Literal["separate", "packed"] | None, BeforeValidator(lambda value: value and _check_word(value, LAYOUTS))
    ] = None
    """separate: a tensor for each expert, which all loaders read; packed: one for all, as transformers 5 has them."""
    dtype: OptionalDtype = None
    """The dtype that is written; by default the base model's."""
    storage_options: OptionalStorageOptions = None
    """How storage is reached, by the scheme of its URLs, without secrets: `{s3: {profile: team}}`."""
    name: StageName | None = None
    """What the other documents of the file would call it."""
    keep: OptionalText = None
    """Where a stage is written too, by a merge of its own before that of the result."""
    stages: Stages = None
    """Merges and mixtures by their names, which stand where a model may; in a file they are its other documents."""
    round_stages: OptionalFlag = None
    """Whether a stage's tensors are rounded to the dtypes that its file would have."""
    text: Annotated[SkipJsonSchema[str], Field(exclude=True, repr=False)] = ""
    """The file's text as it was read; empty for a mixture made in Python."""
    file: Annotated[SkipJsonSchema[str], Field(exclude=True, repr=False)] = ""
    """The name that messages give the file."""

    guard: ClassVar[None] = None
    quantize: ClassVar[None] = None
    methods: ClassVar[None] = None

    @model_validator(mode="after")
    def _check(self) -> "Mixture":
        experts = sum(expert.count for expert in self.experts)
        if self.experts_per_token > experts:
            words = f"'experts_per_token' is {self.experts_per_token}, and there are {experts} experts"
            raise make_faults([(("experts_per_token",), make_sentence(words))])
        if (self.gates is not None) != (self.gate_mode == "file"):
            words = "'gates' names the file of gate_mode: file, and goes with no other mode"
            raise make_faults([(("gates",) if self.gates else ("gate_mode",), make_sentence(words))])
        if faults := [*self._find_unprompted(self.experts, "experts")]:
            raise make_faults(faults)
        return self

    def _find_unprompted(self, experts: tuple[Expert, ...], key: str) -> Iterator[Any]:
        for place, expert in enumerate(experts if self.is_prompted else ()):
            if not expert.positive_prompts and expert.prompts_file is None:
                words = f"gate_mode {self.gate_mode} needs {PROMPTED} of every expert; random needs none"
                yield (key, place), make_sentence(words)

    @property
    def is_prompted(self) -> bool:
        """Whether the router is made from prompts."""
        return self.gate_mode not in (*DRAWN, "file")

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        """Its models: the base, then the experts' in their order."""
        return (self.base_model, *(expert.source_model for expert in (*self.experts, *self.shared_experts)))

    @property
    def storage(self) -> dict[str, dict[str, Any]]:
        """The storage options as plain values."""
        return {scheme: dict(options) for scheme, options in (self.storage_options or {}).items()}


OTHER_STAGES["experts"] = Mixture
AnyRecipe = Recipe | Mixture
"""What a file says that `mergemill merge` takes."""


def read_prompts(mixture: Mixture, folder: Path) -> Mixture:
    """Return a mixture with the prompts of its files, which lie below `folder`, among its own.

    So the recipe that an output keeps, and one that is submitted, has them. `RecipeError` for one that cannot be read.
    """
    experts = (*mixture.experts, *mixture.shared_experts)
    if all(expert.prompts_file is None for expert in experts):
        return mixture
    read = [_read_file(expert, folder) for expert in experts]
    made = mixture.model_copy(
        update={
            "experts": tuple(read[: len(mixture.experts)]),
            "shared_experts": tuple(read[len(mixture.experts) :]),
        }
    )
    return made.model_copy(update={"text": json.dumps(mixture_to_json(made), indent=2, ensure_ascii=False) + "\n"})


def _read_file(expert: Expert, folder: Path) -> Expert:
    if expert.prompts_file is None:
        return expert
    path = folder / expert.prompts_file
    try:
        text = read_regular(path, PROMPTS_BYTES).decode()
        prompts = [_read_line(line) for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path}: is neither prompts, one a line, nor JSONL with text: {error}") from None
    if not prompts:
        raise RecipeError(f"{path}: holds no prompts; it needs one a line")
    return expert.model_copy(update={"positive_prompts": (*expert.positive_prompts, *prompts), "prompts_file": None})


def _read_line(line: str) -> str:
    """Return the prompt that a line is, or that is the text of its object.

    >>> _read_line('{"text": "1 + 1"}'), _read_line("1 + 1")
    ('1 + 1', '1 + 1')
    """
    return str(json.loads(line)["text"]) if line.lstrip().startswith("{") else line


def mixture_to_json(mixture: Mixture) -> dict[str, Any]:
    """Return the canonical form: JSON that parses to an equal mixture."""
    return mixture.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
