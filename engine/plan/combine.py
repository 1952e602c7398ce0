"""Planning adapters that are combined to one: by peft's formulas, or by a merge method in one of three spaces.

The base's weights are not wanted for any: a method's base is a tensor of zeros. What does not add up, because it
replaces weights of the base (`modules_to_save`, biases, tokens) or scales them (DoRA), is refused by name.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mergemill.engine.checkpoint.adapter import Adapter
from mergemill.engine.checkpoint.adapter_config import CONFIG_NAME
from mergemill.engine.checkpoint.card import make_adapter_card, shorten_path
from mergemill.engine.checkpoint.checkpoint import read_small
from mergemill.engine.errors import PlanError
from mergemill.engine.plan.combine_factors import make_factors
from mergemill.engine.plan.combine_modules import CombinedModule, list_modules, open_combined
from mergemill.engine.plan.draft import Draft, finish
from mergemill.engine.plan.extract import ONE_SHARD, WEIGHTS_NAME
from mergemill.engine.plan.lora_modules import find_patterns
from mergemill.engine.plan.small_files import CARD_NAME, RECIPE_NAME
from mergemill.engine.plan.values import Origin, OutputTensor, Plan, SmallFile, SourceUse
from mergemill.engine.recipe.adapters import AdapterRecipe, GivenAdapters, load_adapters, parse_adapters
from mergemill.engine.storage.store import Storage, make_storage
from mergemill.engine.tensors.combined import ON_FACTORS
from mergemill.engine.tensors.dtypes import RECIPE_DTYPES, promote
from mergemill.engine.tensors.thin import Factors, Side, Thin

KIND = "adapters"


def make_adapter_plan(
    given: GivenAdapters, *, seed: int = 0, storage: Mapping[str, Mapping[str, Any]] | None = None
) -> Plan:
    """Plan the adapter that a document with ``adapters`` describes: a value, a path, a mapping or YAML text.

    seed: of what is dropped at random. storage: options of storage by scheme. Raises `InputError`.
    """
    recipe = load_adapters(given)
    where = recipe.file or "recipe"
    reached = make_storage(storage or {})
    adapters = open_combined(recipe, reached, where)
    modules = list_modules(adapters, where)
    made = [(module, *make_factors(module, recipe, seed, where)) for module in modules]
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


def _warn(recipe: AdapterRecipe, made: Sequence[tuple[CombinedModule, Factors, int]], where: str) -> list[str]:
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
