"""What headers cannot say of a model: which names are layers, vocabulary rows, ties, or may be missing.

The data are ``families/*.json``, one file a family, chosen by the config's ``model_type``. A family's
entries go before those of ``default.json``, which is all that Llama, Mistral, Mixtral, Qwen and Gemma need.
Names are matched by shell patterns (`fnmatch`), since checkpoints of one family differ in their prefixes.
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase, translate
from importlib import resources
from typing import Any, Literal, NamedTuple

Side = Literal["before", "after"]

# A component that is a number, with the points around it; a longer one counts no layers.
_LAYER = re.compile(r"(?:^|\.)(?P<layer>0|[1-9][0-9]{0,8})(?:\.|\Z)")


class Layout(NamedTuple):
    """A tensor that others make up, one after the other, where another layout has these."""

    whole: str  # the end of its name
    parts: tuple[str, ...]  # the ends of theirs after the same beginning; ``#``: the number of an expert, from 0 on

    @property
    def numbered(self) -> bool:
        """Whether the whole has an axis of experts."""
        return "#" in self.parts[0]


@dataclass(frozen=True, slots=True)
class Family:
    """One family's data; every string that is matched with tensor names is a shell pattern."""

    layer_counts: tuple[tuple[str, tuple[str, ...]], ...]  # (stack, config keys that count it, if any do)
    layer_lists: tuple[str, ...]  # config keys with one entry a layer
    layer_index_lists: tuple[str, ...]  # config keys with indices of layers
    layer_maps: tuple[str, ...]  # config keys that map numbers of layers to what is theirs
    of_all_layers: tuple[str, ...]  # tensors outside the layers that hold something for each of them
    list_stacks: tuple[tuple[str, str], ...]  # (config key with one entry a layer, the only stack that it is of)
    count_aliases: tuple[tuple[str, str], ...]  # (key that counts layers, another that must say the same)
    by_number: tuple[tuple[str, str], ...]  # (what a layer calculates by its number, the key that asks for it or "")
    vocabulary: tuple[str, ...]  # tensors with one row a token
    ties: tuple[tuple[str, str], ...]  # (tensor, the tensor that it equals where embeddings are tied)
    optional: tuple[str, ...]  # buffers that some checkpoints store and others compute
    before: tuple[str, ...]  # tensors outside the layers that are used before them
    after: tuple[str, ...]  # exceptions from `before`
    later: tuple[str, ...]  # tensors of what predicts later tokens, where they are no layers of the stack
    roles: tuple[tuple[str, tuple[str, ...]], ...]  # (module as recipes for mergekit call it, names that it has here)
    layouts: tuple[Layout, ...]  # what is stored whole or in parts
    separate: tuple[Layout, ...]  # how packed experts are called one by one, where that is not the first of `layouts`
    prefixes: tuple[str, ...]  # what names of one tensor may or may not begin with
    spellings: tuple[tuple[str, str], ...]  # parts of names, and how others spell them
    turned: tuple[Layout, ...]  # packed experts [in, out] whose parts are stored [out, in]; of several, interleaved
    packed_otherwise: tuple[str, ...]  # tensors that have such a name and another order of elements
    transposed: tuple[str, ...]  # weights that are stored [in, out]; none: the family has none, or is not known


def choose_family(config: Mapping[str, Any]) -> Family:
    """Return the family of the config's ``model_type``, the default one for a type that no file names."""
    return _families().get(str(config.get("model_type")), _families()[""])


@functools.lru_cache(maxsize=1 << 17)  # each name is asked for some nine times, in passes over all names
def split_layer(name: str) -> tuple[str, int, str] | None:
    """Return stack, layer and the rest of a tensor's name; None for a name outside the layers.

    The stack is what comes before the first component that is a number; experts are numbered later.

    >>> split_layer("model.layers.12.mlp.experts.3.up_proj.weight")
    ('model.layers', 12, 'mlp.experts.3.up_proj.weight')
    >>> split_layer("lm_head.weight")
    """
    found = _LAYER.search(name)
    if found is None:
        return None
    return name[: found.start()], int(found["layer"]), name[found.end() :]


def join_layer(stack: str, layer: int, rest: str) -> str:
    """Return the name that `split_layer` takes apart.

    >>> join_layer("h", 3, "ln_1.weight"), join_layer("", 0, "weight")
    ('h.3.ln_1.weight', '0.weight')
    """
    if stack and rest:
        return f"{stack}.{layer}.{rest}"
    return ".".join(part for part in (stack, str(layer), rest) if part)


def layer_stacks(names: Iterable[str]) -> Mapping[str, tuple[int, ...]]:
    """Return the layers of each stack, ascending; stacks in the order of their names.

    >>> layer_stacks(["h.1.b", "h.0.a", "h.0.b", "wte.weight"])
    {'h': (0, 1)}
    """
    found: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if split := split_layer(name):
            found[split[0]].add(split[1])
    return {stack: tuple(sorted(found[stack])) for stack in sorted(found)}


def find_side(name: str, family: Family) -> Side:
    """Say whether a tensor that is in no layer is used before or after the layers."""
    return "before" if _matches(name, family.before) and not _matches(name, family.after) else "after"


def is_counted(stack: str, pattern: str) -> bool:
    """Say whether a pattern of `layer_counts` is of a stack."""
    return fnmatchcase(stack, pattern)


def is_of_all_layers(name: str, family: Family) -> bool:
    """Say whether a tensor outside the layers holds something for each layer, by the layer's number."""
    return _matches(name, family.of_all_layers)


def is_later(name: str, family: Family) -> bool:
    """Say whether a tensor belongs to what predicts later tokens (MTP), by its name alone."""
    return _matches(name, family.later)


def match_later(family: Family) -> Callable[[str], object]:
    """Return what is true of the names that `is_later` says are later's, for one who asks of very many."""
    return _compile(family.later).match if family.later else lambda name: None


def is_vocabulary(name: str, family: Family) -> bool:
    """Say whether a tensor may have one row a token; whether it has, its shape and the config tell."""
    return _matches(name, family.vocabulary)


def may_be_tied(name: str, family: Family) -> bool:
    """Whether a tensor of a vocabulary is a head: what a family ties to its embedding."""
    return any(fnmatchcase(name, tied) for tied, source in family.ties if not fnmatchcase(name, source))


def is_head(name: str, family: Family) -> bool:
    """Say whether a tensor is an output head, which may be tied to the embedding."""
    ends = name.endswith(".weight") and split_layer(name) is None and find_side(name, family) == "after"
    return ends and _matches(name, tuple(tied for tied, _ in family.ties))


def is_optional(name: str, family: Family) -> bool:
    """Say whether a model may lack a tensor that another model of its kind stores."""
    return _matches(name, family.optional)


def is_packed_otherwise(name: str, family: Family) -> bool:
    """Say whether a tensor is no stack of parts, though it is called like one."""
    return _matches(name, family.packed_otherwise)


def spell(name: str, family: Family) -> str:
    """Return a tensor's name in the one spelling that stands for all."""
    for old, new in family.spellings:
        name = name.replace(old, new)
    return name


def find_tie(name: str, names: Collection[str], family: Family) -> str | None:
    """Return the one of `names` that stands for tensor `name` where embeddings are tied.

    None where there is none, or where several could be meant.
    """
    return find_ties([name], names, family).get(name)


def find_ties(lacking: Iterable[str], names: Collection[str], family: Family) -> Mapping[str, str]:
    """Return for those of `lacking` that have one, the one of `names` that stands for it, with one look at these."""
    found: dict[str, str] = {}
    sources: dict[str, list[str]] = {}
    for name in lacking:
        for tied, source in family.ties:
            if name in found or not fnmatchcase(name, tied):
                continue
            if source not in sources:
                sources[source] = [other for other in names if _may_tie(other, source)]
            others = sources[source]
            if len(others) - (name in names and _may_tie(name, source)) == 1:
                found[name] = next(other for other in others if other != name)
    return found


def _may_tie(other: str, pattern: str) -> bool:
    return fnmatchcase(other, pattern) and split_layer(other) is None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return bool(patterns) and _compile(patterns).match(name) is not None


@functools.cache  # of the patterns of a family, which are few
def _compile(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)))


@functools.cache
def _families() -> Mapping[str, Family]:
    """Every family by ``model_type``; the default under the empty string."""
    folder = resources.files(__package__) / "families"
    files = {path.name: json.loads(path.read_text("utf-8")) for path in folder.iterdir()}
    default = files.pop("default.json")
    found = {"": _make_family({}, default)}
    for data in files.values():
        found |= dict.fromkeys(data["model_types"], _make_family(data, default))
    return found


def _make_family(data: Mapping[str, Any], default: Mapping[str, Any]) -> Family:
    found = {field.name: _freeze([*data.get(field.name, ()), *default.get(field.name, ())]) for field in fields(Family)}
    return Family(
        **found | {key: tuple(Layout(*each) for each in found[key]) for key in ("layouts", "separate", "turned")}
    )


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value
