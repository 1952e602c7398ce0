"""Planning an extraction: a model less its base, as an adapter that peft loads.

Which tensors changed, and where ranks hang on singular values these, must be known before anything can be laid out.
So it is planned in two steps (decided 2026-11-29): `prepare` pairs what both models offer, by their headers;
`runs/extract.py` measures; `plan_prepared` does the rest. What was measured goes with the origin as plain numbers, so
that nobody measures again to resume or verify.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.config import says_tied
from mergemill.engine.checkpoint.family import Family, choose_family, find_tie, is_optional, split_layer
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.formats import open_offers
from mergemill.engine.offers.layouts import Arrangement, join_layouts
from mergemill.engine.offers.names import name_alike, unwrap_names
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.plan.adapters import apply_adapters, open_adapters, warn_of_bases
from mergemill.engine.plan.coverage import Ledger
from mergemill.engine.plan.draft import Draft, finish
from mergemill.engine.plan.extraction import KIND, Extraction, check_extraction, read_extraction
from mergemill.engine.plan.inputs import check_inputs, warn_of_dequantized
from mergemill.engine.plan.lora_files import Written, make_adapter_files, seal_with_config
from mergemill.engine.plan.lora_modules import Weight, sort_weight
from mergemill.engine.plan.lora_ranks import Measured, check_budget, choose_rank, spend
from mergemill.engine.plan.make import PlanOptions, check_kinds, open_models, plan_stage
from mergemill.engine.plan.share import share_reads
from mergemill.engine.plan.stages import StageModel, find_offers
from mergemill.engine.plan.values import Origin, OutputTensor, Plan, SourceUse
from mergemill.engine.recipe import ModelRef, Recipe
from mergemill.engine.recipe.values import ModelEntry
from mergemill.engine.storage.store import Storage, join_options, make_storage
from mergemill.engine.tensors.dtypes import RECIPE_DTYPES, is_mergeable, item_bytes
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.thin import Difference, Halves, Side, Thin

WEIGHTS_NAME = "adapter_model.safetensors"
ONE_SHARD = 1 << 62  # bytes
_HEAD = "lm_head"  # as transformers calls the head of every model that generates text
_NOT_ASKED, _EQUAL, _TIED, _NO_MATRIX, _COUNTERS = (
    "not asked for",
    "equal to the base's",
    "tied to another",
    "no matrix",
    "no number that is trained",
)


@dataclass(frozen=True, slots=True)
class Changed:
    """A tensor of both models."""

    weight: Weight
    offer: Offer  # the model's
    base: Offer
    grown: bool  # whether its vocabulary is another than the base's

    @property
    def difference(self) -> Expression:
        """The model's less the base's."""
        return Difference((self.offer.expression, self.base.expression))


@dataclass(frozen=True, slots=True)
class Prepared:
    """Both models, paired."""

    asked: Extraction
    model: Checkpoint
    base: Checkpoint
    family: Family
    names: tuple[str, ...]  # of all tensors of the base
    pairs: Mapping[str, Changed]  # those that may be in the adapter, by name
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


def prepare(asked: Extraction) -> Prepared:
    """Open both models and pair their tensors; raises `InputError` for whatever does not go together."""
    check_extraction(asked)
    where = KIND
    model, stages = _read_model(asked)
    base = ModelRef.model_validate(asked.base_model)
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
    pairs, left = _pair(asked, offers[str(model)], offers[str(base)], checkpoints[str(model)], family)
    stage = stages.get(model.path)
    return Prepared(
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


def plan_prepared(ready: Prepared, measured: Mapping[str, Measured]) -> Plan:
    """Plan the adapter of what was measured: by name of a tensor, those that were asked for."""
    ranks = _choose_ranks(ready, measured)
    whole = sorted(name for name, each in measured.items() if each.changed and name not in ranks)
    return _plan(ready, {name: rank for name, rank in ranks.items() if rank}, whole)


def replan_extraction(origin: Origin, storage: Mapping[str, Mapping[str, Any]] | None) -> Plan:
    """Plan again what an output says that it was made from."""
    value = json.loads(origin.text) if origin.text else dict(origin.value)
    ranks, whole = value.pop("ranks"), value.pop("whole")
    asked = read_extraction({**value, "storage": join_options(storage or {}, value.get("storage", {}))})
    return _plan(prepare(asked), ranks, whole)


def _read_model(asked: Extraction) -> tuple[ModelRef, Mapping[str, StageModel]]:
    """Return the model and, where a recipe makes it, that as a stage."""
    if not (isinstance(asked.model, Mapping) and "recipe" in asked.model):
        return ModelRef.model_validate(asked.model), {}
    options = PlanOptions(0, (), asked.storage, round_stages=False)
    stage = plan_stage(Recipe.model_validate(asked.model["recipe"]), options, str(asked.model["file"]))
    ref = ModelRef(path=str(asked.model["file"]))
    return ref, {ref.path: stage}


def _pair(
    asked: Extraction, own: Offers, base: Offers, model: Checkpoint, family: Family
) -> tuple[Mapping[str, Changed], Mapping[str, str]]:
    pairs: dict[str, Changed] = {}
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
        if weight.kind == "parameter":
            raise PlanError(
                f"{KIND}: tensor {name} is no weight or bias of a module, which alone peft stores; leave it out with "
                f"--skip-undecomposable, or with -e"
            )
        pairs[name] = Changed(weight, own[name], base[name], grown)
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
        and any(other != name and offer.uses == base[name].uses for other, offer in base.items())
    )
    if not tied or name in base[name].uses:
        return False
    if name in own and name in own[name].uses and says_tied(model.config) is not True:
        raise PlanError(
            f"{KIND}: tensor {name}: the base has its embedding in its place, and the model one of its own, which no "
            f"adapter of that base can hold; leave it out with -e"
        )
    return True


def _choose_ranks(ready: Prepared, measured: Mapping[str, Measured]) -> Mapping[str, int]:
    """Return the rank of each tensor that is decomposed; 0: it is left out."""
    asked, cut = ready.asked, {}
    for name, each in measured.items():
        pair = ready.pairs[name]
        if each.changed and ready.cuts(pair.weight, grown=pair.grown):
            cut[name] = choose_rank(each, min(asked.max_rank, pair.weight.shape.smaller), asked)
    if asked.budget_bytes is None:
        return cut
    whole = [name for name, each in measured.items() if each.changed and name not in cut]
    whole_bytes = sum(
        ready.pairs[name].offer.expression.size * item_bytes(_find_dtype(ready, ready.pairs[name])) for name in whole
    )
    costs = {name: _count_rank_bytes(ready, ready.pairs[name]) for name in cut}
    values = {name: measured[name].values for name in cut}
    return spend(values, cut, costs, check_budget(asked.budget_bytes, whole_bytes))


def _count_rank_bytes(ready: Prepared, pair: Changed) -> int:
    rows, columns = pair.weight.shape
    return (rows + columns) * pair.weight.count * item_bytes(_find_dtype(ready, pair))


def _find_dtype(ready: Prepared, pair: Changed) -> str:
    """Return the dtype that is written: as asked, else the model's own."""
    return RECIPE_DTYPES[ready.asked.dtype] if ready.asked.dtype else pair.offer.dtype


def _plan(ready: Prepared, ranks: Mapping[str, int], whole: Sequence[str]) -> Plan:
    if not ranks and not whole:
        raise PlanError(
            f"{KIND}: {ready.model.ref} is equal to {ready.base.ref}, or is in all that was asked for; there is "
            f"nothing to extract"
        )
    asked = ready.asked
    written = _complete(ready, ranks, whole)
    value = {**asked.to_json(), "ranks": dict(sorted(ranks.items())), "whole": list(whole)}
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    names = {each.module for each in written.cut.values() if each.kind == "experts"}
    tensors: list[OutputTensor] = []
    for name, weight in written.cut.items():
        tensors += _make_factors(ready.pairs[name], ranks[name], ready, inner=_is_inner(weight, written, names))
        if written.tied and weight.kind == "embedding":
            tensors += _tie_head(ready, weight, tensors[-2:])
    for name, key in written.whole.items():
        pair = ready.pairs[name]
        tensors.append(OutputTensor(key, _find_dtype(ready, pair), pair.offer.expression))
        if written.tied and pair.weight.kind == "embedding":
            tensors += _tie_head(ready, pair.weight, tensors[-1:])
    return finish(
        Draft(
            origin=Origin(KIND, f"{KIND} {ready.model.ref}", value, text),
            tensors=tensors,
            files=make_adapter_files(ready, written, text),
            sources=[*_list_sources(ready, written), *ready.used],
            donor="",
            dtype_from="as --dtype says" if asked.dtype else "as the model is stored",
            storage=asked.storage,
            warnings=(*ready.warnings, *_warn_of_written(ready, written)),
            seal=lambda shards, made: seal_with_config(ready, written),
            name_shard=lambda place, count: WEIGHTS_NAME,
        ),
        ONE_SHARD,
    )


def _complete(ready: Prepared, ranks: Mapping[str, int], whole: Sequence[str]) -> Written:
    """Return what is written: a module that is stored whole is so with all its tensors."""
    cut = {name: ready.pairs[name].weight for name in sorted(ranks)}
    saved = {ready.pairs[name].weight.module for name in whole if ready.pairs[name].weight.kind != "bias"}
    targets = {weight.module for weight in cut.values()}
    keys: dict[str, str] = {}
    for name, pair in ready.pairs.items():
        module = pair.weight.module
        if module in saved and name not in cut:
            keys[name] = f"base_model.model.{name}"
        elif name in whole:
            inner = ".base_layer" if module in targets else ""
            keys[name] = f"base_model.model.{module}{inner}.bias"
    alone = [ready.pairs[name].weight for name in keys if ready.pairs[name].weight.module not in saved]
    biases = any(weight.kind == "bias" for weight in alone)
    grown = next((ready.pairs[name].offer.shape[0] for name in keys if ready.pairs[name].grown), None)
    tied = _has_tied_head(ready)
    heads = [ready.pairs[name].weight for name in keys if tied and _is_tied_to_head(ready.pairs[name].weight, ready)]
    saved |= {_HEAD for weight in heads if not _ties_by_peft(weight)}
    return Written(cut, dict(ranks), keys, tuple(sorted(saved)), biases, grown, tied)


def _has_tied_head(ready: Prepared) -> bool:
    """Whether the base's embedding is its head too: it has no other, or says so."""
    said, heads = says_tied(ready.base.config), [name for name in ready.names if _may_be_head(name, ready.family)]
    return said is True or (said is None and not heads)


def _may_be_head(name: str, family: Family) -> bool:
    return split_layer(name) is None and any(fnmatchcase(name, tied) for tied, _ in family.ties)


def _is_tied_to_head(weight: Weight, ready: Prepared) -> bool:
    return find_tie(f"{_HEAD}.weight", ready.names, ready.family) == weight.name


def _ties_by_peft(weight: Weight) -> bool:
    """Whether peft keeps a head tied to an embedding of this name (0.21 knows no other)."""
    return weight.module.rpartition(".")[2] == "embed_tokens"


def _is_inner(weight: Weight, written: Written, experts: set[str]) -> bool:
    """Whether peft wraps another parameter of the same module around this one: it does so in the order of the names."""
    if weight.module not in experts or weight.kind != "experts":
        return False
    return any(each.module == weight.module and each.name > weight.name for each in written.cut.values())


def _make_factors(pair: Changed, rank: int, ready: Prepared, *, inner: bool) -> list[OutputTensor]:
    asked, weight = ready.asked, pair.weight
    halves = Halves(pair.difference, weight.count, weight.shape, rank, asked.way, asked.distribute_scale, weight.turned)
    dtype, sides = _find_dtype(ready, pair), cast(tuple[Side, ...], ("A", "B"))
    return [
        OutputTensor(weight.name_factor(side, inner=inner), dtype, Thin(halves, side, weight.shape_factor(side, rank)))
        for side in sides
    ]


def _tie_head(ready: Prepared, weight: Weight, tensors: Sequence[OutputTensor]) -> list[OutputTensor]:
    """Return what peft wants for the head that is tied to an embedding: the same, as it is of a linear layer."""
    if not _is_tied_to_head(weight, ready):
        return []
    if ready.base.config.get("is_encoder_decoder") is True:
        raise PlanError(
            f"{KIND}: tensor {weight.name}: is tied to more than one other, of which no adapter is known to load; "
            f"leave it out with -e"
        )
    if len(tensors) == 1:  # also where peft knows nothing of the tie: then the head is a module of its own
        return [replace(tensors[0], name=f"base_model.model.{_HEAD}.weight")]
    if not _ties_by_peft(weight):
        raise PlanError(
            f"{KIND}: tensor {weight.name}: is the head too, and of such peft knows embed_tokens alone; leave "
            f"--embed-lora out, and it is stored whole"
        )
    a, b = (cast(Thin, each.expression) for each in tensors)
    return [
        OutputTensor(
            f"base_model.model.{_HEAD}.lora_{side}.weight",
            tensors[0].dtype,
            replace(factor, shape=factor.shape[::-1], transposed=True),
        )
        for side, factor in (("A", b), ("B", a))
    ]


def _list_sources(ready: Prepared, written: Written) -> Sequence[SourceUse]:
    ledger = Ledger()
    for ref, checkpoint in ready.checkpoints.items():
        for name, offer in ready.offers[ref].items():
            how = "merged" if name in written.cut else "copied" if name in written.whole else ""
            for used in offer.uses:
                if how == "merged" or (how and ref == ready.model.ref):
                    ledger.use(ref, used, "merged" if how == "merged" else "copied")
        for name in checkpoint.tensors:
            ledger.drop(ref, name, ready.left.get(name, _EQUAL))
    return ledger.summarise(ready.checkpoints)


def _warn(asked: Extraction, base: ModelRef) -> list[str]:
    if not base.list_adapters():
        return []
    return [f"{KIND}: the adapter is for {base}, so for {base.path} with that adapter merged in, and not for it alone"]


def _warn_of_written(ready: Prepared, written: Written) -> list[str]:
    told = []
    if saved := written.saved:
        named = ", ".join(saved[:3]) + (f" and {len(saved) - 3} more" if len(saved) > 3 else "")
        told.append(
            f"{KIND}: stored whole: {named}; vLLM serves no such adapter; --embed-lora, --skip-undecomposable and -e "
            f"leave them out"
        )
    if written.grown is not None:
        told.append(
            f"{KIND}: the model's vocabulary has {written.grown} rows: call model.resize_token_embeddings("
            f"{written.grown}) on the base before the adapter is loaded"
        )
    return told
