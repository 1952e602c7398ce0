"""``config.json``: the donor's, with only what the merge changed.

The config is edited as a JSON value, never rewritten through a library's classes: keys that nobody here knows
stay, in their order. Changes are a map from the path of a key, ``("text_config", "num_hidden_layers")``, to
its new value; those of several functions are joined with ``|``.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from mergemill.engine.checkpoint.family import Family
from mergemill.engine.checkpoint.kinds import find_types, kind_changes, say_value
from mergemill.engine.errors import CheckpointError

KeyPath: TypeAlias = tuple[str, ...]
Changes: TypeAlias = dict[KeyPath, Any]

REMOVED = object()
"""The new value of a key that the config is to have no more."""

CONFIG_DTYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}  # safetensors' names of the dtypes that a config may name, and the config's

# Keys that count layers which are stored after the others, and predict later tokens; a stack of slices has none.
LATER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")

# Their configs say that head and embedding are tied; transformers stores a head of its own, and reads that.
_NEVER_TIED = {"BigBirdPegasusForCausalLM", "LukeForMaskedLM", "Pop2PianoForConditionalGeneration"}

# A list as long as a stack of fewer layers may well be something else (token ids, sections of a rope).
_FEWEST_TELLING_LAYERS = 8
# And some lists are never one entry a layer, however long: token ids, architectures, sections and factors of one layer.
_NO_LAYER_LISTS = (
    "*token*",
    "*_ids",
    "architectures",
    "*section*",
    "*multipliers",
    "*_mean",
    "*_std",
    "*labels*",
    "kv_source_layers",
)


@dataclass(frozen=True, slots=True)
class LayerCount:
    """Where a config says how many layers a stack has."""

    path: KeyPath  # of the key in the config
    count: int  # layers


def parse_config(text: bytes, *, where: str) -> Mapping[str, Any]:
    """Parse a ``config.json``; `CheckpointError` unless it is a JSON object."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: is not a JSON object")
    return config


def make_config(config_text: bytes, changes: Mapping[KeyPath, Any]) -> bytes:
    """Return the config with `changes`: the same bytes where nothing changes, else 2-space indent."""
    config = json.loads(config_text)
    if all(_holds(config, path, value) for path, value in changes.items()):
        return config_text
    for path, value in changes.items():
        _set_key(config, path, value)
    text = json.dumps(config, indent=2, ensure_ascii=config_text.isascii())
    try:
        return text.encode() + b"\n" * config_text.endswith(b"\n")
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can say
        return json.dumps(config, indent=2).encode() + b"\n" * config_text.endswith(b"\n")


def find_layer_count(config: Mapping[str, Any], family: Family, stack: str) -> LayerCount | None:
    """Return where the config counts the layers of `stack` (a name from `layer_stacks`), if it does.

    Some models store more layers than they count: those that predict later tokens.
    """
    found = (LayerCount(path, _get_key(config, path)) for path in _count_paths(family, stack))
    return next((count for count in found if type(count.count) is int), None)


def _count_paths(family: Family, stack: str) -> Iterator[KeyPath]:
    """Yield the keys that may count a stack, by the first pattern that it matches.

    An encoder's count is no stand-in for a decoder's.
    """
    keys = next((keys for pattern, keys in family.layer_counts if fnmatchcase(stack, pattern)), ())
    return _split_keys(keys)


def check_counts(config: Mapping[str, Any], family: Family, stacks: Iterable[str], *, where: str) -> None:
    """Raise `CheckpointError` where the config counts layers of `stacks`, or tokens, by what counts nothing.

    Refused (2026-11-29) are texts, lists, fractions, NaN, true and numbers below 0: no loader takes them, and the
    output would be written with them. null says as little as a key that is not there.
    """
    layers = [path for stack in {*stacks} or {""} for path in _count_paths(family, stack)]
    for path in dict.fromkeys([*layers, *_places(config, "vocab_size")]):
        value = _get_key(config, path)
        if value is not None and (type(value) is not int or value < 0):
            raise CheckpointError(
                f"{where}: config.json says {'.'.join(path)}: {say_value(value)}, which counts nothing; write a whole "
                "number there"
            )


def find_null_count(config: Mapping[str, Any], family: Family, stack: str) -> str | None:
    """Return the key that should count `stack` and is null, where no other key does count it."""
    if find_layer_count(config, family, stack) is not None:
        return None
    return next((".".join(path) for path in _count_paths(family, stack) if _is_null(config, path)), None)


def _is_null(config: Mapping[str, Any], path: KeyPath) -> bool:
    inner = _find_place(config, path[:-1])
    return path[-1] in inner and inner[path[-1]] is None


def layer_changes(
    config: Mapping[str, Any], family: Family, stack: str, layers: Sequence[tuple[Mapping[str, Any], int]]
) -> Changes:
    """Return what changes when `stack` becomes `layers`, each given by a model: (its config, its layer).

    The layer count, lists with one entry a layer, and lists of layer indices, all beside the count; a layer's
    entries come from the config of the model that gives it. Nothing where the config does not count the stack.
    Raises `CheckpointError` for a layer that a list does not have.
    """
    found = find_layer_count(config, family, stack)
    if found is None:
        return {}
    place = found.path[:-1]
    inner = _find_place(config, place)
    later: Changes = {(*place, key): 0 for key in LATER_LAYERS if inner.get(key)}
    if _are_all(layers, config, found.count):
        return later
    changes: Changes = {found.path: len(layers), **later}
    aliases = (other for key, other in family.count_aliases if key == found.path[-1] and other in inner)
    changes |= {(*place, other): len(layers) for other in aliases}
    own = [(_find_place(giver, place), layer, _count_there(giver, found)) for giver, layer in layers]
    changes |= {(*place, key): value for key, value in kind_changes(inner, own).items()}
    for key, value in inner.items():
        path = (*place, key)
        if _is_of_others(key, stack, family):
            continue
        if _is_index_list(key, value, family):
            listed = {id(giver): _list_layers(giver, path) for giver, _ in layers}
            changes[path] = [new for new, (giver, old) in enumerate(layers) if old in listed[id(giver)]]
        elif key in family.layer_maps and isinstance(value, Mapping):
            changes[path] = _move_entries(layers, path)
        elif _is_layer_list(key, value, found.count, family):
            changes[path] = _pick_layers(value, layers, path)
    return changes


def _find_place(config: Mapping[str, Any], place: KeyPath) -> Mapping[str, Any]:
    found = _get_key(config, place)
    return found if isinstance(found, Mapping) else {}


def _count_there(config: Mapping[str, Any], count: LayerCount) -> int:
    found = _get_key(config, count.path)
    return found if type(found) is int else count.count


def layer_entries(config: Mapping[str, Any], family: Family, stack: str, layer: int) -> tuple[str, ...]:
    """Return what the config says of one layer of `stack` in its lists, or could say in one that is written."""
    found = find_layer_count(config, family, stack)
    if found is None:
        return ()
    inner = _find_place(config, found.path[:-1])
    entries = []
    for key, value in inner.items():
        if _is_of_others(key, stack, family):
            continue
        if _is_index_list(key, value, family):
            entries.append(f"{key}: {layer in value}")
        elif key in family.layer_maps and isinstance(value, Mapping):
            entries.append(f"{key}: {json.dumps(value.get(str(layer)), sort_keys=True)}")
        elif _is_layer_list(key, value, found.count, family) and layer < len(value):
            entries.append(f"{key}: {json.dumps(value[layer], sort_keys=True)}")
    return (*entries, *find_types(inner, layer, found.count))


def _are_all(layers: Sequence[tuple[Mapping[str, Any], int]], config: Mapping[str, Any], count: int) -> bool:
    """Whether `layers` are all of the config's own, in order; `count` is a config's word, and may be any number."""
    return len(layers) == count and [*layers] == [(config, layer) for layer in range(count)]


def dtype_changes(config: Mapping[str, Any], dtype: str) -> Changes:
    """Return what changes when the tensors become `dtype`, by the config's name: ``bfloat16``.

    Each ``torch_dtype`` or ``dtype`` that is there, also in ``text_config``; else a new ``dtype``.
    """
    paths = [path for path in _places(config, "torch_dtype", "dtype") if _get_key(config, path) is not None]
    return {
        path: dtype for path in paths or [("dtype",)] if str(_get_key(config, path)).removeprefix("torch.") != dtype
    }


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """Return whether the config says that the output head is the input embedding; None where it says nothing."""
    if _NEVER_TIED.intersection(_list_architectures(config)):
        return False
    found = next((_get_key(config, path) for path in _places(config, "tie_word_embeddings")), None)
    return found if isinstance(found, bool) else None


def _list_architectures(config: Mapping[str, Any]) -> list[str]:
    named = config.get("architectures")
    return [str(each) for each in named] if isinstance(named, list) else []


def tie_changes(config: Mapping[str, Any], *, tied: bool) -> Changes:
    """Return what changes when the output head is, or no longer is, the input embedding."""
    return _replace(config, "tie_word_embeddings", tied)


def vocabulary_changes(config: Mapping[str, Any], size: int) -> Changes:
    """Return what changes when the vocabulary has `size` rows, padding included."""
    return _replace(config, "vocab_size", size)


def _replace(config: Mapping[str, Any], key: str, value: Any) -> Changes:
    paths = list(_places(config, key)) or [(key,)]
    return {path: value for path in paths if not _holds(config, path, value)}


def _places(config: Mapping[str, Any], *keys: str) -> Iterator[KeyPath]:
    for key in keys:
        for path in ((key,), ("text_config", key)):
            inner = _get_key(config, path[:-1])
            if isinstance(inner, dict) and key in inner:
                yield path


def _split_keys(keys: Iterable[str]) -> Iterator[KeyPath]:
    return (tuple(key.split(".")) for key in keys)


def _get_key(config: Any, path: KeyPath) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _holds(config: Mapping[str, Any], path: KeyPath, value: Any) -> bool:
    found = _get_key(config, path)
    if value is REMOVED:
        return found is None
    return type(found) is type(value) and bool(found == value)


def _set_key(config: dict[str, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        config = config.setdefault(key, {})
    if value is REMOVED:
        config.pop(path[-1], None)
    else:
        config[path[-1]] = value


def _is_index_list(key: str, value: Any, family: Family) -> bool:
    return key in family.layer_index_lists and isinstance(value, list)


def _list_layers(config: Mapping[str, Any], path: KeyPath) -> frozenset[int]:
    found = _get_key(config, path)
    return frozenset(layer for layer in found if isinstance(layer, int)) if isinstance(found, list) else frozenset()


def _is_of_others(key: str, stack: str, family: Family) -> bool:
    return any(key == own and not fnmatchcase(stack, pattern) for own, pattern in family.list_stacks)


def _move_entries(layers: Sequence[tuple[Mapping[str, Any], int]], path: KeyPath) -> dict[str, Any]:
    found = [(new, _get_key(giver, path), old) for new, (giver, old) in enumerate(layers)]
    return {
        str(new): entries[str(old)]
        for new, entries, old in found
        if isinstance(entries, Mapping) and str(old) in entries
    }


def _is_layer_list(key: str, value: Any, count: int, family: Family) -> bool:
    if not isinstance(value, list | str):
        return False
    if key in family.layer_lists:  # sizes may be of two kinds of experts (ernie4_5_vl_moe), and not of layers
        return not key.endswith("_size") or len(value) == count
    if any(fnmatchcase(key, pattern) for pattern in _NO_LAYER_LISTS):
        return False
    return isinstance(value, list) and len(value) == count >= _FEWEST_TELLING_LAYERS


def _pick_layers(value: list[Any] | str, layers: Sequence[tuple[Mapping[str, Any], int]], path: KeyPath) -> Any:
    if not value:  # an empty list stands for the default of every layer
        return value
    picked = [_pick_layer(giver, layer, path) for giver, layer in layers]
    return "".join(picked) if isinstance(value, str) else picked


def _pick_layer(config: Mapping[str, Any], layer: int, path: KeyPath) -> Any:
    entries = _get_key(config, path)
    if isinstance(entries, list | str) and layer < len(entries):
        return entries[layer]
    count = len(entries) if isinstance(entries, list | str) else 0
    raise CheckpointError(f"config.json: {'.'.join(path)} has {count} entries, none for layer {layer}")
