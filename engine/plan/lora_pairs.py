"""A model and its base, opened and paired: which tensors an adapter may hold, and why not the others."""

from collections.abc import Mapping
from dataclasses import dataclass

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.config import says_tied
from mergemill.engine.checkpoint.family import Family, choose_family, is_optional
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.formats import open_offers
from mergemill.engine.offers.layouts import Arrangement, join_layouts
from mergemill.engine.offers.names import name_alike, unwrap_names
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.plan.adapters import apply_adapters, open_adapters, warn_of_bases
from mergemill.engine.plan.extraction import KIND, Extraction, check_extraction
from mergemill.engine.plan.inputs import check_inputs, warn_of_dequantized
from mergemill.engine.plan.lora_modules import Weight, sort_weight
from mergemill.engine.plan.make import plan_stage
from mergemill.engine.plan.opening import PlanOptions, check_kinds, open_models
from mergemill.engine.plan.share import share_reads
from mergemill.engine.plan.stages import StageModel, find_offers
from mergemill.engine.plan.values import SourceUse
from mergemill.engine.recipe import ModelRef, Recipe, parse_reference
from mergemill.engine.recipe.values import ModelEntry
from mergemill.engine.storage.store import Storage, make_storage
from mergemill.engine.tensors.dtypes import is_mergeable
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.thin import FullDifference

_NOT_ASKED, EQUAL, _TIED, _NO_MATRIX, _COUNTERS = (
    "not asked for",
    "equal to the base's",
    "tied to another",
    "no matrix",
    "no number that is trained",
)


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor of both models."""

    weight: Weight
    offer: Offer  # the model's
    base: Offer
    grown: bool  # whether its vocabulary is another than the base's

    @property
    def difference(self) -> Expression:
        """The model's less the base's."""
        return FullDifference((self.offer.expression, self.base.expression))


@dataclass(frozen=True, slots=True)
class ModelPair:
    """Both models, paired."""

    asked: Extraction
    model: Checkpoint
    base: Checkpoint
    family: Family
    names: tuple[str, ...]  # of all tensors of the base
    pairs: Mapping[str, TensorPair]  # those that may be in the adapter, by name
    left: Mapping[str, str]  # names of the others, and why
    used: tuple[SourceUse, ...]  # of stages of a recipe
    checkpoints: Mapping[str, Checkpoint]
    offers: Mapping[str, Offers]
    storage: Storage
    warnings: tuple[str, ...]

    def cuts(self, weight: Weight, *, grown: bool) -> bool:
        """Whether a tensor is decomposed, and not stored whole."""
        asked = self.asked
        if not weight.is_matrix or grown or asked.saves(weight.module):
            return False
        return asked.embed_lora or not weight.is_vocabulary


def prepare(asked: Extraction) -> ModelPair:
    """Open both models and pair their tensors; raises `InputError` for whatever does not go together."""
    check_extraction(asked)
    where = KIND
    model, stages = _read_model(asked)
    base = parse_reference(asked.base_model)
    if str(model) == str(base):
        raise PlanError(f"{where}: {model}: is the base model itself; there is nothing to extract")
    refs = {str(base): base, str(model): model}
    reached = make_storage(asked.storage)
    adapters = open_adapters(refs, reached)
    opened = share_reads(apply_adapters(refs, open_models(refs, reached, stages, where), adapters))
    check_kinds(opened, where)
    family = choose_family(opened[str(base)].config)
    checkpoints = name_alike(unwrap_names(opened), str(base), family, [], where=where)
    offers = open_offers(checkpoints, family, find_offers(checkpoints, stages))
    both = Recipe(merge_method="linear", models=(ModelEntry(model=base), ModelEntry(model=model)))
    check_inputs(both, checkpoints, offers, family, where=where)
    told = [*warn_of_bases(refs, adapters, where=where), *warn_of_dequantized(checkpoints, offers, where=where)]
    offers, _ = join_layouts(offers, Arrangement(str(base), family, True, lambda names: False))
    if asked.layout:
        offers = _separate(offers, str(base), family, asked)
    pairs, left = _pair(asked, offers[str(model)], offers[str(base)], checkpoints[str(model)], family)
    stage = stages.get(model.path)
    return ModelPair(
        asked=asked,
        model=checkpoints[str(model)],
        base=checkpoints[str(base)],
        family=family,
        names=tuple(offers[str(base)]),
        pairs=pairs,
        left=left,
        used=() if stage is None else tuple(stage.draft.sources),
        checkpoints=checkpoints,
        offers=offers,
        storage=reached,
        warnings=(*(() if stage is None else stage.draft.warnings), *told, *_warn(asked, base)),
    )


def _separate(offers: Mapping[str, Offers], base: str, family: Family, asked: Extraction) -> Mapping[str, Offers]:
    from mergemill.engine.offers.separate import separate_experts  # which few extractions need

    made = separate_experts(offers, family, asked.takes, where=KIND)
    if not any(sort_weight(name, offer.shape, made[base], family).is_one_expert for name, offer in made[base].items()):
        raise PlanError(
            f"{KIND}: --layout separate is of packed experts, and {base} has none that is taken; leave it out"
        )
    return made


def _read_model(asked: Extraction) -> tuple[ModelRef, Mapping[str, StageModel]]:
    """Return the model and, where a recipe makes it, that as a stage."""
    if not (isinstance(asked.model, Mapping) and "recipe" in asked.model):
        return parse_reference(asked.model), {}
    options = PlanOptions(0, (), asked.storage, round_stages=False)
    stage = plan_stage(Recipe.model_validate(asked.model["recipe"]), options, str(asked.model["file"]))
    ref = ModelRef(path=str(asked.model["file"]))
    return ref, {ref.path: stage}


def _pair(
    asked: Extraction, own: Offers, base: Offers, model: Checkpoint, family: Family
) -> tuple[Mapping[str, TensorPair], Mapping[str, str]]:
    pairs: dict[str, TensorPair] = {}
    left: dict[str, str] = {}
    for name in {**base, **own}:
        weight = sort_weight(name, (base.get(name) or own[name]).shape, base, family)
        reason = _find_reason(weight, asked, own, base, model, family)
        if reason:
            left[name] = reason
            continue
        grown = own[name].shape != base[name].shape
        may_grow = (weight.is_vocabulary or weight.kind == "bias") and own[name].shape[1:] == base[name].shape[1:]
        if grown and not may_grow:
            raise PlanError(
                f"{KIND}: tensor {name}: the model has shape {list(own[name].shape)}, the base "
                f"{list(base[name].shape)}; an adapter cannot hold such a change"
            )
        pairs[name] = TensorPair(weight, own[name], base[name], grown)
    return pairs, left


def _find_reason(
    weight: Weight, asked: Extraction, own: Offers, base: Offers, model: Checkpoint, family: Family
) -> str:
    """Say why a tensor is not looked at; empty where it is."""
    name = weight.name
    if not asked.takes(weight.module):
        return _NOT_ASKED
    if name not in own or name not in base:
        if is_optional(name, family):
            return _COUNTERS
        if _is_tied(name, own, base, model):
            return _TIED
        lacks = "the base" if name in own else "the model"
        raise PlanError(f"{KIND}: tensor {name} is not in {lacks}; an adapter cannot hold it; leave it out with -e")
    if not is_mergeable(base[name].dtype) or not is_mergeable(own[name].dtype):
        return _COUNTERS
    if asked.skip_undecomposable and not weight.is_matrix:
        return _NO_MATRIX
    return _TIED if _is_tied(name, own, base, model) else ""


def _is_tied(name: str, own: Offers, base: Offers, model: Checkpoint) -> bool:
    """Whether another tensor stands for this one in the base, and the model has none of its own."""
    tied = (
        name in base
        and base[name].uses != (name,)
        and any(other != name and _is_one(offer, base[name]) for other, offer in base.items())
    )
    if not tied or name in base[name].uses:
        return False
    if name in own and name in own[name].uses and says_tied(model.config) is not True:
        raise PlanError(
            f"{KIND}: tensor {name}: the base has its embedding in its place, and the model one of its own, which no "
            f"adapter of that base can hold; leave it out with -e"
        )
    return True


def _is_one(offer: Offer, other: Offer) -> bool:
    return offer.uses == other.uses and offer.expression == other.expression


def _warn(asked: Extraction, base: ModelRef) -> list[str]:
    if not base.list_adapters():
        return []
    return [f"{KIND}: the adapter is for {base}, so for {base.path} with that adapter merged in, and not for it alone"]
