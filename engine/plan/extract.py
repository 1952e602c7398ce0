"""Planning an extraction: a model less its base, as an adapter that peft loads.

Which tensors changed, and where ranks hang on singular values these, must be known before anything can be laid out.
So it is planned in two steps (decided 2026-11-29): `prepare` (`lora_pairs.py`) pairs what both models offer, by their
headers; `runs/extract.py` measures; `plan_prepared` does the rest. What was measured goes with the origin as plain
numbers, so that nobody measures again to verify.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast

from mergemill.engine.checkpoint.config import says_tied
from mergemill.engine.checkpoint.family import Family, find_tie, spell, split_layer
from mergemill.engine.errors import PlanError
from mergemill.engine.plan.coverage import Ledger
from mergemill.engine.plan.draft import Draft, finish
from mergemill.engine.plan.extraction import KIND, read_extraction
from mergemill.engine.plan.lora_files import Written, make_adapter_files, seal_with_config
from mergemill.engine.plan.lora_modules import Weight, find_depth
from mergemill.engine.plan.lora_pairs import EQUAL, ModelPair, TensorPair, prepare
from mergemill.engine.plan.lora_ranks import Measured, check_budget, choose_rank, spend
from mergemill.engine.plan.values import Origin, OutputTensor, Plan, SourceUse
from mergemill.engine.storage.store import join_options
from mergemill.engine.tensors.dtypes import RECIPE_DTYPES, item_bytes
from mergemill.engine.tensors.thin import Halves, Side, Thin

WEIGHTS_NAME = "adapter_model.safetensors"
ONE_SHARD = 1 << 62  # bytes
_HEAD = "lm_head"  # as transformers calls the head of every model that generates text


def plan_prepared(ready: ModelPair, measured: Mapping[str, Measured]) -> Plan:
    """Plan the adapter of what was measured: by name of a tensor, those that were asked for."""
    _check_parameters(ready, measured)
    ranks = _choose_ranks(ready, measured)
    whole = sorted(name for name, each in measured.items() if each.changed and name not in ranks)
    return _plan(ready, {name: rank for name, rank in ranks.items() if rank}, whole)


def _check_parameters(ready: ModelPair, measured: Mapping[str, Measured]) -> None:
    """Raise PlanError for a changed parameter that is no weight or bias, as the sinks of gpt-oss's attention.

    peft would store the module that has it, all of its projections whole, and change none of these by factors. One that
    did not change is left out, as all that equals the base's (2026-11-30): most fine-tunes leave them alone.
    """
    for name, each in measured.items():
        weight = ready.pairs[name].weight
        if weight.kind == "parameter" and each.changed:
            raise PlanError(
                f"{KIND}: tensor {name} has changed, and is no weight or bias of a module, which alone peft stores; "
                f"leave it out with -e '{weight.module.rpartition('.')[2]}$', or with --skip-undecomposable"
            )


def replan_extraction(origin: Origin, storage: Mapping[str, Mapping[str, Any]] | None) -> Plan:
    """Plan again what an output says that it was made from."""
    value = json.loads(origin.text) if origin.text else dict(origin.value)
    ranks, whole = value.pop("ranks"), value.pop("whole")
    asked = read_extraction({**value, "storage": join_options(storage or {}, value.get("storage", {}))})
    return _plan(prepare(asked), ranks, whole)


def _choose_ranks(ready: ModelPair, measured: Mapping[str, Measured]) -> Mapping[str, int]:
    """Return the rank of each tensor that is decomposed; 0: it is left out."""
    asked, cut = ready.asked, {}
    for name, each in measured.items():
        pair = ready.pairs[name]
        if each.changed and ready.cuts(pair.weight, grown=pair.grown):
            cut[name] = choose_rank(each, min(asked.max_rank, pair.weight.shape.smaller), asked)
    if asked.budget_bytes is None:
        return cut
    if alone := next((name for name in cut if ready.pairs[name].weight.is_one_expert), None):
        raise PlanError(
            f"{KIND}: --budget: tensor {alone}: experts that are stored one by one must all have the largest rank of "
            f"the adapter, for peft packs them; use --max-rank, or leave them out with -e"
        )
    whole = [name for name, each in measured.items() if each.changed and name not in cut]
    whole_bytes = sum(
        ready.pairs[name].offer.expression.size * item_bytes(_find_dtype(ready, ready.pairs[name])) for name in whole
    )
    costs = {name: _count_rank_bytes(ready, ready.pairs[name]) for name in cut}
    values = {name: measured[name].values for name in cut}
    return spend(values, cut, costs, check_budget(asked.budget_bytes, whole_bytes))


def _count_rank_bytes(ready: ModelPair, pair: TensorPair) -> int:
    rows, columns = pair.weight.shape
    return (rows + columns) * pair.weight.count * item_bytes(_find_dtype(ready, pair))


def _find_dtype(ready: ModelPair, pair: TensorPair) -> str:
    """Return the dtype that is written: as asked, else the model's own."""
    return RECIPE_DTYPES[ready.asked.dtype] if ready.asked.dtype else pair.offer.dtype


def _plan(ready: ModelPair, ranks: Mapping[str, int], whole: Sequence[str]) -> Plan:
    if not ranks and not whole:
        raise PlanError(
            f"{KIND}: {ready.model.ref} is equal to {ready.base.ref}, or is in all that was asked for; there is "
            f"nothing to extract"
        )
    asked = ready.asked
    written = _complete(ready, ranks, whole)
    value = {**asked.to_json(), "ranks": dict(sorted(ranks.items())), "whole": list(whole)}
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    tensors: list[OutputTensor] = []
    by_module = defaultdict[str, list[Weight]](list)
    for weight in written.cut.values():
        by_module[weight.module].append(weight)
    for name, weight in written.cut.items():
        depth = find_depth(weight, by_module[weight.module])
        tensors += _make_factors(ready.pairs[name], written.ranks[name], ready, depth)
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


def _complete(ready: ModelPair, ranks: Mapping[str, int], whole: Sequence[str]) -> Written:
    """Return what is written: a module that is stored whole is so with all its tensors."""
    cut = {name: ready.pairs[name].weight for name in sorted(ranks)}
    usual = max(ranks.values(), default=1)
    ranks = {name: usual if cut[name].is_one_expert else rank for name, rank in ranks.items()}
    saved = {ready.pairs[name].weight.module for name in whole if ready.pairs[name].weight.kind != "bias"}
    targets = {weight.module for weight in cut.values()}
    keys: dict[str, str] = {}
    for name, pair in ready.pairs.items():
        module = pair.weight.module
        if module in saved and name not in cut:
            keys[name] = f"base_model.model.{spell(name, ready.family)}"
        elif name in whole:
            inner = ".base_layer" if module in targets else ""
            keys[name] = f"base_model.model.{module}{inner}.bias"
    alone = [ready.pairs[name].weight for name in keys if ready.pairs[name].weight.module not in saved]
    biases = any(weight.kind == "bias" for weight in alone)
    grown = next((ready.pairs[name].offer.shape[0] for name in keys if ready.pairs[name].grown), None)
    tied = _has_tied_head(ready)
    heads = [ready.pairs[name].weight for name in keys if tied and _is_tied_to_head(ready.pairs[name].weight, ready)]
    saved |= {_HEAD for weight in heads if not _ties_by_peft(weight)}
    return Written(
        cut,
        dict(ranks),
        keys,
        tuple(sorted(spell(f"{module}.", ready.family)[:-1] for module in saved)),
        biases,
        grown,
        tied,
    )


def _has_tied_head(ready: ModelPair) -> bool:
    """Whether the base's embedding is its head too: it has no other, or says so."""
    said, heads = says_tied(ready.base.config), [name for name in ready.names if _may_be_head(name, ready.family)]
    return said is True or (said is None and not heads)


def _may_be_head(name: str, family: Family) -> bool:
    return split_layer(name) is None and any(fnmatchcase(name, tied) for tied, _ in family.ties)


def _is_tied_to_head(weight: Weight, ready: ModelPair) -> bool:
    return find_tie(f"{_HEAD}.weight", ready.names, ready.family) == weight.name


def _ties_by_peft(weight: Weight) -> bool:
    """Whether peft keeps a head tied to an embedding of this name (0.21 knows no other)."""
    return weight.module.rpartition(".")[2] == "embed_tokens"


def _make_factors(pair: TensorPair, rank: int, ready: ModelPair, depth: int) -> list[OutputTensor]:
    asked, weight = ready.asked, pair.weight
    halves = Halves(pair.difference, weight.count, weight.shape, rank, asked.way, asked.distribute_scale, weight.turned)
    dtype, sides = _find_dtype(ready, pair), cast(tuple[Side, ...], ("A", "B"))
    return [
        OutputTensor(weight.name_factor(side, depth), dtype, Thin(halves, side, weight.shape_factor(side, rank)))
        for side in sides
    ]


def _tie_head(ready: ModelPair, weight: Weight, tensors: Sequence[OutputTensor]) -> list[OutputTensor]:
    """Return what peft wants for the head that is tied to an embedding: the same, as it is of a linear layer."""
    if not _is_tied_to_head(weight, ready):
        return []
    if ready.base.config.get("is_encoder_decoder") is True:
        raise PlanError(
            f"{KIND}: tensor {weight.name}: is tied to more than one other, of which no adapter is known to load; "
            f"leave it out with -e"
        )
    if len(tensors) == 1:  # also where peft knows nothing of the tie: then the head is a module of its own
        return [tensors[0]._replace(name=f"base_model.model.{_HEAD}.weight")]
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


def _list_sources(ready: ModelPair, written: Written) -> Sequence[SourceUse]:
    ledger = Ledger()
    for ref, checkpoint in ready.checkpoints.items():
        for name, offer in ready.offers[ref].items():
            how = "merged" if name in written.cut else "copied" if name in written.whole else ""
            for used in offer.uses:
                if how == "merged" or (how and ref == ready.model.ref):
                    ledger.use(ref, used, "merged" if how == "merged" else "copied")
        for name in checkpoint.tensors:
            ledger.drop(ref, name, ready.left.get(name, EQUAL))
    return ledger.summarise(ready.checkpoints)


def _warn_of_written(ready: ModelPair, written: Written) -> list[str]:
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
