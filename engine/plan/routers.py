"""Routers: the row of every expert in every layer, drawn at random or taken from a file of gates.

A file of gates has for layer i the tensors ``layers.{i}.gate`` [experts, hidden], before MLPs are cut into several
experts, and ``layers.{i}.shared_gate`` [1, hidden] where the shared expert is weighed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mergemill.engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.formats import offer_stored
from mergemill.engine.plan.experts import Assembly, Tensors
from mergemill.engine.plan.gates import GateJob, name_gate
from mergemill.engine.plan.small_files import GATES_NAME
from mergemill.engine.plan.values import SmallFile
from mergemill.engine.storage.store import Storage
from mergemill.engine.tensors.channels import cut_rows
from mergemill.engine.tensors.drawn import Drawn, Given
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.stacked import stack


@dataclass(frozen=True, slots=True)
class Routing:
    """What the routers are made of."""

    hidden: int
    stored: Mapping[str, Expression]  # of a file of gates, by name; empty without one
    job: GateJob | None = None  # what they are computed from


def open_gates(path: str, making: Assembly, layers: int, hidden: int, storage: Storage) -> Routing:
    """Return what the routers of all layers are in a file of gates; `PlanError` for one of another mixture."""
    gates = open_checkpoint(path, None, storage)
    wanted = {name_gate(layer): (len(making.routed), hidden) for layer in range(layers)}
    if making.architecture.shared_gate:
        wanted |= {name_gate(layer, shared=True): (1, hidden) for layer in range(layers)}
    offers = offer_stored(gates)
    for name, shape in wanted.items():
        found = offers[name].shape if name in offers else None
        if found != shape:
            has = "is not there" if found is None else f"has shape {list(found)}"
            raise PlanError(f"{making.where}: gates: {path}: {name} {has}; this mixture needs {list(shape)}")
    return Routing(hidden, {name: offers[name].expression for name in wanted})


def copy_gates(path: str, storage: Storage) -> SmallFile:
    """Return a file of gates as one that the output keeps."""
    gates: Checkpoint = open_checkpoint(path, None, storage)
    return SmallFile(GATES_NAME, None, next(iter(gates.tensors.values())).file)


def make_routers(making: Assembly, routing: Routing, layer: int) -> Tensors:
    """Yield a layer's router, and the row that weighs its shared expert; rows are equal within a cut MLP."""
    name = making.architecture.name_router(packed=making.packed)
    yield name, _make_router(making, routing, layer)
    if making.architecture.shared_gate:
        yield making.architecture.shared_gate, _make_rows(making, routing, layer, 1, shared=True)


def _make_router(making: Assembly, routing: Routing, layer: int) -> Expression:
    count, parts = len(making.routed), making.mixture.granularity
    whole = _make_rows(making, routing, layer, count, shared=False)
    if parts == 1 or isinstance(whole, Drawn | Given):
        return whole
    rows = [row for row in cut_rows(whole, count) for _ in range(parts)]
    return stack(rows, (count * parts, routing.hidden))


def _make_rows(making: Assembly, routing: Routing, layer: int, count: int, *, shared: bool) -> Expression:
    name, mode = name_gate(layer, shared=shared), making.mixture.gate_mode
    if mode == "file":
        return routing.stored[name]
    parts = 1 if shared else making.mixture.granularity
    if routing.job is not None:
        cut = tuple(row for row in range(count) for _ in range(parts)) if parts > 1 else ()
        return Given(name, (count * parts, routing.hidden), routing.job.made_of, cut)
    rows = tuple(row for row in range(count) for _ in range(parts))
    if mode == "random":
        return Drawn(making.seed, making.key(name), rows, routing.hidden, "normal", 1.0)
    return Drawn(making.seed, making.key(name), rows, routing.hidden, "uniform", 1.0 / math.sqrt(routing.hidden))
