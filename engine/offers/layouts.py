"""Layouts: what one model stores as one tensor and another one in parts, so that a merge does not depend on it.

Experts are stored one by one on the Hub and packed by transformers 5; projections are fused or split. Which tensor is
the stack of which others a family's data say (`Layout`), never their shapes. Decided 2026-11-29:

* Experts that must be seen together (ranks, norms, angles, random masks) are merged as the one tensor that packs them,
  however the models store them. An element by itself needs no such thing: then all models are given the donor's layout.
* Other stacks are made where a model stores the whole, and another one parts.
* The output has the donor's layout: a stack's data are its parts' data, one after the other.
* Methods on whole matrices decompose each matrix, so experts that are stored one by one are left so; and so they are
  where a filter of the recipe has one value for some of a stack and another for others.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mergemill.engine.checkpoint.family import Family, Layout, is_packed_otherwise, join_layer, split_layer
from mergemill.engine.checkpoint.layout import TensorInfo
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.tensors.dtypes import is_mergeable
from mergemill.engine.tensors.expressions import Stored

Shape = tuple[int, ...]


class Kind(NamedTuple):
    """What stacks of the same name in all layers have in common."""

    stack: str
    rest: str  # of the packed tensor's name


@dataclass(frozen=True, slots=True)
class Apart:
    """The parts that a model stores of one stack."""

    names: tuple[str, ...]  # in the order of their data in the whole
    shapes: tuple[Shape, ...]
    shape: Shape  # of the whole
    joined: bool = False  # whether they are offered as the whole already, as those of a stage are


@dataclass(frozen=True, slots=True)
class Packs:
    """How the output stores what was merged as one tensor."""

    parts: Mapping[tuple[Kind, Shape], tuple[tuple[str, Shape], ...]]  # names after the layer, or whole ones

    def find(self, name: str, shape: Shape, dtype: str) -> tuple[TensorInfo, ...]:
        """Return the tensors that the output has for one of this name and shape; none: it has it as it is."""
        if not self.parts:
            return ()
        layer, kind = _split(name)
        found = self.parts.get((kind, shape), ())
        return tuple(TensorInfo(_join(kind, layer, rest), dtype, own) for rest, own in found)


AS_THEY_ARE = Packs({})


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What a merge wants of layouts."""

    donor: str  # whose layout the output has
    family: Family  # of the donor
    alone: bool  # whether the method sees elements, or matrices, by themselves
    divides: Callable[[Sequence[str]], bool]  # whether a filter tells some of these names from others


def join_layouts(offers: Mapping[str, Offers], wanted: Arrangement) -> tuple[Mapping[str, Offers], Packs]:
    """Return what all models offer in one layout, and how the output stores it."""
    if wanted.family.turned:
        from mergemill.engine.offers.turned import turn_experts  # which few families need

        offers = turn_experts(offers, wanted.donor, wanted.family)
    apart = {model: _find_apart(found, wanted.family) for model, found in offers.items()}
    kinds: dict[Kind, dict[str, dict[str, Apart]]] = {}
    for model, found in apart.items():
        for packed, parts in found.items():
            kinds.setdefault(_split(packed)[1], {}).setdefault(model, {})[packed] = parts
    packed_by = _find_packed(offers, kinds)
    made = {model: dict(found) for model, found in offers.items()}
    stored_as: dict[tuple[Kind, Shape], tuple[tuple[str, Shape], ...]] = {}
    for kind, by_model in kinds.items():
        holders = packed_by.get(kind, {})
        if _is_mixed_alike(by_model, holders, offers):
            continue
        form = _choose(kind, by_model, holders, offers, wanted)
        if form == "whole":
            for model, found in by_model.items():
                for packed, parts in found.items():
                    _put_stack(made[model], packed, parts)
            if wanted.donor not in holders:
                _note_parts(kind, by_model.get(wanted.donor) or next(iter(by_model.values())), stored_as)
        elif form == "parts":
            shapes = _list_shapes(by_model.get(wanted.donor) or next(iter(by_model.values())))
            for model, names in holders.items():
                for packed in names:
                    _put_parts(made[model], packed, kind, shapes)
    return made, Packs(stored_as)


def _choose(
    kind: Kind,
    by_model: Mapping[str, Mapping[str, Apart]],
    holders: Mapping[str, Sequence[str]],
    offers: Mapping[str, Offers],
    wanted: Arrangement,
) -> str:
    """Return whether stacks of a kind are merged whole, in parts, or as they are (empty)."""
    own = by_model.get(wanted.donor) or next(iter(by_model.values()))
    together = not wanted.alone and not any(wanted.divides(parts.names) for parts in own.values())
    if not all(_can_stack(offers[model], parts) for model, found in by_model.items() for parts in found.values()):
        return ""
    joined = any(parts.joined for found in by_model.values() for parts in found.values())
    if wanted.donor in holders or joined:
        return "whole"
    if not holders:
        return "whole" if together and _is_numbered(own) else ""
    plain = all(
        isinstance(offers[model][name].expression, Stored) for model, names in holders.items() for name in names
    )
    return "parts" if plain and not together else "whole"


def _is_mixed_alike(
    by_model: Mapping[str, Mapping[str, Apart]], holders: Mapping[str, Sequence[str]], offers: Mapping[str, Offers]
) -> bool:
    """Whether all models store the whole in the same layers and parts in the same others, whose kinds differ.

    So minimax does: its layers of linear attention have one projection, and its other layers three (2026-11-30).
    """
    if any(parts.joined for found in by_model.values() for parts in found.values()):
        return False
    stored = {(frozenset(by_model.get(model, ())), frozenset(holders.get(model, ()))) for model in offers}
    return len(stored) == 1 and bool(holders)


def _is_numbered(own: Mapping[str, Apart]) -> bool:
    """Whether the whole has one more axis than its parts: that of the experts."""
    return any(len(parts.shape) > len(parts.shapes[0]) for parts in own.values())


def _can_stack(offers: Offers, parts: Apart) -> bool:
    found = [] if parts.joined else [offers[name] for name in parts.names]
    return all(is_mergeable(offer.dtype) and offer.expression.count_rounds() == (0, 0) for offer in found)


def _find_packed(
    offers: Mapping[str, Offers], kinds: Mapping[Kind, object]
) -> Mapping[Kind, Mapping[str, Sequence[str]]]:
    """Return which models offer the whole of stacks of which kind, and under which names."""
    packed: dict[Kind, dict[str, list[str]]] = {}
    endings = tuple({kind.rest.rpartition(".")[2] for kind in kinds})
    for model, found in offers.items() if kinds else ():
        for name, offer in found.items():
            if not offer.parts and name.endswith(endings) and (kind := _split(name)[1]) in kinds:
                packed.setdefault(kind, {}).setdefault(model, []).append(name)
    return packed


def _put_stack(made: dict[str, Offer], packed: str, parts: Apart) -> None:
    if parts.joined:
        made[packed] = made[packed]._replace(matched=parts.names[0])
        return
    from mergemill.engine.tensors.stacked import stack  # which only other layouts need

    found = [made.pop(name) for name in parts.names]
    uses = tuple(use for offer in found for use in offer.uses)
    made[packed] = Offer(stack([offer.expression for offer in found], parts.shape), uses, matched=parts.names[0])


def _put_parts(
    made: dict[str, Offer], packed: str, kind: Kind, shapes: Mapping[Shape, Sequence[tuple[str, Shape]]]
) -> None:
    offer = made[packed]
    found = shapes.get(offer.shape)
    if found is None or not isinstance(offer.expression, Stored):
        return  # of another shape: the plan says so
    from mergemill.engine.tensors.stacked import cut_stored

    del made[packed]
    cut = cut_stored(offer.expression, [shape for _, shape in found])
    for (rest, _), part in zip(found, cut, strict=True):
        made[_join(kind, _split(packed)[0], rest)] = Offer(part, offer.uses, matched=packed)


def _note_parts(
    kind: Kind, own: Mapping[str, Apart], stored_as: dict[tuple[Kind, Shape], tuple[tuple[str, Shape], ...]]
) -> None:
    for shape, parts in _list_shapes(own).items():
        stored_as[kind, shape] = parts


def _list_shapes(own: Mapping[str, Apart]) -> dict[Shape, tuple[tuple[str, Shape], ...]]:
    """Return the parts of a whole by its shape: their names after the layer, and their shapes."""
    found: dict[Shape, tuple[tuple[str, Shape], ...]] = {}
    for parts in own.values():
        if parts.shape not in found:
            rests = (_split(name)[1].rest for name in parts.names)
            found[parts.shape] = tuple(zip(rests, parts.shapes, strict=True))
    return found


def _find_apart(offers: Offers, family: Family) -> dict[str, Apart]:
    """Return the stacks of which all parts are offered, by the name of the whole."""
    plain = [layout for layout in family.turned if len(layout.parts) == 1]  # others are no stack of their parts
    layouts = (*plain, *family.layouts)
    places = {member: (layout, at) for layout in reversed(layouts) for at, member in enumerate(layout.parts)}
    lengths = sorted({member.count(".") + 1 for member in places})
    ends = tuple({member.rpartition("#")[2] for member in places})  # by which most names are known to be none
    parts: dict[tuple[str, Layout], dict[tuple[int, int], str]] = {}
    for name in (name for name in offers if name.endswith(ends)):
        for beginning, member, number in _iter_endings(name, lengths, places):
            layout, at = places[member]
            parts.setdefault((beginning, layout), {})[number, at] = name
    found = {packed: _take_joined(offer) for packed, offer in offers.items() if offer.parts}
    for (beginning, layout), placed in parts.items():
        packed = f"{beginning}{layout.whole}"
        count = max(number for number, _ in placed) + 1
        complete = len(placed) == count * len(layout.parts)
        turned = layout not in family.turned and is_packed_otherwise(packed, family)
        if complete and packed not in offers and not turned:
            names = tuple(placed[key] for key in sorted(placed))
            if made := _make_apart(names, [offers[name].shape for name in names], layout):
                found[packed] = made
    return found


def _take_joined(offer: Offer) -> Apart:
    names, shapes = tuple(info.name for info in offer.parts), tuple(info.shape for info in offer.parts)
    return Apart(names, shapes, offer.shape, joined=True)


def _make_apart(names: tuple[str, ...], shapes: Sequence[Shape], layout: Layout) -> Apart | None:
    """Return the parts as a stack; None where their shapes are not those of one."""
    period = len(layout.parts)
    first = shapes[:period]
    even = all(shape == first[i % period] for i, shape in enumerate(shapes))
    if not even or any(not shape or 0 in shape or shape[1:] != first[0][1:] for shape in first):
        return None
    rows = (sum(shape[0] for shape in first), *first[0][1:])
    return Apart(names, tuple(shapes), (len(names) // period, *rows) if layout.numbered else rows)


def _iter_endings(name: str, lengths: Iterable[int], members: Container[str]) -> Iterator[tuple[str, str, int]]:
    """Yield the name's beginnings, and endings among `members`, with ``#`` for a number, and the one it has, or 0."""
    words = name.split(".")
    plain = ["#" if word.isdecimal() else word for word in words]
    for length in lengths:
        member = ".".join(plain[-length:])
        if length <= len(words) and member in members:
            numbers = [int(word) for word in words[-length:] if word.isdecimal() and len(word) < 7]
            if len(numbers) < 2:
                yield "".join(f"{word}." for word in words[:-length]), member, numbers[0] if numbers else 0


def _split(name: str) -> tuple[int, Kind]:
    split = split_layer(name)
    return (-1, Kind("", name)) if split is None else (split[1], Kind(split[0], split[2]))


def _join(kind: Kind, layer: int, rest: str) -> str:
    return rest if layer < 0 else join_layer(kind.stack, layer, rest)
