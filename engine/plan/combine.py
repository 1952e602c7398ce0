"""Planning adapters that are combined to one: by peft's formulas, or by a merge method in one of three spaces.

The base's weights are not wanted for any: a method's base is a tensor of zeros. What does not add up, because it
replaces weights of the base (`modules_to_save`, biases, tokens) or scales them (DoRA), is refused by name.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, cast

from mergemill.engine.checkpoint.adapter import Adapter, open_adapter
from mergemill.engine.checkpoint.adapter_config import CONFIG_NAME
from mergemill.engine.checkpoint.card import make_adapter_card, shorten_path
from mergemill.engine.checkpoint.checkpoint import read_small
from mergemill.engine.checkpoint.family import Family, choose_family
from mergemill.engine.checkpoint.weights import StoredTensor
from mergemill.engine.errors import PlanError
from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.methods.contract import Method
from mergemill.engine.offers.formats import express
from mergemill.engine.offers.offer import Offer
from mergemill.engine.plan.coverage import Ledger
from mergemill.engine.plan.draft import Draft, finish
from mergemill.engine.plan.extract import ONE_SHARD, WEIGHTS_NAME
from mergemill.engine.plan.fill import fill_slot, make_filling
from mergemill.engine.plan.lora_modules import find_patterns
from mergemill.engine.plan.settings import Site
from mergemill.engine.plan.slots import Candidate, Slot
from mergemill.engine.plan.small_files import CARD_NAME, RECIPE_NAME
from mergemill.engine.plan.steps import Steps
from mergemill.engine.plan.values import Origin, OutputTensor, Plan, SmallFile, SourceUse
from mergemill.engine.recipe import ModelEntry, ModelRef, Parameters, Recipe
from mergemill.engine.recipe.adapters import AdapterRecipe, GivenAdapters, load_adapters, parse_adapters
from mergemill.engine.storage.store import Storage, make_storage
from mergemill.engine.tensors.combined import BY_SVD, ON_FACTORS, TYPES, Combined, FactorPair, Formula, Sign
from mergemill.engine.tensors.cuts import Shape
from mergemill.engine.tensors.dtypes import RECIPE_DTYPES, promote
from mergemill.engine.tensors.expressions import Expression, Leaf
from mergemill.engine.tensors.low_rank import Factor, LowRank
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.nothing import Nothing
from mergemill.engine.tensors.thin import Factors, Halves, Side, Thin

KIND = "adapters"
_KNOWN = {"density", "svd_rank", "majority_sign_method", "svd_clamp"}
_ZERO = ModelRef(path="the base of zeros")


@dataclass(frozen=True, slots=True)
class _Module:
    """A module that one adapter changes at least."""

    path: str
    kind: str  # "" or "embedding_"
    having: tuple[tuple[int, StoredTensor, StoredTensor, int, float], ...]  # which adapter, A, B, rank and scale
    into: int
    out: int

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(rank for _, _, _, rank, _ in self.having)

    def name_side(self, side: str) -> str:
        tail = f"lora_embedding_{side}" if self.kind else f"lora_{side}.weight"
        return f"base_model.model.{self.path}.{tail}"


def make_adapter_plan(
    given: GivenAdapters, *, seed: int = 0, storage: Mapping[str, Mapping[str, Any]] | None = None
) -> Plan:
    """Plan the adapter that a document with ``adapters`` describes: a value, a path, a mapping or YAML text.

    seed: of what is dropped at random. storage: options of storage by scheme. Raises `InputError`.
    """
    recipe = load_adapters(given)
    where = recipe.file or "recipe"
    reached = make_storage(storage or {})
    adapters = _open(recipe, reached, where)
    modules = _list_modules(adapters, where)
    made = [(module, *_make_factors(module, recipe, seed, where)) for module in modules]
    tensors: list[OutputTensor] = []
    for module, factors, rank in made:
        dtype = RECIPE_DTYPES[recipe.dtype] if recipe.dtype else promote([a.dtype for _, a, _, _, _ in module.having])
        _, a, b, _, _ = module.having[0]
        shapes = {"A": (rank, *a.shape[1:]), "B": (module.out, rank, *b.shape[2:])}
        tensors += [
            OutputTensor(module.name_side(side), dtype, Thin(factors, cast(Side, side), shapes[side])) for side in "AB"
        ]
    text = recipe.text or json.dumps(recipe.model_dump(mode="json", exclude_none=True), indent=2) + "\n"
    config = _make_config(recipe, adapters, {module.path: rank for module, _, rank in made}, reached, where)
    names = [str(entry.adapter) for entry in recipe.adapters]
    card = make_adapter_card(
        " + ".join(name.rstrip("/").rpartition("/")[2] for name in names),
        str(config["base_model_name_or_path"]),
        [f"`{shorten_path(name)}`" for name in names],
        text,
    )
    seal = SmallFile(CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode(), None)
    return finish(
        Draft(
            origin=Origin(
                KIND,
                str(recipe.combination_type or f"{recipe.merge_method} in {recipe.space}"),
                recipe.model_dump(mode="json", exclude_none=True),
                text,
                recipe.file,
                seed,
            ),
            tensors=tensors,
            files=[SmallFile(CARD_NAME, card.encode(), None), SmallFile(RECIPE_NAME, text.encode(), None)],
            sources=[_use(name, adapter) for name, adapter in zip(names, adapters, strict=True)],
            donor="",
            dtype_from="as dtype says" if recipe.dtype else "as the adapters are stored",
            storage=storage or {},
            warnings=_warn(recipe, made, where),
            seal=lambda shards, written: seal,
            name_shard=lambda place, count: WEIGHTS_NAME,
        ),
        ONE_SHARD,
    )


def _open(recipe: AdapterRecipe, storage: Storage, where: str) -> list[Adapter]:
    refs = [entry.adapter for entry in recipe.adapters]
    if twice := next((ref for ref in refs if refs.count(ref) > 1), None):
        raise PlanError(f"{where}: {twice} is named twice; name it once, with its weights added up")
    with ThreadPoolExecutor(min(len(refs), 8)) as pool:
        adapters = list(pool.map(lambda ref: open_adapter(ref.path, ref.revision, storage), refs))
    for adapter in adapters:
        if adapter.config.has_magnitudes:
            raise PlanError(f"{where}: {adapter.ref}: is DoRA, whose magnitudes do not add up; merge it into its model")
        if adapter.config.parameters:
            raise PlanError(
                f"{where}: {adapter.ref}: has factors of packed experts (target_parameters), which are not combined; "
                f"merge each adapter into its model, and the models"
            )
        other = next(iter(adapter.whole.values()), None) or next(
            (each for of in adapter.parts.values() for part, each in of.items() if part in ("bias", "tokens")), None
        )
        if other is not None:
            raise PlanError(
                f"{where}: {adapter.ref}: tensor {other.name} stands for one of the base's and does not add up; merge "
                f"each adapter into its model, and the models"
            )
    return adapters


def _list_modules(adapters: Sequence[Adapter], where: str) -> list[_Module]:
    found: dict[tuple[str, str], list[tuple[int, StoredTensor, StoredTensor, int, float]]] = {}
    for number, adapter in enumerate(adapters):
        for path, parts in adapter.parts.items():
            kind = "embedding_" if any(part.startswith("embedding") for part in parts) else ""
            a, b = parts.get(f"{kind}A"), parts.get(f"{kind}B")
            half = a or b
            if half is not None and (a is None or b is None):
                raise PlanError(f"{where}: {adapter.ref}: tensor {half.name} is half of a pair; the other is not there")
            if a is None or b is None:
                continue
            rank = adapter.config.find_rank(path)
            if a.shape[0] != rank or b.shape[1] != rank:
                raise PlanError(
                    f"{where}: {adapter.ref}: tensor {a.name} has shape {list(a.shape)}, its other half "
                    f"{list(b.shape)}, and by its config the rank is {rank}"
                )
            found.setdefault((path, kind), []).append((number, a, b, rank, adapter.config.find_scale(path)))
    modules = []
    for (path, kind), having in sorted(found.items()):
        _, a, b, _, _ = having[0]
        for _, other_a, other_b, _, _ in having[1:]:
            if (other_a.shape[1:], other_b.shape[0]) != (a.shape[1:], b.shape[0]):
                raise PlanError(
                    f"{where}: module {path}: {other_a.name} has shape {list(other_a.shape)} and another adapter's "
                    f"{list(a.shape)}; are they of one base?"
                )
        modules.append(_Module(path, kind, tuple(having), prod(a.shape[1:]), b.shape[0]))
    return modules


def _make_factors(module: _Module, recipe: AdapterRecipe, seed: int, where: str) -> tuple[Factors, int]:
    kind = recipe.combination_type
    if kind is None:
        return _merge(module, recipe, seed, where)
    if kind not in TYPES:
        raise PlanError(f"{where}: combination_type {kind!r} is unknown; known are {', '.join(TYPES)}")
    formula, svd_rank = _read_formula(module, recipe, seed, where)
    weights = [_find_weight(recipe, number, where) for number, *_ in module.having]
    if kind in ON_FACTORS and len(set(module.ranks)) > 1:
        better = "svd" if kind == "linear" else f"{kind}_svd"
        raise PlanError(
            f"{where}: module {module.path}: the adapters have ranks {', '.join(map(str, module.ranks))}, and {kind} "
            f"adds up factors of one; use {better}, cat or a merge_method"
        )
    rank = module.ranks[0]
    if kind == "cat":
        rank = sum(module.ranks)
    elif kind in BY_SVD:
        rank = min(svd_rank or max(module.ranks), module.into, module.out)
    return Combined(_pair(module, weights), module.into, module.out, rank, formula), rank


def _read_formula(module: _Module, recipe: AdapterRecipe, seed: int, where: str) -> tuple[Formula, int]:
    given = dict(recipe.parameters)
    if unknown := sorted(given.keys() - _KNOWN):
        raise PlanError(f"{where}: parameters: {unknown[0]!r} is unknown; known are {', '.join(sorted(_KNOWN))}")
    kind, density = str(recipe.combination_type), given.get("density", 1.0)
    majority, clamp, rank = given.get("majority_sign_method", "total"), given.get("svd_clamp"), given.get("svd_rank", 0)
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise PlanError(f"{where}: parameters: density is a share, above 0 and up to 1, not {density!r}")
    if majority not in ("total", "frequency"):
        raise PlanError(f"{where}: parameters: majority_sign_method is total or frequency, not {majority!r}")
    if clamp is not None and (isinstance(clamp, bool) or not isinstance(clamp, int | float) or not 0 < clamp <= 1):
        raise PlanError(f"{where}: parameters: svd_clamp is a quantile, above 0 and up to 1, not {clamp!r}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise PlanError(f"{where}: parameters: svd_rank is a whole number, not {rank!r}")
    drawn = zlib.crc32(f"{seed} {module.path}".encode())
    return Formula(kind, float(density), cast(Sign, majority), clamp, drawn if "dare" in kind else 0), rank


def _find_weight(recipe: AdapterRecipe, number: int, where: str) -> float:
    given = dict(recipe.adapters[number].parameters)
    weight = given.pop("weight", 1.0)
    if given or isinstance(weight, bool) or not isinstance(weight, int | float):
        what = f"{sorted(given)[0]!r} is unknown; known is weight" if given else f"weight is a number, not {weight!r}"
        raise PlanError(f"{where}: {recipe.adapters[number].adapter}: {what}")
    return float(weight)


def _pair(module: _Module, weights: Sequence[float]) -> tuple[FactorPair, ...]:
    return tuple(
        FactorPair(cast(Leaf, express(a)), cast(Leaf, express(b)), rank, scale, weight)
        for (_, a, b, rank, scale), weight in zip(module.having, weights, strict=True)
    )


def _merge(module: _Module, recipe: AdapterRecipe, seed: int, where: str) -> tuple[Factors, int]:
    """Return the factors of a method's merge of the changes."""
    pairs, method = _pair(module, [1.0] * len(module.having)), get_method(str(recipe.merge_method))
    most = min(module.into, module.out, *([] if recipe.space == "delta" else [sum(module.ranks)]))
    rank = most if recipe.rank == "full" else min(recipe.rank, most)
    if len(pairs) == 1 and method.least_inputs > 1:
        formula = Formula("svd")
        return Combined(pairs, module.into, module.out, min(rank, pairs[0].rank), formula), min(rank, pairs[0].rank)
    made: list[Expression]
    if recipe.space == "delta":
        made = [_multiply(pair, module) for pair in pairs]
    else:
        wide = module.into if recipe.space == "knots" else min(module.into, sum(module.ranks))
        made = [Nothing((min(module.out, sum(module.ranks)), wide)) for _ in pairs]
    merged = _fill(module, made, method, recipe, seed, where)
    if recipe.space == "delta":
        return Halves(merged, 1, Shape(module.out, module.into), rank), rank
    if not isinstance(merged, Merged):
        return Combined(pairs[:1], module.into, module.out, rank, Formula("svd")), rank
    kept = tuple(pair for pair, each in zip(pairs, made, strict=True) if any(each is other for other in merged.inputs))
    formula = Formula(recipe.space, merge=merged, bases=len(merged.inputs) - len(kept))
    return Combined(kept, module.into, module.out, rank, formula), rank


def _multiply(pair: FactorPair, module: _Module) -> Expression:
    left, right = Factor(pair.b, pair.rank, 1), Factor(pair.a, 1, module.into)
    whole = Nothing((module.out, module.into))
    return LowRank(whole, left, right, pair.rank, pair.scale, module.out, module.into)


def _fill(
    module: _Module, made: Sequence[Expression], method: Method, recipe: AdapterRecipe, seed: int, where: str
) -> Expression:
    """Return the method over the changes, with its settings for this module."""
    if method.base == "first of two":
        raise PlanError(f"{where}: {method.name} goes from a base to one model, and adapters have none; take another")
    entries = [recipe.adapters[number] for number, *_ in module.having]
    name, base = f"{module.path}.weight", None if method.base == "none" else str(_ZERO)
    models = tuple(ModelEntry(model=entry.adapter, parameters=entry.parameters) for entry in entries)
    both = Recipe(merge_method=method.name, base_model=None if base is None else _ZERO, models=models)
    offers = {str(entry.adapter): {name: Offer(each, ())} for entry, each in zip(entries, made, strict=True)}
    if base is not None:
        offers[base] = {name: Offer(Nothing(made[0].shape), ())}
    candidates = [
        Candidate(str(entry.adapter), name, entry.parameters, number)
        for entry, (number, *_) in zip(entries, module.having, strict=True)
    ]
    if base is not None:
        candidates.append(Candidate(base, name, Parameters(), len(recipe.adapters)))
    filling = make_filling(both, offers, _find_family(), method, Steps(None, ()), {}, seed, where)
    filled = fill_slot(Slot(Site(name, 0.0, (recipe.parameters,)), tuple(candidates), base), filling, Ledger())
    assert filled is not None, "something is offered for it"
    return filled.expression


def _find_family() -> Family:
    return choose_family({})


def _make_config(
    recipe: AdapterRecipe, adapters: Sequence[Adapter], ranks: Mapping[str, int], storage: Storage, where: str
) -> dict[str, Any]:
    """Return the result's config: scales are 1, whatever those of the adapters were."""
    if len({adapter.config.transposed for adapter in adapters}) > 1:
        raise PlanError(f"{where}: fan_in_fan_out is true for one adapter and not for another; are they of one base?")
    first = [json.loads(read_small(each.files[CONFIG_NAME], CONFIG_NAME, storage)) for each in adapters]
    usual = max(ranks.values(), default=1)
    pattern = find_patterns(dict(ranks), usual)
    same = all(config.get("target_modules") == first[0].get("target_modules") for config in first)
    alike = same and all(each.parts.keys() == adapters[0].parts.keys() for each in adapters)
    base = recipe.base_model
    return {
        "alpha_pattern": pattern,
        "base_model_name_or_path": base.path if base is not None else adapters[0].config.base,
        "bias": "none",
        "ensure_weight_tying": any(adapter.config.ties for adapter in adapters),
        "fan_in_fan_out": adapters[0].config.transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": pattern,
        "revision": base.revision if base is not None else first[0].get("revision"),
        "target_modules": first[0].get("target_modules") if alike else sorted(ranks),
        "target_parameters": None,
        "task_type": first[0].get("task_type"),
        "use_dora": False,
        "use_rslora": False,
    }


def _use(name: str, adapter: Adapter) -> SourceUse:
    tensors = [each for parts in adapter.parts.values() for each in parts.values()]
    return SourceUse(name, adapter.path, len(tensors), len(tensors), 0, {}, sum(each.nbytes for each in tensors))


def _warn(recipe: AdapterRecipe, made: Sequence[tuple[_Module, Factors, int]], where: str) -> list[str]:
    told = []
    if recipe.combination_type in ON_FACTORS and len(recipe.adapters) > 1:
        told.append(
            f"{where}: {recipe.combination_type} adds up A and B each by itself, as peft does, which is not the sum of "
            f"the changes; that is svd or cat"
        )
    if recipe.merge_method and recipe.space == "delta" and recipe.rank == "full":
        largest = max((rank for _, _, rank in made), default=0)
        told.append(f"{where}: rank full: factors of up to rank {largest}, larger than the matrices; 'rank' cuts them")
    lacking = [module.path for module, _, _ in made if len(module.having) < len(recipe.adapters)]
    if lacking:
        more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
        told.append(f"{where}: {lacking[0]}{more} are not in all adapters, and are made of those that have them")
    return told


def replan_adapters(origin: Origin, storage: Mapping[str, Mapping[str, Any]] | None) -> Plan:
    """Plan again what an output says that it was made from."""
    recipe = (
        parse_adapters(origin.text, name=origin.name or "recipe")
        if origin.text
        else AdapterRecipe.model_validate(dict(origin.value))
    )
    return make_adapter_plan(recipe, seed=origin.seed, storage=storage)
