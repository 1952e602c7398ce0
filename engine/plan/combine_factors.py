"""What the factors of a combined adapter are made of: a formula of peft's, or a merge method in one of three spaces."""

import zlib
from collections.abc import Sequence
from typing import cast

from mergemill.engine.checkpoint.family import choose_family
from mergemill.engine.errors import PlanError
from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.methods.contract import Method
from mergemill.engine.offers.formats import express
from mergemill.engine.offers.offer import Offer
from mergemill.engine.plan.combine_modules import CombinedModule
from mergemill.engine.plan.coverage import Ledger
from mergemill.engine.plan.fill import fill_slot, make_filling
from mergemill.engine.plan.settings import Site
from mergemill.engine.plan.slots import Candidate, Slot
from mergemill.engine.plan.steps import Steps
from mergemill.engine.recipe import ModelEntry, ModelRef, Parameters, Recipe
from mergemill.engine.recipe.adapters import AdapterRecipe
from mergemill.engine.tensors.combined import BY_SVD, ON_FACTORS, TYPES, Combined, FactorPair, Formula, Sign
from mergemill.engine.tensors.cuts import Shape
from mergemill.engine.tensors.expressions import Expression, Leaf
from mergemill.engine.tensors.low_rank import Factor, LowRank
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.nothing import Nothing
from mergemill.engine.tensors.thin import Factors, Halves

_KNOWN = {"density", "svd_rank", "majority_sign_method", "svd_clamp"}
_ZERO = ModelRef(path="the base of zeros")


def make_factors(module: CombinedModule, recipe: AdapterRecipe, seed: int, where: str) -> tuple[Factors, int]:
    """Return what A and B of a module are made of, and their rank; `PlanError` for what cannot be combined so."""
    kind = recipe.combination_type
    if kind is None:
        return _merge(module, recipe, seed, where)
    if recipe.rank != "full":
        raise PlanError(f"{where}: rank is for a merge_method; {kind} takes svd_rank, below parameters, where it cuts")
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


def _read_formula(module: CombinedModule, recipe: AdapterRecipe, seed: int, where: str) -> tuple[Formula, int]:
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


def _pair(module: CombinedModule, weights: Sequence[float]) -> tuple[FactorPair, ...]:
    return tuple(
        FactorPair(cast(Leaf, express(a)), cast(Leaf, express(b)), rank, scale, weight)
        for (_, a, b, rank, scale), weight in zip(module.having, weights, strict=True)
    )


def _merge(module: CombinedModule, recipe: AdapterRecipe, seed: int, where: str) -> tuple[Factors, int]:
    """Return the factors of a method's merge of the changes."""
    pairs, method = _pair(module, [1.0] * len(module.having)), get_method(str(recipe.merge_method))
    most = min(module.into, module.out, *([] if recipe.space == "delta" else [sum(module.ranks)]))
    rank = recipe.find_rank(module.path, most)
    if rank is None:
        raise PlanError(f"{where}: rank: says nothing of module {module.path}; name every module that an adapter has")
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


def _multiply(pair: FactorPair, module: CombinedModule) -> Expression:
    left, right = Factor(pair.b, pair.rank, 1), Factor(pair.a, 1, module.into)
    whole = Nothing((module.out, module.into))
    return LowRank(whole, left, right, pair.rank, pair.scale, module.out, module.into)


def _fill(
    module: CombinedModule, made: Sequence[Expression], method: Method, recipe: AdapterRecipe, seed: int, where: str
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
    filling = make_filling(both, offers, choose_family({}), method, Steps(None, ()), {}, seed, where)
    filled = fill_slot(Slot(Site(name, 0.0, (recipe.parameters,)), tuple(candidates), base), filling, Ledger())
    assert filled is not None, "something is offered for it"
    return filled.expression
