"""The planners by their kinds: how a plan is made again from what its output keeps of its origin.

To add a tool: one planner that returns a `Draft`, its line here, and one command.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mergemill.engine.errors import OutputError
from mergemill.engine.plan.make import make_plan
from mergemill.engine.plan.values import Origin, Plan
from mergemill.engine.recipe import AnyRecipe, Mixture, Recipe, parse_document

Storage = Mapping[str, Mapping[str, Any]] | None
Replan = Callable[[Origin, str | int, Storage], Plan]  # given the origin, the size of shards and options of storage


def replan(origin: Origin, shard_size: str | int, storage: Storage) -> Plan:
    """Return the plan of an origin, made anew; `OutputError` where this version has no such planner."""
    if origin.kind not in PLANNERS:
        raise OutputError(f"was made by {origin.kind!r}, which this version of mergemill does not know")
    return PLANNERS[origin.kind](origin, shard_size, storage)


def open_recipe(origin: Origin) -> AnyRecipe:
    """Return the recipe of a merge or of a mixture, as its text says it where it has one."""
    if origin.text:
        return parse_document(origin.text, name=origin.name)
    return (Mixture if origin.kind == "mixture" else Recipe).model_validate(dict(origin.value))


def _replan_merge(origin: Origin, shard_size: str | int, storage: Storage) -> Plan:
    return make_plan(open_recipe(origin), seed=origin.seed, shard_size=shard_size, methods=origin.code, storage=storage)


def _replan_raw(origin: Origin, shard_size: str | int, storage: Storage) -> Plan:
    from mergemill.engine.plan.raw import KINDS, make_raw_plan  # which no other merge needs

    return make_raw_plan(
        open_recipe(origin),
        names=KINDS[origin.kind],
        seed=origin.seed,
        shard_size=shard_size,
        methods=origin.code,
        storage=storage,
    )


def _replan_extraction(origin: Origin, shard_size: str | int, storage: Storage) -> Plan:
    from mergemill.engine.plan.extract import replan_extraction  # which no merge needs

    return replan_extraction(origin, storage)


def _replan_transplant(origin: Origin, shard_size: str | int, storage: Storage) -> Plan:
    from mergemill.engine.plan.transplant import plan_transplant  # which no merge needs

    return plan_transplant(origin, shard_size, storage)


def _replan_adapters(origin: Origin, shard_size: str | int, storage: Storage) -> Plan:
    from mergemill.engine.plan.combine import replan_adapters

    return replan_adapters(origin, storage)


def _replan_convert(origin: Origin, shard_size: str | int, storage: Storage) -> Plan:
    from mergemill.engine.plan.convert import make_convert_plan  # which no merge needs

    return make_convert_plan(**origin.value, shard_size=shard_size, storage=storage)


_RAW = ("raw", "raw union", "raw intersection")
PLANNERS: dict[str, Replan] = {
    "merge": _replan_merge,
    "mixture": _replan_merge,
    "convert": _replan_convert,
    **dict.fromkeys(_RAW, _replan_raw),
    "extract-lora": _replan_extraction,
    "transplant": _replan_transplant,
    "adapters": _replan_adapters,
}
OF_RECIPES = ("merge", "mixture", *_RAW)
"""The kinds whose origin is a recipe."""
