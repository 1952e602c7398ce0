"""Slots: every tensor that the output could have, and which stored tensors of which models would fill it.

A slot is one tensor name of a stretch of layers, or one outside the layers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mergemill.engine.checkpoint.family import Family, find_side, join_layer, split_layer
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offers, find_by_names
from mergemill.engine.plan.layout import natural_order
from mergemill.engine.plan.settings import Site
from mergemill.engine.plan.stacks import Stack, Stretch, find_owner, split_stack
from mergemill.engine.recipe import Parameters, Source

Layers = Mapping[int, Sequence[str]]  # of a stack of a model: what its tensors are called after the layer


class Candidate(NamedTuple):
    """A model's tensor that a slot would take, if the model has it."""

    model: str  # the reference as text
    tensor: str  # the name in the model
    parameters: Parameters  # of the source
    place: int  # of the source among those of its slice
    delta_base: str | None = None  # the model that its task vector is taken from, if not from the base
    importance: str | None = None  # the checkpoint that says how much each of its elements matters


class Slot(NamedTuple):
    """A tensor of the output and its candidates, in the recipe's order."""

    site: Site
    candidates: tuple[Candidate, ...]
    base: str | None  # the base model that holds here
    alone: bool = False  # whether its module is of one model, which is there to be kept


def iter_slots(stacks: Sequence[Stack], offers: Mapping[str, Offers], family: Family) -> Iterator[Slot]:
    """Yield the output's slots in the order of the model: before the layers, the layers, after them."""
    names = {stack.name for stack in stacks if stack.layered}
    every = {name: None for found in offers.values() for name in found}
    sides = {name: find_side(name, family) for name in every if split_stack(name, names) is None}
    owners = {name: find_owner(name, stacks, family) for name in sides}
    # Also names that only other models store: a tied model has no head of its own, but its embedding stands for it.
    order = sorted(sides, key=natural_order)
    rests = find_by_names(offers, _sort_into_layers)
    yield from (
        _outside_slot(name, owners[name].stretches[0], 0.0, owners[name]) for name in order if sides[name] == "before"
    )
    for stack in (stack for stack in stacks if stack.layered):
        yield from _layer_slots(stack, {model: found.get(stack.name, {}) for model, found in rests.items()})
    yield from (
        _outside_slot(name, owners[name].stretches[-1], 1.0, owners[name]) for name in order if sides[name] == "after"
    )


def _layer_slots(stack: Stack, rests: Mapping[str, Layers]) -> Iterator[Slot]:
    offset, count, alone = 0, stack.counted or stack.layers, _is_alone(stack)
    orders: dict[frozenset[str], list[str]] = {}  # layers mostly hold the same
    for stretch in stack.stretches:
        makers = [_prepare_candidate(source, place) for place, source in enumerate(stretch.sources)]
        found = [rests[str(source.model)] for source in stretch.sources]
        # Of a whole stack only the layers that are there: a number in a name may be far beyond them.
        there = sorted({layer for own in rests.values() for layer in own}) if stack.whole else range(stretch.layers)
        for i in there:
            t, depth = _find_place(i, stack.counted or stretch.layers), min(1.0, (offset + i) / max(1, count - 1))
            layers = [source.layer_range[0] + i for source in stretch.sources]
            names = frozenset[str]().union(*(own.get(layer, ()) for own, layer in zip(found, layers, strict=True)))
            if not names and not stack.whole:
                first = stretch.sources[0].model
                raise PlanError(f"{first} has no tensors in layer {layers[0]} of '{stack.name}.…'")
            if names not in orders:
                orders[names] = sorted(names, key=natural_order)
            numbered, numbers = list(zip(makers, layers, strict=True)), {offset + i, *layers}
            for rest in orders[names]:
                called = {layer: join_layer(stack.name, layer, rest) for layer in numbers}
                candidates = tuple([make(called[layer]) for make, layer in numbered])
                yield Slot(Site(called[offset + i], t, stretch.scopes, depth), candidates, stretch.base, alone)
        offset += stretch.layers


def _find_place(layer: int, count: int) -> float:
    """Return t, a layer's place among `count`; 0 for what is stored after them, which is none of them.

    >>> [_find_place(layer, 3) for layer in range(4)], _find_place(0, 1)
    ([0.0, 0.5, 1.0, 0.0], 1.0)
    """
    if layer >= count:
        return 0.0
    return layer / (count - 1) if count > 1 else 1.0


def make_candidate(source: Source, tensor: str, place: int) -> Candidate:
    """Return a source's tensor as a candidate."""
    return _prepare_candidate(source, place)(tensor)


def _prepare_candidate(source: Source, place: int) -> Callable[[str], Candidate]:
    """Return what makes candidates of a source's tensors: references are put into words once."""
    model, parameters = str(source.model), source.parameters
    delta_base = None if source.delta_base is None else str(source.delta_base)
    importance = None if source.importance is None else str(source.importance.model)
    return lambda tensor: Candidate(model, tensor, parameters, place, delta_base, importance)


def _sort_into_layers(names: Iterable[str]) -> Mapping[str, Layers]:
    """Return what each layer of each stack of a model holds."""
    found: dict[str, dict[int, list[str]]] = {}
    for split in filter(None, map(split_layer, names)):
        stack, layer, rest = split
        found.setdefault(stack, {}).setdefault(layer, []).append(rest)
    return found


def _outside_slot(name: str, stretch: Stretch, depth: float, owner: Stack) -> Slot:
    candidates = tuple(make_candidate(source, name, place) for place, source in enumerate(stretch.sources))
    return Slot(Site(name, 0.0, stretch.scopes, depth), candidates, stretch.base, _is_alone(owner))


def _is_alone(stack: Stack) -> bool:
    return stack.module != "default" and stack.whole and len(stack.stretches[0].sources) == 1
