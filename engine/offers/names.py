"""Names of tensors: the same one in all models of a merge, whatever wrapped, saved or converted them.

A model's names become those of the donor, which the output has. Two names are one tensor's where they are equal without
what a family's data call a prefix (``model.language_model.`` and ``model.``) and in one spelling
(``.block_sparse_moe.`` is ``.mlp.``); where only a module is known by that, what it holds follows it. A name that could
be two of the donor's, or that two of one model's would get, stays as it is. A recipe's `name_map` comes first.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.family import Family, join_layer, spell, split_layer
from mergemill.engine.errors import PlanError

_WRAPPERS = ("module.", "base_model.model.")  # of data parallelism and peft, before every name
_COMPILED = "_orig_mod."  # of torch.compile, before any module's
_REGEX = "re:"
_ANY = -1  # the layer of a name outside all layers

Rule = tuple[str, str]  # a part of names, or ``re:`` and a regular expression, and what stands in its place


@dataclass(frozen=True, slots=True)
class Known:
    """The donor's names, without the numbers of layers."""

    names: frozenset[str]
    by_key: Mapping[str, str | None]  # None: several names have this key
    modules: Mapping[str, str | None]  # the same of the modules that hold them, with a dot at the end


def unwrap_names(checkpoints: Mapping[str, Checkpoint]) -> Mapping[str, Checkpoint]:
    """Return the models without what wrappers put before names."""
    return {model: _rename(found, _unwrap(found.tensors)) for model, found in checkpoints.items()}


def name_alike(
    checkpoints: Mapping[str, Checkpoint], donor: str, family: Family, rules: Sequence[Rule] = (), *, where: str
) -> Mapping[str, Checkpoint]:
    """Return the models under the donor's names; `PlanError` for a rule that names nothing, or one name for two."""
    own = checkpoints[donor]
    used: set[Rule] = set()
    made = {}
    for model, found in checkpoints.items():
        if model != donor and rules:
            given = _map_names(found, own.tensors, rules, used, where)
            found = _rename(found, given)
        if model != donor and not found.tensors.keys() <= own.tensors.keys():
            find_key = _make_key(family, own, found)
            found = _rename(found, _match(found.tensors, _know(own.tensors, find_key), find_key))
        made[model] = found
    for rule in rules:
        if rule not in used:
            raise PlanError(
                f"{where}: name_map: {rule[0]!r} is in no name that a model has and {donor} has not; "
                f"`mergemill inspect` shows the names"
            )
    return made


def warn_of_names(checkpoints: Mapping[str, Checkpoint], donor: str, *, where: str) -> Iterator[str]:
    """Yield a line for each model whose tensors got other names."""
    for model, found in checkpoints.items():
        if found.called:
            named = min(found.called, key=lambda name: found.called[name])
            beside = "without what a wrapper put before it" if model == donor else f"as {donor} has it"
            yield (
                f"{where}: {model}: {len(found.called)} tensors are called otherwise: {found.called[named]} is "
                f"{named}, {beside}"
            )


def _unwrap(names: Mapping[str, object]) -> dict[str, str]:
    """Return the names that are wrapped, and what they are without that."""
    found = {name: name.replace(_COMPILED, "") for name in names}
    while wrapper := next((each for each in _WRAPPERS if all(name.startswith(each) for name in found.values())), None):
        found = {name: short.removeprefix(wrapper) for name, short in found.items()} if found else found
        if not found or not all(found.values()):
            return {}
    return _without_clashes({name: short for name, short in found.items() if name != short}, names)


def _map_names(
    checkpoint: Checkpoint, own: Mapping[str, object], rules: Sequence[Rule], used: set[Rule], where: str
) -> dict[str, str]:
    made = {}
    for name in checkpoint.tensors:
        if name in own:
            continue
        mapped = name
        for rule in rules:
            after = _apply(rule, mapped)
            if after != mapped:
                used.add(rule)
            mapped = after
        if mapped != name:
            made[name] = mapped
    counts = Counter(made.get(name, name) for name in checkpoint.tensors)
    twice = next((name for name, mapped in made.items() if counts[mapped] > 1 or not mapped), None)
    if twice is not None:
        raise PlanError(
            f"{where}: name_map: tensor {twice} of {checkpoint.ref} would be called {made[twice]!r}, "
            f"as another one of that model is; each tensor needs a name of its own"
        )
    return made


def _apply(rule: Rule, name: str) -> str:
    part, other = rule
    return re.sub(part.removeprefix(_REGEX), other, name) if part.startswith(_REGEX) else name.replace(part, other)


def _rename(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    if not names:
        return checkpoint
    found = [stored._replace(name=names.get(name, name)) for name, stored in checkpoint.tensors.items()]
    tensors = {stored.name: stored for stored in sorted(found, key=lambda each: each.name)}
    before = {names.get(name, name): checkpoint.called.get(name, name) for name in checkpoint.tensors}
    return replace(checkpoint, tensors=tensors, called={name: old for name, old in before.items() if name != old})


def _make_key(family: Family, donor: Checkpoint, other: Checkpoint) -> Callable[[str], str]:
    """Return what gives equal keys to the names of one tensor; a type's own prefix counts among its like alone."""
    kind = donor.config.get("model_type")
    own = [f"{kind}."] if kind and kind == other.config.get("model_type") else []
    prefixes = sorted([*family.prefixes, *own], key=len, reverse=True)

    def find_key(name: str) -> str:
        name = spell(name, family)
        return name.removeprefix(next((prefix for prefix in prefixes if name.startswith(prefix)), ""))

    return find_key


def _know(names: Mapping[str, object], find_key: Callable[[str], str]) -> Known:
    known = frozenset(_split(name)[1] for name in names)
    modules = {module for name in known for module in _list_modules(name)}
    return Known(known, _by_key(known, find_key), _by_key(modules, find_key))


def _by_key(names: Sequence[str] | frozenset[str] | set[str], find_key: Callable[[str], str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        key = find_key(name)
        found[key] = None if key in found else name
    return found


def _list_modules(name: str) -> list[str]:
    """Return the modules that a name stands in, the innermost first.

    >>> _list_modules("a.b.weight")
    ['a.b.', 'a.']
    """
    words = name.split(".")[:-1]
    return [".".join(words[:count]) + "." for count in range(len(words), 0, -1)]


def _match(names: Mapping[str, object], known: Known, find_key: Callable[[str], str]) -> dict[str, str]:
    """Return the donor's names of those that it has under others."""
    found: dict[str, str] = {}  # by the names without their layers
    made = {}
    for name in names:
        layer, plain = _split(name)
        if plain not in found:
            found[plain] = plain if plain in known.names else _find(plain, known, find_key)
        if found[plain] != plain:
            made[name] = _join(layer, found[plain])
    return _without_clashes(made, names)


def _find(plain: str, known: Known, find_key: Callable[[str], str]) -> str:
    exact = known.by_key.get(find_key(plain))
    if exact is not None:
        return exact
    for module in _list_modules(plain):
        key = find_key(module)
        own = known.modules.get(key) if key else None
        if own is not None:
            return own + plain.removeprefix(module)
    return plain


def _without_clashes(made: Mapping[str, str], names: Mapping[str, object]) -> dict[str, str]:
    if not made:
        return {}
    counts = Counter(made.get(name, name) for name in names)
    return {name: other for name, other in made.items() if counts[other] == 1}


def _split(name: str) -> tuple[int, str]:
    split = split_layer(name)
    return (_ANY, name) if split is None else (split[1], ".".join(part for part in (split[0], "#", split[2]) if part))


def _join(layer: int, plain: str) -> str:
    if layer == _ANY:
        return plain
    stack, _, rest = f".{plain}".partition(".#.")
    return join_layer(stack.removeprefix("."), layer, rest)
