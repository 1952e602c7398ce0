"""What a comparison of two models reads: their tensors pair by pair, and what has no partner.

Names are made alike as for a merge. What it makes is a plan as any other, but for that nothing of it is written: its
parts say what is read by which task, and what that takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.family import Family, choose_family, split_layer
from mergemill.engine.checkpoint.tensor_kinds import find_tensor_kind
from mergemill.engine.checkpoint.vocabulary import same_tokenizer
from mergemill.engine.errors import CheckpointError, PlanError
from mergemill.engine.offers.formats import open_offers
from mergemill.engine.offers.names import name_alike, unwrap_names
from mergemill.engine.offers.offer import Offers
from mergemill.engine.plan.adapters import apply_adapters, open_adapters
from mergemill.engine.plan.disagreement import warn_of_disagreement
from mergemill.engine.plan.draft import SHARD_SIZE, Draft, finish
from mergemill.engine.plan.inputs import check_input
from mergemill.engine.plan.opening import check_kinds, open_models
from mergemill.engine.plan.spellings import read_paths
from mergemill.engine.plan.values import Origin, OutputTensor, Plan, SourceUse
from mergemill.engine.recipe import Recipe, parse_reference
from mergemill.engine.recipe.stages import list_models
from mergemill.engine.storage.store import make_storage
from mergemill.engine.tensors.compared import Compared
from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.expressions import input_bytes

WHERE = "diff"


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor stands in its model."""

    kind: str  # one of `KINDS`
    stack: str  # of its layer; empty outside the layers
    layer: int | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models side by side."""

    models: tuple[str, ...]  # first, second, and the base where there is one
    plan: Plan  # whose output tensors are the pairs
    places: Mapping[str, TensorPlace]  # of each pair
    only: Mapping[str, tuple[str, ...]]  # tensors that the others lack, by model
    shapes: Mapping[str, tuple[tuple[int, ...], ...]]  # those that differ, by tensor, in the order of `models`
    why_not: tuple[str, ...]  # the two cannot be merged, or their merge would mean little


def make_comparison(
    first: str, second: str, base: str | None = None, *, storage: Mapping[str, Mapping[str, Any]] | None = None
) -> Comparison:
    """Plan the comparison of two models, written as in a recipe, and of what changed since a `base`.

    Raises `InputError` for a model that cannot be opened, or is no numbers.
    """
    names = [first, second, *([base] if base is not None else [])]
    opened = _open(names, storage)
    models = tuple(opened)
    if len(models) < len(names):
        raise PlanError(f"{WHERE}: {', '.join(names)}: a model is named twice, and is the same as itself")
    family = choose_family(opened[models[0]].config)
    alike = name_alike(unwrap_names(opened), models[0], family, (), where=WHERE)
    offers = open_offers(alike, family, {})
    for model, checkpoint in alike.items():
        check_input(checkpoint, offers[model], family, WHERE)
    everywhere = [name for name in offers[models[0]] if all(name in offers[model] for model in models)]
    shapes = {name: tuple(offers[model][name].shape for model in models) for name in everywhere}
    unlike = {name: found for name, found in shapes.items() if len(set(found)) > 1}
    pairs = [_pair(name, models, offers, family) for name in everywhere if name not in unlike]
    only = {model: tuple(name for name in offers[model] if name not in shapes) for model in models}
    used = [_use(i, models, alike, pairs) for i in range(len(models))]
    value = {"models": list(models)}
    draft = Draft(Origin("diff", f"{models[0]} and {models[1]}", value), pairs, (), used, donor="none")
    return Comparison(
        models,
        finish(draft, SHARD_SIZE),
        {name: _place(name, family) for name in everywhere},
        only,
        unlike,
        tuple(_say_why_not(models, alike, only, unlike)),
    )


def _open(names: list[str], storage: Mapping[str, Mapping[str, Any]] | None) -> Mapping[str, Checkpoint]:
    entries = [{"model": parse_reference(name)} for name in names]
    recipe = Recipe.model_validate({"merge_method": "linear", "models": entries})
    recipe = read_paths(recipe, list_models(recipe), where=WHERE)
    refs, reached = list_models(recipe), make_storage(storage)
    opened = apply_adapters(refs, open_models(refs, reached, {}, WHERE), open_adapters(refs, reached))
    check_kinds(opened, WHERE)
    return opened


def _pair(name: str, models: tuple[str, ...], offers: Mapping[str, Offers], family: Family) -> OutputTensor:
    found = [offers[model][name] for model in models]
    unknown = next((offer.dtype for offer in found if offer.dtype not in TORCH_DTYPES), None)
    if unknown is not None:
        raise PlanError(f"{WHERE}: tensor {name} is stored as {unknown}, which cannot be compared")
    by_row = find_tensor_kind(name, family) == "router" and len(found[0].shape) == 2
    compared = Compared(tuple(offer.expression for offer in found), by_row)
    return OutputTensor(name, compared.dtype, compared)


def _place(name: str, family: Family) -> TensorPlace:
    split = split_layer(name)
    return TensorPlace(find_tensor_kind(name, family), split[0] if split else "", split[1] if split else None)


def _use(i: int, models: tuple[str, ...], alike: Mapping[str, Checkpoint], pairs: list[OutputTensor]) -> SourceUse:
    checkpoint = alike[models[i]]
    read = sum(input_bytes(pair.expression.inputs[i]) for pair in pairs)
    rest = {"no partner of its shape": left} if (left := len(checkpoint.tensors) - len(pairs)) > 0 else {}
    return SourceUse(models[i], checkpoint.path, len(checkpoint.tensors), len(pairs), 0, rest, read)


def _say_why_not(
    models: tuple[str, ...],
    alike: Mapping[str, Checkpoint],
    only: Mapping[str, tuple[str, ...]],
    unlike: Mapping[str, tuple[tuple[int, ...], ...]],
) -> list[str]:
    said = []
    for model, names in only.items():
        if names:
            said.append(f"{_count(len(names), 'tensor')} only in {model}: {_name_some(names)}")
    if unlike:
        name, found = next(iter(unlike.items()))
        told = " and ".join(str(list(shape)) for shape in dict.fromkeys(found))
        said.append(f"{_count(len(unlike), 'tensor')} of different shapes: {name} is {told}")
    first, *others = (alike[model] for model in models)
    for other in others:
        try:
            if not same_tokenizer(first, other):
                said.append(f"{first.ref} and {other.ref} have different vocabularies")
        except CheckpointError as error:
            said.append(str(error))
    return [*said, *(each.removeprefix(f"{WHERE}: ") for each in warn_of_disagreement(first, alike, where=WHERE))]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _name_some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
