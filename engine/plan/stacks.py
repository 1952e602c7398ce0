"""The output's stacks of layers: the recipe's `models`, `slices` and `modules` as stretches of layers of each.

Not every number in a name counts layers: those of a projector's ``mlp.0`` and ``mlp.2`` count the steps of a
calculation, and such tensors lie outside the layers.
"""

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.config import find_layer_count
from mergemill.engine.checkpoint.family import Family, is_counted, layer_stacks, split_layer
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offers, find_by_names
from mergemill.engine.plan.modules import choose_module
from mergemill.engine.plan.policy import MERGE_ALL, Policies
from mergemill.engine.recipe import ModelEntry, ModelRef, Module, Parameters, Recipe, Slice, Source

Checkpoints = Mapping[str, Checkpoint]  # by the model's reference as text, in the recipe's order

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """A slice with its sources' models, all of one stack."""

    sources: tuple[Source, ...]
    base: str | None
    scopes: tuple[Parameters, ...]  # slice, module, recipe

    @property
    def layers(self) -> int:
        """How many layers of the output it makes."""
        return self.sources[0].layers


@dataclass(frozen=True, slots=True)
class Stack:
    """One stack of layers of the output, or a module of a recipe that has none (`layered` is false)."""

    name: str  # "model.layers"; what stands before the layer's number
    stretches: tuple[Stretch, ...]
    whole: bool  # whether it is the models' own stack, layer by layer
    counted: int | None = None  # the layers that the config counts, where more are stored
    module: str = "default"  # of the recipe
    layered: bool = True

    @property
    def layers(self) -> int:
        """How many layers the output's stack has."""
        return sum(stretch.layers for stretch in self.stretches)

    def givers(self, donor: str) -> tuple[tuple[str, int], ...]:
        """Return for each layer the model that its config entries come from, and the layer there.

        That is the donor, or the slice's first source where the donor has no part in it.
        """
        layers: list[tuple[str, int]] = []
        for stretch in self.stretches:
            source = next((source for source in stretch.sources if str(source.model) == donor), stretch.sources[0])
            layers.extend((str(source.model), layer) for layer in range(*source.layer_range))
        return tuple(layers)


@dataclass(frozen=True, slots=True)
class _Found:
    """What the inputs have."""

    recipe: Recipe
    checkpoints: Checkpoints
    family: Family
    layers: Mapping[str, Mapping[str, tuple[int, ...]]]  # numbers of layers by model and stack
    outside: tuple[str, ...]  # names of tensors of no layer
    offers: Mapping[str, Offers]
    policies: Policies

    def fail(self, words: str) -> PlanError:
        return PlanError(f"{self.recipe.file or 'recipe'}: {words}")

    @property
    def names(self) -> list[str]:
        return sorted({stack for found in self.layers.values() for stack in found})


def models_of(source: Source) -> tuple[str, ...]:
    """Return the models that a source reads: its own, and the one that its task vector is taken from."""
    return tuple(str(ref) for ref in (source.model, source.delta_base) if ref is not None)


def make_stacks(
    recipe: Recipe,
    checkpoints: Checkpoints,
    offers: Mapping[str, Offers],
    family: Family,
    policies: Policies = MERGE_ALL,
) -> tuple[Stack, ...]:
    """Return the output's stacks of layers, by name; one without layers where the models have none."""
    numbers = find_by_names(offers, layer_stacks)
    stacks = {
        stack
        for model, found in numbers.items()
        for stack, own in found.items()
        if _has_layers(stack, own, checkpoints[model], offers[model], family)
    }
    layers = {model: {name: each for name, each in own.items() if name in stacks} for model, own in numbers.items()}
    every = {name: None for names in offers.values() for name in names}
    outside = [name for name in every if split_stack(name, stacks) is None]
    found = _Found(recipe, checkpoints, family, layers, tuple(outside), offers, policies)
    if recipe.modules is None:
        module = Module.model_construct(models=recipe.models, slices=recipe.slices, parameters=Parameters())
        return _make_module("default", module, (recipe.parameters,), found.names, found)
    return _make_modules(recipe.modules, found)


def split_stack(name: str, stacks: Container[str]) -> tuple[str, int, str] | None:
    """Return stack, layer and the rest of a tensor's name; None for a name that is of none of `stacks`.

    >>> split_stack("visual.merger.mlp.0.weight", ["visual.blocks"])
    """
    split = split_layer(name)
    return split if split is not None and split[0] in stacks else None


def find_owner(name: str, stacks: Sequence[Stack], family: Family) -> Stack:
    """Return the stack beside which a tensor of no layer stands: of its module, then of the longest common name."""
    modules = list(dict.fromkeys(stack.module for stack in stacks))
    if len(modules) == 1 and all(stack.whole for stack in stacks):
        return max(stacks, key=lambda stack: len(stack.stretches[0].sources))  # all are of all models, but for policies
    names = [stack.name for stack in stacks]
    module = choose_module(name, modules, family, names) if len(modules) > 1 else None
    own = [stack for stack in stacks if module is None or stack.module == module]
    near = max(_count_shared(name, stack.name) for stack in own)
    best = [stack for stack in own if _count_shared(name, stack.name) == near]
    return best[0] if near and len(best) == 1 else find_main(best, family)


def find_main(stacks: Sequence[Stack], family: Family) -> Stack:
    """Return the stack of the language model that writes: the decoder, or what no tower beside it is."""
    patterns = [pattern for pattern, _ in family.layer_counts]

    def place(stack: Stack) -> tuple[bool, bool, int]:
        index = next((i for i, pattern in enumerate(patterns) if is_counted(stack.name, pattern)), len(patterns))
        return stack.module == "default", "decoder" in stack.name, index

    return max(stacks, key=place)


def _has_layers(stack: str, layers: Sequence[int], checkpoint: Checkpoint, offers: Offers, family: Family) -> bool:
    """Whether numbers count layers: as the config counts them, or without gaps and of one kind here and there.

    layers: the numbers in the stack's names, ascending.
    """
    if any(is_counted(stack, pattern) and not keys for pattern, keys in family.layer_counts):
        return False
    last, gaps = layers[-1], len(layers) <= layers[-1]
    count = find_layer_count(checkpoint.config, family, stack)
    if count is not None and last + 1 >= count.count:
        return True
    if count is None or gaps:
        return not gaps
    kinds: dict[int, set[tuple[str, Shape]]] = defaultdict(set)
    for name, offer in offers.items():
        if split := split_stack(name, (stack,)):
            kinds[split[1]].add((split[2], offer.shape))
    return any(kinds[number] == kinds[number + 1] for number in range(last))


def _make_modules(modules: Mapping[str, Module], found: _Found) -> tuple[Stack, ...]:
    named = list(modules)
    chosen = {name: choose_module(name, named, found.family, found.names) or _default(named) for name in found.names}
    lost = [name for name, module in chosen.items() if module is None]
    if lost:
        raise found.fail(
            f"no module is that of {', '.join(lost)}; the modules are {', '.join(named)}, the models' stacks of layers "
            f"{', '.join(found.names)}; name a stack as it is here, or 'default' for all that the others do not name"
        )
    stacks: list[Stack] = []
    for name, module in modules.items():
        own = [stack for stack, other in chosen.items() if other == name]
        if (
            not own
            and name != "default"
            and not any(choose_module(each, [name], found.family) for each in found.outside)
        ):
            raise found.fail(
                f"module {name!r} is none of these models'; their stacks of layers are "
                f"{', '.join(found.names) or 'none'}"
            )
        stacks += _make_module(name, module, (module.parameters, found.recipe.parameters), own, found)
    return tuple(sorted(stacks, key=lambda stack: stack.name))


def _default(named: Sequence[str]) -> str | None:
    return "default" if "default" in named else None


def _make_module(
    name: str, module: Module, scopes: tuple[Parameters, ...], own: Sequence[str], found: _Found
) -> tuple[Stack, ...]:
    base = None if found.recipe.base_model is None else str(found.recipe.base_model)
    if module.models is not None:
        entries = _with_base(module.models, found.recipe.base_model)
        stacks = [_make_whole(entries, stack, (base, scopes), name, found) for stack in own]
        return tuple(stacks) or (_make_empty(entries, (base, scopes), name),)
    made = []
    for stack in _choose_sliced(name, own, found):
        stretches = tuple(_make_stretch(part, stack, (base, scopes), found) for part in module.slices or ())
        if any(stretch.layers == 0 for stretch in stretches[1:-1]) or not any(stretch.layers for stretch in stretches):
            raise found.fail(
                "an empty slice, of layer_range [0, 0], gives the tensors before the layers as the first, and those "
                "after as the last of several; elsewhere it does nothing"
            )
        made.append(Stack(stack, stretches, False, module=name))
    return tuple(made)


def _with_base(models: Sequence[ModelEntry], base: ModelRef | None) -> tuple[ModelEntry, ...]:
    """A base that is not listed joins as one more source."""
    listed = {str(entry.model) for entry in models}
    return (*models, *([] if base is None or str(base) in listed else [ModelEntry(model=base)]))


def _leave_lacking(stack: str, entries: Sequence[ModelEntry], found: _Found) -> Sequence[ModelEntry]:
    """Return the models that a stack is made of: where a policy has nothing of it merged, others may lack it."""
    layers = {str(entry.model): found.layers[str(entry.model)].get(stack, ()) for entry in entries}
    if not found.policies.rules or len({each[-1:] for each in layers.values()}) < 2:
        return entries
    names = {name for own in found.offers.values() for name in own if (split_layer(name) or ("",))[0] == stack}
    verdicts = {found.policies.find(name) for name in names}
    if any(verdict.action == "merge" for verdict in verdicts):
        return entries
    sources = {verdict.model for verdict in verdicts if verdict.action == "copy"}
    wanted = [entry for entry in entries if str(entry.model) in sources]
    return wanted or [entry for entry in entries if layers[str(entry.model)]][:1]


def _make_whole(
    entries: Sequence[ModelEntry],
    stack: str,
    shared: tuple[str | None, tuple[Parameters, ...]],
    module: str,
    found: _Found,
) -> Stack:
    entries = _leave_lacking(stack, entries, found)
    models = [str(ref) for entry in entries for ref in (entry.model, entry.delta_base) if ref is not None]
    counts = {model: _count_layers(model, stack, found) for model in models}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{model} has {count}" for model, count in counts.items())
        raise found.fail(
            f"the models have different numbers of layers in {stack!r}: {told}; "
            f"say with 'slices' which layers go together"
        )
    stretch = _cover(entries, counts[models[0]], shared)
    count = find_layer_count(found.checkpoints[models[0]].config, found.family, stack)
    fewer = None if count is None or not 0 < count.count < stretch.layers else count.count
    return Stack(stack, (stretch,), True, fewer, module)


def _make_empty(entries: Sequence[ModelEntry], shared: tuple[str | None, tuple[Parameters, ...]], module: str) -> Stack:
    return Stack("" if module == "default" else module, (_cover(entries, 1, shared),), True, None, module, False)


def _cover(entries: Sequence[ModelEntry], layers: int, shared: tuple[str | None, tuple[Parameters, ...]]) -> Stretch:
    sources = tuple(
        Source(
            model=entry.model,
            layer_range=(0, layers),
            delta_base=entry.delta_base,
            importance=entry.importance,
            parameters=entry.parameters,
        )
        for entry in entries
    )
    return Stretch(sources, shared[0], (Parameters(), *shared[1]))


def _choose_sliced(module: str, own: Sequence[str], found: _Found) -> Sequence[str]:
    """Return the stacks of a module that slices are of: one, or several that one key of the config counts."""
    keys: dict[object, list[str]] = {}
    for stack in own:
        counts = [find_layer_count(each.config, found.family, stack) for each in found.checkpoints.values()]
        stored = [max(layers[stack]) + 1 for layers in found.layers.values() if stack in layers]
        count = next((count for count in counts if count is not None), None)
        if count is None or max(stored) >= count.count:
            keys.setdefault(stack if count is None else count.path, []).append(stack)
    if len(keys) == 1:
        return next(iter(keys.values()))
    names = ", ".join(own) or "none"
    if found.recipe.modules is not None:
        raise found.fail(f"module {module!r} has slices, and the stacks of layers {names}; name one of them")
    raise found.fail(
        f"'slices' needs models with one stack of layers; these have {names}"
        + (f"; say by 'modules' what each becomes, as modules: {{{own[-1]}: {{slices: …}}, default: …}}" if own else "")
    )


def _make_stretch(part: Slice, stack: str, shared: tuple[str | None, tuple[Parameters, ...]], found: _Found) -> Stretch:
    for source in part.sources:
        for model in models_of(source):
            count = _count_layers(model, stack, found)
            if source.layer_range[1] > count:
                raise found.fail(
                    f"layer_range {list(source.layer_range)} of {model}: it has {count} layers, 0 to {count - 1}"
                )
    own = shared[0] if part.base_model is None else str(part.base_model)
    return Stretch(part.sources, own, (part.parameters, *shared[1]))


def _count_layers(model: str, stack: str, found: _Found) -> int:
    layers = found.layers[model].get(stack, ())
    if not layers:
        has = ", ".join(found.layers[model]) or "none"
        raise found.fail(f"{model} has no layers called '{stack}.…'; it has {has}")
    return layers[-1] + 1  # not every number need be there


def _count_shared(name: str, stack: str) -> int:
    shared = 0
    for a, b in zip(name.split("."), stack.split("."), strict=False):
        if a != b:
            break
        shared += 1
    return shared
