"""What is asked of a family: a whole merge that loads and is the average; a stack whose layers are what they were."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from families.tiny import LAYERS
from torch import nn
from transformers import PreTrainedModel

from mergemill.engine import make_plan, merge
from mergemill.engine.checkpoint import layer_stacks, open_checkpoint
from mergemill.engine.errors import InputError
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import parse_recipe

RANGES = ((0, 2), (1, LAYERS))
GIVERS = [layer for first, last in RANGES for layer in range(first, last)]
# The number of a layer, by its names; and what is calculated from it, of which the plan's warnings tell.
_NUMBERS = (
    "layer_idx", "layer_id", "layer_number", "layer_index", "idx", "index", "block_idx", "layer_num", "training",
    "seed",
    "attention_layers", "attn_layers", "attn_residual_add_idx", "mlp_residual_add_idx", "lambda_init", "residual_scale",
    "scaling_factor",
    "num_hidden_layers",
)  # fmt: skip


def plan_of(value: Mapping[str, Any]) -> Plan:
    """Return the plan of a recipe."""
    return make_plan(parse_recipe(json.dumps(value)))


def merge_whole(a: Path, b: Path, out: Path) -> None:
    """Write the average of two models."""
    models = [{"model": str(a)}, {"model": str(b)}]
    merge(
        parse_recipe(json.dumps({"merge_method": "linear", "models": models, "parameters": {"weight": 1}})),
        out,
        workers=0,
    )


def stack_recipe(a: Path) -> dict[str, Any]:
    """Return the recipe of a stack whose second layer comes twice; of several stacks it is the language model's."""
    slices = [{"sources": [{"model": str(a), "layer_range": list(each)}]} for each in RANGES]
    try:
        plan_of({"merge_method": "passthrough", "slices": slices})
    except InputError as error:
        if "'slices' needs models with one stack" not in str(error):
            return {"merge_method": "passthrough", "slices": slices}
    else:
        return {"merge_method": "passthrough", "slices": slices}
    stacks = layer_stacks(open_checkpoint(str(a)).tensors)
    long = [name for name, layers in stacks.items() if layers[-1] + 1 == LAYERS]
    if not long:
        return {"merge_method": "passthrough", "slices": slices}
    main = next((name for name in long if "decoder" in name or "language" in name or "text" in name), long[-1])
    modules = {main: {"slices": slices}, "default": {"models": [{"model": str(a)}]}}
    return {"merge_method": "passthrough", "modules": modules}


def load(kind: type[PreTrainedModel], folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a model as transformers loads it, and what it complains of."""
    model, told = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    return model, {key: sorted(map(str, value)) for key, value in told.items() if value}


def find_average_fault(model: PreTrainedModel, a: PreTrainedModel, b: PreTrainedModel) -> str:
    """Return a tensor that is not the average of two models' tensors; nothing where all are."""
    first, second = a.state_dict(), b.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            wanted = (first[name].float() + second[name].float()) / 2
            if value.shape != wanted.shape or not torch.allclose(value.float(), wanted, atol=1e-6, equal_nan=True):
                return name
    return ""


def iter_stack_faults(out: PreTrainedModel, donor: PreTrainedModel) -> Iterator[str]:
    """Yield what of a stack's layers is not what it was in the donor."""
    before, after = dict(donor.named_modules()), dict(out.named_modules())
    grown = [
        name
        for name, each in before.items()
        if isinstance(each, nn.ModuleList)
        and len(each) == LAYERS
        and isinstance(after.get(name), nn.ModuleList)
        and len(after[name]) == len(GIVERS)
    ]
    if not grown:
        yield "no stack of layers grew"
    for name in grown:
        for new, old in enumerate(GIVERS):
            wanted, found = describe(before[name][old]), describe(after[name][new])
            if wanted != found:
                keys = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
                yield f"{name}.{new} (was {old}): " + "; ".join(
                    f"{key} {wanted.get(key)} -> {found.get(key)}" for key in keys[:4]
                )
                break
            own, its = before[name][old].state_dict(), after[name][new].state_dict()
            bad = next((key for key in own if key not in its or not torch.equal(own[key], its[key])), None)
            if bad:
                yield f"{name}.{new}.{bad} has other values than in layer {old}"
                break
    inside = tuple(f"{name}." for name in grown)
    own, its = donor.state_dict(), out.state_dict()
    for name, value in own.items():
        if not name.startswith(inside) and (name not in its or not torch.equal(its[name], value)):
            yield f"{name} is another"
            break
    for path, kinds in list_kinds(donor.config):
        its_kinds = dict(list_kinds(out.config)).get(path)
        if len(kinds) != LAYERS:
            continue
        wanted_kinds = [kinds[old] for old in GIVERS]
        if its_kinds not in (wanted_kinds, kinds):
            yield f"config {path}: {its_kinds}, not {wanted_kinds}"


def list_kinds(config: Any, path: str = "") -> list[tuple[str, list[Any]]]:
    """Return the lists of a config that say what each layer is."""
    found = []
    for key in (
        "layer_types",
        "mlp_layer_types",
        "layers_block_type",
        "block_types",
        "attention_layers",
        "indexer_types",
    ):
        value = getattr(config, key, None)
        if isinstance(value, list | tuple):
            found.append((path + key, list(value)))
    for key in getattr(config, "sub_configs", {}):
        inner = getattr(config, key, None)
        if inner is not None and not isinstance(inner, dict):
            found += list_kinds(inner, f"{path}{key}.")
    return found


def describe(layer: nn.Module) -> dict[str, Any]:
    """Return the class, the shapes and the plain attributes of a layer's modules."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        found[name] = type(module).__name__
        for key, value in vars(module).items():
            if key.lstrip("_") not in _NUMBERS and _is_plain(value):
                found[f"{name}:{key}"] = value
    found |= {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)
