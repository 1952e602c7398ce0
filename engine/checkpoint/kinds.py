"""What a layer is by its place: config keys from which models compute the kind of each layer, from its index.

Where layers move, such a key tells the loader something else than what the layers are. Three things can happen: all
layers are at places of their own kind, and nothing changes; the family also reads an explicit list, which is written;
or the stack is refused. Formulas: the configuration classes of transformers 5.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergemill.engine.errors import CheckpointError

Config = Mapping[str, Any]  # the part of a config that counts the layers
Layer = tuple[Config, int, int]  # the config that a layer comes with, its index there, and the layers counted there

# Lists with one entry a layer, which stand above the formulas of attention, and above those of what comes after it.
_ATTENTION_LISTS = ("layer_types", "layers_block_type", "hybrid_override_pattern")
_MLP_LISTS = ("mlp_layer_types", "moe_layers", "layers_block_type", "hybrid_override_pattern")

# Families that compute the kinds of attention, and read `layer_types` where it is there.
_READ_TYPES = (
    "cohere2", "gemma2", "gemma3", "gemma3_text", "modernbert", "qwen2", "qwen2_moe", "qwen3", "qwen3_next",
)  # fmt: skip

_DEFAULTS: Mapping[str, Config] = {
    "cohere2": {"sliding_window_pattern": 4},
    "deepseek_v3": {"first_k_dense_replace": 3},
    "gemma2": {"sliding_window_pattern": 2},
    "gemma3": {"sliding_window_pattern": 6},
    "gemma3_text": {"sliding_window_pattern": 6},
    "jamba": {
        "attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "modernbert": {"global_attn_every_n_layers": 3},
    "qwen3_next": {"full_attention_interval": 4},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Rule:
    """One key, and the kind that it gives a layer."""

    key: str
    lists: tuple[str, ...]  # that stand above it
    find: Callable[[Config, int, int], Any]  # config, index, layers
    words: tuple[str, str] | None = None  # `layer_types` says for True and for False


def _every(key: str, *, first: int = 1) -> Callable[[Config, int, int], bool]:
    return lambda config, layer, _: (layer + first) % config[key] == 0


def _offset(key: str, offset: str) -> Callable[[Config, int, int], bool]:
    return lambda config, layer, _: layer % config[key] == config.get(offset, 0)


def _after_dense(config: Config, layer: int, _: int) -> bool:
    every = config.get("moe_layer_freq")
    return layer >= config["first_k_dense_replace"] and (type(every) is not int or every < 1 or layer % every == 0)


def _within(config: Config, layer: int, _: int) -> bool:
    last, every = config.get("moe_layer_end_index"), config.get("moe_layer_interval")
    beyond = type(last) is int and last >= 0 and layer > last
    is_one = type(every) is not int or every < 1 or (layer + 1) % every == 0
    return layer >= config["moe_layer_start_index"] and not beyond and is_one


def _windowed(config: Config, layer: int, _: int) -> bool:
    return bool(config.get("use_sliding_window")) and layer >= config["max_window_layers"]


_RULES = (
    _Rule("sliding_window_pattern", _ATTENTION_LISTS, _every("sliding_window_pattern"), ("full", "sliding")),
    _Rule("full_attention_interval", _ATTENTION_LISTS, _every("full_attention_interval"), ("full", "linear")),
    _Rule(
        "global_attn_every_n_layers",
        _ATTENTION_LISTS,
        _every("global_attn_every_n_layers", first=0),
        ("full", "sliding"),
    ),
    _Rule("dense_attention_every_n_layers", (), _every("dense_attention_every_n_layers")),  # phi3small's own code
    _Rule("max_window_layers", _ATTENTION_LISTS, _windowed, ("sliding", "full")),
    _Rule("attn_layer_period", _ATTENTION_LISTS, _offset("attn_layer_period", "attn_layer_offset")),
    _Rule("no_rope_layer_interval", ("no_rope_layers",), _every("no_rope_layer_interval")),
    _Rule("num_kv_shared_layers", (), lambda config, layer, count: layer >= count - config["num_kv_shared_layers"]),
    _Rule("first_k_dense_replace", _MLP_LISTS, _after_dense),
    _Rule("num_dense_layers", _MLP_LISTS, lambda config, layer, _: layer >= config["num_dense_layers"]),
    _Rule("expert_layer_period", _MLP_LISTS, _offset("expert_layer_period", "expert_layer_offset")),
    _Rule("decoder_sparse_step", _MLP_LISTS, _every("decoder_sparse_step")),
    _Rule("interleave_moe_layer_step", _MLP_LISTS, _every("interleave_moe_layer_step")),
    _Rule("moe_layer_start_index", _MLP_LISTS, _within),
)
_FROM_ZERO = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
_CYCLES = ("block_types", "_block_types")  # of recurrentgemma: the kinds, again and again
_LINEAR, _LINEAR_LISTS = "linear_attn_config", ("full_attn_layers", "kda_layers")  # of kimi
_SOURCES = "kv_source_layers"  # of mistral_large4
_RUNS = "attention_types"  # of gpt_neo: [[[kinds], times], …]


def kind_changes(config: Config, layers: Sequence[Layer]) -> dict[str, Any]:
    """Return the keys that change when the stack becomes `layers`, so that each is of the kind that it was.

    Raises `CheckpointError` for a layer that the config would give another kind, where no list can say it.
    """
    changes: dict[str, Any] = {}
    for rule in _RULES:
        _check_told(rule, config)
        if not _holds(rule, config):
            continue
        wanted = [_find(rule, config, layer) for layer in layers]
        given = [rule.find(_complete(config), new, len(layers)) for new in range(len(layers))]
        if wanted == given:
            continue
        if rule.words is None or config.get("model_type") not in _READ_TYPES:
            new = next(new for new, pair in enumerate(zip(wanted, given, strict=True)) if pair[0] != pair[1])
            raise CheckpointError(
                f"config.json: {rule.key} gives each layer its kind by its place, and layer {new} of the output, which "
                f"was layer {layers[new][1]}, would be of another kind there; take slices that leave each kind at the "
                f"places of its kind"
            )
        changes["layer_types"] = [_name(rule, kind) for kind in wanted]
    return changes | _cycle_changes(config, layers) | _linear_changes(config, layers) | _source_changes(config, layers)


def find_types(config: Config, layer: int, count: int) -> tuple[str, ...]:
    """Return what of a layer's kind an explicit list can say, where none is there yet."""
    named = config.get("model_type") in _READ_TYPES
    types = [_name(rule, _find(rule, config, (config, layer, count))) for rule in _RULES if named and rule.words]
    named_elsewhere = (_find_cycle(config, layer), _find_run(config, layer), *_find_linear(config, layer))
    return tuple(str(each) for each in (*types, *named_elsewhere) if each)


def say_value(value: Any) -> str:
    """Return a few words for a value of a config, whatever it is.

    >>> say_value("4"), say_value(float("nan")), say_value([1]), say_value({})
    ('"4"', 'NaN', 'a list', 'an object')
    """
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value)[:40]


def _check_told(rule: _Rule, config: Config) -> None:
    """Raise `CheckpointError` where a key that gives layers their kind is no number: nobody could tell kinds by it."""
    value = config.get(rule.key)
    if value is not None and type(value) is not int and not any(config.get(name) for name in rule.lists):
        raise CheckpointError(
            f"config.json: {rule.key}: {say_value(value)} should give each layer its kind by its place, and is no "
            f"whole number; without it, or a list such as layer_types, layers cannot be moved"
        )


def _holds(rule: _Rule, config: Config) -> bool:
    """Whether the key says something in this config."""
    value, least = _complete(config).get(rule.key), 0 if rule.key in _FROM_ZERO else 1
    return type(value) is int and value >= least and not any(config.get(name) for name in rule.lists)


def _find(rule: _Rule, config: Config, layer: Layer) -> Any:
    """Return the kind of a layer where it comes from; by the donor's `config` where its own says nothing."""
    own, index, count = layer
    types = own.get("layer_types")
    if rule.words and isinstance(types, list) and index < len(types):
        return types[index] == _name(rule, True)
    if not _holds(rule, own):
        return rule.find(_complete(config), index, count) if _holds(rule, config) else None
    return rule.find(_complete(own), index, count)


def _name(rule: _Rule, kind: Any) -> str:
    assert rule.words is not None
    return "" if kind is None else f"{rule.words[0] if kind else rule.words[1]}_attention"


def _complete(config: Config) -> Config:
    return {**_DEFAULTS.get(str(config.get("model_type")), {}), **config}


def _cycle_changes(config: Config, layers: Sequence[Layer]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for key in _CYCLES:
        cycle = config.get(key)
        if isinstance(cycle, list) and cycle:
            kinds = [_find_cycle(own, index) for own, index, _ in layers]
            if kinds != [cycle[new % len(cycle)] for new in range(len(layers))]:
                changes[key] = kinds
    runs = [_find_run(own, index) for own, index, _ in layers]
    if isinstance(config.get(_RUNS), list) and runs != [_find_run(config, new) for new in range(len(layers))]:
        changes[_RUNS] = [[[kind], 1] for kind in runs]
    return changes


def _linear_changes(config: Config, layers: Sequence[Layer]) -> dict[str, Any]:
    """Return kimi's lists of which layers have which attention, counted from 1, as the stack has them."""
    own = config.get(_LINEAR)
    if not isinstance(own, Mapping):
        return {}
    kinds = [_find_linear(giver, index) for giver, index, _ in layers]
    lists = {key: [new for new, kind in enumerate(kinds, 1) if key in kind] for key in _LINEAR_LISTS if key in own}
    return {_LINEAR: {**own, **lists}} if any(own[key] != found for key, found in lists.items()) else {}


def _find_linear(config: Config, layer: int) -> tuple[str, ...]:
    own = config.get(_LINEAR)
    lists = {key: own.get(key) for key in _LINEAR_LISTS} if isinstance(own, Mapping) else {}
    return tuple(key for key, found in lists.items() if isinstance(found, list) and layer + 1 in found)


def _source_changes(config: Config, layers: Sequence[Layer]) -> dict[str, Any]:
    """Return for each layer of the stack the layer whose keys and values it uses: itself, or one before it."""
    if not isinstance(config.get(_SOURCES), list):
        return {}
    found: list[int] = []
    for new, (giver, index, _) in enumerate(layers):
        sources = giver.get(_SOURCES)
        source = sources[index] if isinstance(sources, list) and index < len(sources) else index
        places = [at for at in range(new) if layers[at][:2] == (giver, source) and found[at] == at]
        if source != index and not places:
            raise CheckpointError(
                f"config.json: {_SOURCES} says that layer {index} uses the keys and values of layer {source}, which "
                f"is not before it in the output; take slices that have both"
            )
        found.append(new if source == index else places[-1])
    return {} if found == config[_SOURCES] else {_SOURCES: found}


def _find_cycle(config: Config, layer: int) -> Any:
    cycle = next((config[key] for key in _CYCLES if isinstance(config.get(key), list) and config[key]), None)
    return cycle[layer % len(cycle)] if cycle else None


def _find_run(config: Config, layer: int) -> Any:
    """Return a layer's kind by runs: ``[[["global", "local"], 2]]`` is global, local, global, local."""
    runs = config.get(_RUNS)
    for run in runs if isinstance(runs, list) else ():
        match run:
            case [list(kinds), int(times)] if kinds:
                if layer < len(kinds) * times:
                    return kinds[layer % len(kinds)]
                layer -= len(kinds) * times
    return None
