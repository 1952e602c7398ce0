"""Experts of mixtures that are merged with each other: put into the donor's order, where a recipe asks for that.

Mixtures that were trained apart number their experts as they please. Layer by layer, an expert of a model becomes the
one of the donor whose router's row points where its own does: of all ways to pair them, the one with the largest sum of
cosines. Routers are read for it when the merge is planned, some megabytes; experts are not. What follows the experts'
order changes with them: the router's rows, its biases, and experts that are packed in one tensor.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.checkpoint.family import split_layer
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.recipe import Recipe
from mergemill.engine.storage.store import Storage
from mergemill.engine.tensors.assignment import assign
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.slabs import Span

_NUMBERED = re.compile(r"(?P<module>.+)\.experts\.(?P<number>\d{1,6})\.(?P<rest>.+)")
_PACKED = re.compile(r"(?P<module>.+)\.experts\.(?P<rest>[a-z_]+(\.weight|\.bias)?)")
_ROUTERS = ("gate", "router")  # what modules beside the experts are called

Matrix = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Sparse:
    """A mixture's layer: of one model, what hangs on the order of its experts."""

    count: int  # of experts
    router: str  # the name of its matrix, [experts, hidden]
    ordered: tuple[str, ...]  # tensors with an entry an expert, the router's among them
    numbered: tuple[tuple[str, int], ...]  # tensors of one expert each, and its number


def match_experts(
    recipe: Recipe, offers: Mapping[str, Offers], donor: str, storage: Storage, *, where: str
) -> tuple[Mapping[str, Offers], list[str]]:
    """Return the offers with all models' experts in the donor's order, and a line for each model of what was found.

    `PlanError` where there is nothing to match.
    """
    if recipe.models is None:
        raise PlanError(f"{where}: match_experts is for whole models; give models instead of slices or modules")
    layers = {model: find_sparse(found) for model, found in offers.items()}
    if not layers[donor]:
        raise PlanError(f"{where}: match_experts: {donor} has no experts with a router beside them; leave it out")
    made, told = dict(offers), []
    for model, found in layers.items():
        if model == donor:
            continue
        _check_alike(found, layers[donor], (model, donor), where)
        orders, before, after = {}, [], []
        for module, own in layers[donor].items():
            routers = [_read(offers[name][own.router], storage) for name in (donor, model)]
            for name, router in zip((donor, model), routers, strict=True):
                if not np.isfinite(router).all():
                    raise PlanError(
                        f"{where}: match_experts: {name}: tensor {own.router} has values that are not finite, by which "
                        f"no expert can be matched; leave match_experts out"
                    )
            cosines = _find_cosines(*routers)
            orders[module] = assign(cosines)
            before.append(float(np.diag(cosines).mean()))
            after.append(float(cosines[np.arange(own.count), orders[module]].mean()))
        made[model] = dict(_reorder(offers[model], found, orders))
        moved = sum(order != list(range(len(order))) for order in orders.values())
        told.append(
            f"{where}: {model}: experts are put in the order of {donor}'s in {moved} of {len(orders)} layers; the "
            f"routers' rows have a cosine of {np.mean(after):.2f} then, of {np.mean(before):.2f} as they are"
        )
    return made, told


def find_sparse(offers: Offers) -> dict[str, Sparse]:
    """Return the layers of a mixture by the module that holds the experts; of those without a router none."""
    numbered: dict[str, list[tuple[str, int]]] = {}
    packed: dict[str, list[str]] = {}
    for name in offers:
        if split_layer(name) is None:
            continue
        if found := _NUMBERED.fullmatch(name):
            numbered.setdefault(found["module"], []).append((name, int(found["number"])))
        elif found := _PACKED.fullmatch(name):
            packed.setdefault(found["module"], []).append(name)
    layers = {}
    for module in {**numbered, **packed}:
        own = numbered.get(module, [])
        count = max((number + 1 for _, number in own), default=0) or offers[packed[module][0]].shape[0]
        beside = [name for name in offers if name.startswith(tuple(f"{module}.{each}." for each in _ROUTERS))]
        ordered = [name for name in (*beside, *packed.get(module, ())) if offers[name].shape[:1] == (count,)]
        router = next((name for name in beside if name in ordered and len(offers[name].shape) == 2), None)
        if router is not None:
            layers[module] = Sparse(count, router, tuple(ordered), tuple(own))
    return layers


def _check_alike(found: Mapping[str, Sparse], donor: Mapping[str, Sparse], names: tuple[str, str], where: str) -> None:
    for module, own in donor.items():
        other = found.get(module)
        if other is None or other.count != own.count:
            has = "no experts with a router" if other is None else f"{other.count} experts"
            raise PlanError(
                f"{where}: match_experts: {names[0]} has {has} in {module}, and {names[1]} {own.count}; only mixtures "
                f"of as many experts can be matched"
            )


def _find_cosines(one: Matrix, other: Matrix) -> Matrix:
    """Return the cosines of all rows of one matrix with all of another."""
    rows = [each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-30) for each in (one, other)]
    cosines: Matrix = rows[0] @ rows[1].T
    return cosines


def _reorder(
    offers: Offers, layers: Mapping[str, Sparse], orders: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, Offer]]:
    """Yield a model's offers with expert e the one that was number ``order[e]``."""
    called: dict[str, str] = {}
    ordered: dict[str, Sequence[int]] = {}
    for module, own in layers.items():
        order = orders[module]
        if list(order) == list(range(own.count)):
            continue
        place = {number: new for new, number in enumerate(order)}
        beginning = len(f"{module}.experts.")
        for name, number in own.numbered:
            called[name] = f"{name[:beginning]}{place[number]}{name[beginning + len(str(number)) :]}"
        ordered |= dict.fromkeys(own.ordered, order)
    for name, offer in offers.items():
        order = ordered.get(name, ())
        made = offer._replace(expression=_take_rows(offer.expression, order)) if order else offer
        yield called.get(name, name), made


def _take_rows(expression: Expression, order: Sequence[int]) -> Expression:
    from mergemill.engine.tensors.row_maps import make_row_map  # which only this and vocabularies need
    from mergemill.engine.tensors.rows import Rows

    return Rows((expression,), make_row_map(order), expression.dtype)


def _read(offer: Offer, storage: Storage) -> Matrix:
    """Return a router, which is small, as float64."""
    from mergemill.engine.tensors.thin import settle_whole  # these are what runs need, and plans do not
    from mergemill.engine.tensors.workspace import Workspace, aligned

    expression = offer.expression
    span = Span(0, expression.size)
    held = sum(aligned(read.size_bytes) for read in (*expression.reads(span), *expression.holds(span)))
    arena = np.empty(2 * held + 4 * expression.slab_bytes(expression.size, "F32") + (1 << 16), np.uint8)
    with Workspace(arena, storage=storage) as work:
        ready = settle_whole(expression, work)
        work.next_slab()
        values: Matrix = ready.slab(span, work, "F32").double().numpy().reshape(expression.shape).copy()
    return values
