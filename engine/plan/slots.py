"""Slots: every tensor that the output could have, and which stored tensors of which models would fill it.

The recipe's `models`, `slices` and `modules` all become stretches of layers; a slot is one tensor name of a
stretch, or one outside the layers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.family import Family, join_layer, layer_stacks, section, split_layer
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offers
from mergemill.engine.plan.layout import natural_order
from mergemill.engine.plan.settings import Site
from mergemill.engine.recipe import ModelEntry, ModelRef, Parameters, Recipe, Slice, Source

Checkpoints = Mapping[str, Checkpoint]  # by the model's reference as text, in the recipe's order
Layers = Mapping[int, Sequence[str]]  # of a stack of a model: what its tensors are called after the layer


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model's tensor that a slot would take, if the model has it."""

    model: str  # the reference as text
    tensor: str  # the name in the model
    parameters: Parameters  # of the source
    place: int  # of the source among those of its slice
    delta_base: str | None = None  # the model that its task vector is taken from, if not from the base


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of the output and its candidates, in the recipe's order."""

    site: Site
    candidates: tuple[Candidate, ...]
    base: str | None  # the base model that holds here


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
    """One stack of layers of the output."""

    name: str  # "model.layers"; what stands before the layer's number
    stretches: tuple[Stretch, ...]
    whole: bool  # whether it is the models' own stack, layer by layer

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


def models_of(source: Source) -> tuple[str, ...]:
    """Return the models that a source reads: its own, and the one that its task vector is taken from."""
    return tuple(str(ref) for ref in (source.model, source.delta_base) if ref is not None)


def make_stacks(recipe: Recipe, offers: Mapping[str, Offers]) -> tuple[Stack, ...]:
    """Return the output's stacks of layers, by name."""
    stacks = {model: layer_stacks(found) for model, found in offers.items()}
    models, slices, scopes = _open_module(recipe)
    base = None if recipe.base_model is None else str(recipe.base_model)
    if models is not None:
        entries = _with_base(models, recipe.base_model)
        names = sorted({stack for found in stacks.values() for stack in found})
        return tuple(Stack(name, (_whole(entries, name, stacks, base, scopes, recipe),), True) for name in names)
    stack = _only_stack(stacks, recipe)
    stretches = tuple(_make_stretch(part, stack, stacks, base, scopes, recipe) for part in slices or ())
    if any(stretch.layers == 0 for stretch in stretches[1:-1]) or not any(stretch.layers for stretch in stretches):
        raise PlanError(
            f"{_name(recipe)}: an empty slice, of layer_range [0, 0], gives the tensors before the layers as the "
            f"first, and those after as the last of several; elsewhere it does nothing"
        )
    return (Stack(stack, stretches, False),)


def iter_slots(stacks: Sequence[Stack], offers: Mapping[str, Offers], family: Family) -> Iterator[Slot]:
    """Yield the output's slots in the order of the model: before the layers, the layers, after them."""
    outside = {
        model: {name: section(name, family) for name in found if split_layer(name) is None}
        for model, found in offers.items()
    }
    first, last = _ends(stacks, offers)
    rests = _sort_into_layers(offers)
    yield from _outside_slots(first, outside, "before")
    for stack in stacks:
        yield from _layer_slots(stack, {model: found.get(stack.name, {}) for model, found in rests.items()})
    yield from _outside_slots(last, outside, "after")


def _open_module(
    recipe: Recipe,
) -> tuple[tuple[ModelEntry, ...] | None, tuple[Slice, ...] | None, tuple[Parameters, ...]]:
    if recipe.modules is None:
        return recipe.models, recipe.slices, (recipe.parameters,)
    if list(recipe.modules) != ["default"]:
        raise PlanError(
            f"{_name(recipe)}: modules other than 'default' cannot be merged yet; it has {', '.join(recipe.modules)}"
        )
    module = recipe.modules["default"]
    return module.models, module.slices, (module.parameters, recipe.parameters)


def _with_base(models: Sequence[ModelEntry], base: ModelRef | None) -> tuple[ModelEntry, ...]:
    """A base that is not listed joins as one more source."""
    listed = {str(entry.model) for entry in models}
    return (*models, *([] if base is None or str(base) in listed else [ModelEntry(model=base)]))


def _whole(
    entries: Sequence[ModelEntry],
    stack: str,
    stacks: Mapping[str, Mapping[str, tuple[int, ...]]],
    base: str | None,
    scopes: tuple[Parameters, ...],
    recipe: Recipe,
) -> Stretch:
    models = [str(ref) for entry in entries for ref in (entry.model, entry.delta_base) if ref is not None]
    counts = {model: _count_layers(model, stack, stacks, recipe) for model in models}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{model} has {count}" for model, count in counts.items())
        raise PlanError(
            f"{_name(recipe)}: the models have different numbers of layers in {stack!r}: {found}; "
            f"say with 'slices' which layers go together"
        )
    sources = tuple(
        Source(
            model=entry.model,
            layer_range=(0, counts[str(entry.model)]),
            delta_base=entry.delta_base,
            parameters=entry.parameters,
        )
        for entry in entries
    )
    return Stretch(sources, base, (Parameters(), *scopes))


def _make_stretch(
    part: Slice,
    stack: str,
    stacks: Mapping[str, Mapping[str, tuple[int, ...]]],
    base: str | None,
    scopes: tuple[Parameters, ...],
    recipe: Recipe,
) -> Stretch:
    for source in part.sources:
        _check_range(source, stack, stacks, recipe)
    own = base if part.base_model is None else str(part.base_model)
    return Stretch(part.sources, own, (part.parameters, *scopes))


def _check_range(
    source: Source, stack: str, stacks: Mapping[str, Mapping[str, tuple[int, ...]]], recipe: Recipe
) -> None:
    for model in models_of(source):
        count = _count_layers(model, stack, stacks, recipe)
        if source.layer_range[1] > count:
            raise PlanError(
                f"{_name(recipe)}: layer_range {list(source.layer_range)} of {model}: "
                f"it has {count} layers, 0 to {count - 1}"
            )


def _count_layers(model: str, stack: str, stacks: Mapping[str, Mapping[str, tuple[int, ...]]], recipe: Recipe) -> int:
    layers = stacks[model].get(stack, ())
    if not layers:
        raise PlanError(f"{_name(recipe)}: {model} has no layers called '{stack}.…'; it has {_list(stacks[model])}")
    # Not every number need be there: of a small stack like a projector only some have weights.
    return layers[-1] + 1


def _only_stack(stacks: Mapping[str, Mapping[str, tuple[int, ...]]], recipe: Recipe) -> str:
    names = sorted({name for found in stacks.values() for name in found})
    if len(names) == 1:
        return names[0]
    raise PlanError(
        f"{_name(recipe)}: 'slices' needs models with one stack of layers; these have {', '.join(names) or 'none'}"
    )


def _layer_slots(stack: Stack, rests: Mapping[str, Layers]) -> Iterator[Slot]:
    offset, count = 0, stack.layers
    for stretch in stack.stretches:
        # Of a whole stack only the layers that are there: a number in a name may be far beyond them.
        there = sorted({layer for found in rests.values() for layer in found}) if stack.whole else range(stretch.layers)
        for i in there:
            t = i / (stretch.layers - 1) if stretch.layers > 1 else 1.0
            depth = (offset + i) / (count - 1) if count > 1 else 0.0
            layers = [(source, source.layer_range[0] + i) for source in stretch.sources]
            names = {rest for source, layer in layers for rest in rests[str(source.model)].get(layer, ())}
            if not names and not stack.whole:
                raise PlanError(f"{layers[0][0].model} has no tensors in layer {layers[0][1]} of '{stack.name}.…'")
            for rest in sorted(names, key=natural_order):
                candidates = tuple(
                    _make_candidate(source, join_layer(stack.name, layer, rest), place)
                    for place, (source, layer) in enumerate(layers)
                )
                site = Site(join_layer(stack.name, offset + i, rest), t, stretch.scopes, depth)
                yield Slot(site, candidates, stretch.base)
        offset += stretch.layers


def _make_candidate(source: Source, tensor: str, place: int) -> Candidate:
    delta_base = None if source.delta_base is None else str(source.delta_base)
    return Candidate(str(source.model), tensor, source.parameters, place, delta_base)


def _sort_into_layers(offers: Mapping[str, Offers]) -> Mapping[str, Mapping[str, Layers]]:
    """Return what each layer of each stack of each model holds."""
    found: dict[str, dict[str, dict[int, list[str]]]] = {model: {} for model in offers}
    for model, names in offers.items():
        for name in names:
            if split := split_layer(name):
                stack, layer, rest = split
                found[model].setdefault(stack, {}).setdefault(layer, []).append(rest)
    return found


def _ends(stacks: Sequence[Stack], offers: Mapping[str, Offers]) -> tuple[Stretch, Stretch]:
    """The stretches that the tensors before and after the layers come from."""
    if not stacks:
        raise PlanError(f"no layers found in {_list(offers)}; expected tensors called '….0.…'")
    return stacks[0].stretches[0], stacks[0].stretches[-1]


def _outside_slots(stretch: Stretch, outside: Mapping[str, Mapping[str, str]], where: str) -> Iterator[Slot]:
    # Also names that only other models store: a tied model has no head of its own, but its embedding stands for it.
    names = {name for tensors in outside.values() for name, found in tensors.items() if found == where}
    for name in sorted(names, key=natural_order):
        candidates = tuple(_make_candidate(source, name, place) for place, source in enumerate(stretch.sources))
        depth = 0.0 if where == "before" else 1.0
        yield Slot(Site(name, 0.0, stretch.scopes, depth), candidates, stretch.base)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _name(recipe: Recipe) -> str:
    return recipe.file or "recipe"
