"""Recipes that are written for their user: shuffled layers, and the words of mergekit's older tools.

Sources: what mergekit-layershuffle, bakllama and mergekit-legacy of mergekit 0.1.5 take, and mean by it.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import BeforeValidator, Field

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe.document import Form
from mergemill.engine.recipe.leaves import OptionalDtype, check_count, check_items, check_number
from mergemill.engine.recipe.parsing import parse_recipe, parse_value, read_text
from mergemill.engine.recipe.references import ModelRef
from mergemill.engine.recipe.shapes import Value

Data = dict[str, Any]


def write_text(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML, after it was read back: what is printed is valid."""
    text = yaml.safe_dump(dict(recipe), sort_keys=False, default_flow_style=None, width=120)
    parse_recipe(text, name="the recipe")
    return text


def shuffle_layers(
    layers: Mapping[str, int], weights: Sequence[float], *, seed: int, full_random: bool, dtype: str | None
) -> Data:
    """Return a stack of layers that are drawn from models by their weights.

    layers: how many each model has. full_random: each model gives its weight's share of its own layers, at random and
    in any order; else each layer is that of one model, at its place. The same arguments give the same recipe.
    """
    if weights and len(weights) != len(layers):
        raise RecipeError(f"{len(layers)} models and {len(weights)} weights; there must be as many, or no weights")
    weights = weights or [1 / len(layers)] * len(layers)
    if min(weights) < 0 or not sum(weights) > 0:
        raise RecipeError("weights must be 0 or more, and not all 0")
    draw = random.Random(seed)
    drawn = (_scatter if full_random else _choose)(layers, weights, draw)
    return {"merge_method": "passthrough", "slices": _join_layers(drawn), **({"dtype": dtype} if dtype else {})}


def _choose(layers: Mapping[str, int], weights: Sequence[float], draw: random.Random) -> list[tuple[str, int]]:
    if len(set(layers.values())) > 1:
        counts = ", ".join(f"{model} {count}" for model, count in layers.items())
        raise RecipeError(f"the models have different numbers of layers: {counts}; --full-random takes some of each")
    places = range(next(iter(layers.values())))
    return list(zip(draw.choices(list(layers), weights, k=len(places)), places, strict=True))


def _scatter(layers: Mapping[str, int], weights: Sequence[float], draw: random.Random) -> list[tuple[str, int]]:
    drawn = []
    for (model, count), weight in zip(layers.items(), weights, strict=True):
        wanted = round(weight * count)
        if wanted > count:
            raise RecipeError(f"{model} has {count} layers, and its weight {weight:g} asks for {wanted} different ones")
        drawn += [(model, layer) for layer in draw.sample(range(count), wanted)]
    draw.shuffle(drawn)
    return drawn


def _join_layers(drawn: Sequence[tuple[str, int]]) -> list[Data]:
    """Return slices, one for each run of layers that follow each other in one model."""
    if not drawn:
        raise RecipeError("the weights leave no layer; give larger ones")
    runs = groupby(enumerate(drawn), lambda item: (item[1][0], item[1][1] - item[0]))
    found = [[layer for _, layer in run] for _, run in runs]
    return [_make_slice(run[0][0], run[0][1], run[-1][1] + 1) for run in found]


def _make_slice(model: str, start: int, stop: int, **more: Any) -> Data:
    return {"sources": [{"model": model, "layer_range": [start, stop], **more}]}


class BakllamaSlice(Value):
    """Layers of one model, as bakllama writes them."""

    called: ClassVar[str] = "a layer slice"

    model: ModelRef
    """The model."""
    start: Annotated[int, BeforeValidator(lambda value: check_count(value, least=0))]
    """The first layer."""
    end: Annotated[int, BeforeValidator(lambda value: check_count(value, least=1))]
    """The layer after the last."""
    scale: Annotated[float | None, BeforeValidator(check_number)] = None
    """What the MLPs' last matrices are multiplied by."""


class Bakllama(Value):
    """A file of bakllama."""

    called: ClassVar[str] = "a bakllama file"

    layer_slices: Annotated[tuple[BakllamaSlice, ...], BeforeValidator(check_items), Field(min_length=1)]
    """The layers, slice after slice."""
    embedding_source: ModelRef | None = None
    """The model that the embedding is taken from."""
    lm_head_source: ModelRef | None = None
    """The model that the final norm and the head are taken from."""
    dtype: OptionalDtype = None
    """The dtype that is written."""


def read_bakllama(path: str) -> Data:
    """Return what a file of bakllama means: slices, and empty ones at the ends for embedding and head."""
    form = Form("a bakllama file", "layer_slices")
    file = parse_value(Bakllama, form, read_text(Path(path)), name=path)
    slices = [_scale_slice(part) for part in file.layer_slices]
    first = [_make_slice(str(file.embedding_source), 0, 0)] if file.embedding_source else []
    last = [_make_slice(str(file.lm_head_source), 0, 0)] if file.lm_head_source else []
    dtype = {"dtype": file.dtype} if file.dtype else {}
    return {"merge_method": "passthrough", "slices": [*first, *slices, *last], **dtype}


def _scale_slice(part: BakllamaSlice) -> Data:
    scale = [{"filter": "down_proj", "value": part.scale}, {"value": 1.0}]
    more = {} if part.scale is None else {"parameters": {"scale": scale}}
    return _make_slice(str(part.model), part.start, part.end, **more)


@dataclass(frozen=True, slots=True)
class Legacy:
    """What mergekit-legacy is asked for."""

    models: Sequence[str]
    method: str
    base: str | None = None
    weights: Sequence[float] = ()  # one for all, or one a model
    densities: Sequence[float] = ()
    normalize: bool = True
    int8_mask: bool = False
    dtype: str | None = None


def write_legacy(asked: Legacy) -> Data:
    """Return the recipe for the words of mergekit-legacy."""
    weights = _spread(asked.weights, asked, "--weight")
    densities = _spread(asked.densities, asked, "--density")
    if asked.method == "slerp":
        return _write_slerp(asked, weights)
    entries = []
    for i, model in enumerate(asked.models):
        own = {name: values[i] for name, values in (("weight", weights), ("density", densities)) if values}
        entries.append({"model": model, **({"parameters": own} if own else {})})
    shared = {**({} if asked.normalize else {"normalize": False}), **({"int8_mask": True} if asked.int8_mask else {})}
    return {
        "merge_method": asked.method,
        **({"base_model": asked.base} if asked.base else {}),
        "models": entries,
        **({"parameters": shared} if shared else {}),
        **({"dtype": asked.dtype} if asked.dtype else {}),
    }


def _write_slerp(asked: Legacy, weights: Sequence[float]) -> Data:
    models = list(dict.fromkeys([*([asked.base] if asked.base else []), *asked.models]))
    if len(models) != 2 or len(set(weights)) != 1:
        raise RecipeError("slerp takes two models, the base among them, and one --weight, which is its t")
    return {
        "merge_method": "slerp",
        "base_model": models[0],
        "models": [{"model": model} for model in models],
        "parameters": {"t": weights[0]},
        **({"dtype": asked.dtype} if asked.dtype else {}),
    }


def _spread(values: Sequence[float], asked: Legacy, option: str) -> Sequence[float]:
    if len(values) in (0, len(asked.models)):
        return values
    if len(values) > 1:
        raise RecipeError(f"{len(asked.models)} models and {len(values)} of {option}; one serves all, else one a model")
    return [*values] * len(asked.models)
