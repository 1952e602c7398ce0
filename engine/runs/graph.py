"""A plan as a graph of `dask.delayed` tasks: a round of statistics before the parts that need one, no tensor in it.

Task arguments are pickled beforehand: Dask looks into the arguments of delayed functions, and would take plans apart.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from dask.delayed import Delayed, delayed

from mergemill.engine.plan.values import Part, Piece, Plan
from mergemill.engine.runs.constants import Constant, Packing, unpack
from mergemill.engine.runs.crew import find_workplace
from mergemill.engine.runs.outputs.receipts import Receipt
from mergemill.engine.runs.outputs.target import ShardTarget, Target
from mergemill.engine.runs.tasks.failures import name_in_key, run_named
from mergemill.engine.runs.tasks.piece import find_factors, gather_piece, gather_rest, gather_squares, with_factors
from mergemill.engine.runs.tasks.rounds import cut_pieces, iter_cut_tensors
from mergemill.engine.runs.tasks.task import run_part, run_shard
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.slabs import SLAB

Constants = Sequence[Constant] | None

FAN_IN = 4  # partial statistics that one task adds up


def make_checks(
    plan: Plan, targets: Sequence[Target], receipts: Mapping[int, Receipt], token: str = ""
) -> list[Delayed]:
    """Return a task for each receipt of an earlier run; its result is ``(Receipt, whether the part is as it says)``.

    targets: where each part of the plan is written. token: in every task's key; by default of the plan's digest.
    """
    packing = Packing(token or plan.digest[:12])
    return [
        _later_check(
            *packing.pack((plan.parts[number], targets[number], receipt)),
            dask_key_name=f"check-{number:06d}-{token or plan.digest[:12]}",
        )
        for number, receipt in receipts.items()
    ]


def make_tasks(
    plan: Plan,
    parts: Sequence[Part],
    targets: Sequence[Target],
    slab: int = SLAB,
    token: str = "",
    gates: bytes | None = None,
) -> list[Delayed]:
    """Return a task for each of `parts`, before it whatever must be gathered; its result is a list of receipts.

    Where routers are computed from prompts, and `gates` are not given, one more task is the first: its result is these.

    targets: where each part of the plan is written; parts of a shard that is written whole are one task. token: as for
    `make_checks`.
    """
    token = token or plan.digest[:12]
    packing = Packing(token)
    factors = _make_factors(plan, slab, token, packing)
    cut = dict(iter_cut_tensors(plan, parts))
    totals = {name: _make_totals(name, pieces, factors, token, slab, packing) for name, pieces in cut.items()}
    routed = _make_gates(plan, parts, gates, token)
    tasks = [] if routed is None or gates is not None else [routed]
    for group in _group(parts, targets):
        first, pieces = group[0], [piece for part in group for piece in part.pieces]
        names = list(dict.fromkeys(piece.tensor.name for part in group for piece in cut_pieces(part)))
        tasks.append(
            _later_run(
                *packing.pack((group, plan.shards[first.shard].name, targets[first.number], slab)),
                names,
                [totals[name].usual for name in names],
                [totals[name].rest for name in names],
                factors if any(piece.tensor.expression.is_merged for piece in pieces) else None,
                routed if plan.gates is not None and any(map(needs_gates, group)) else None,
                dask_key_name=f"merge-{first.number:06d}-{token}",
            )
        )
    return tasks


def _make_gates(plan: Plan, parts: Sequence[Part], gates: bytes | None, token: str) -> Delayed | None:
    """Return what gives the gates to those of the parts that need them; None where none does."""
    if plan.gates is None or not any(map(needs_gates, parts)):
        return None
    if gates is not None:
        kept: Delayed = delayed(gates, name=f"kept-gates-{token}")
        return kept
    computed: Delayed = _later_compute_gates(pickle.dumps(plan.gates), dask_key_name=f"gates-{token}")
    return computed


def _group(parts: Sequence[Part], targets: Sequence[Target]) -> Iterator[list[Part]]:
    """Yield the parts that one task merges: one, or all of a shard that is written whole."""
    for _, group in groupby(parts, lambda part: part.shard):
        of_shard = list(group)
        whole = isinstance(targets[of_shard[0].number], ShardTarget)
        yield from [of_shard] if whole else ([part] for part in of_shard)


def _make_factors(plan: Plan, slab: int, token: str, packing: Packing) -> Delayed | None:
    """One pass over all inputs, for the factors on task vectors that follow from the norms of whole models."""
    if plan.scaling is None:
        return None
    key = f"squares-{token}"
    count = len(plan.scaling.vectors)
    squares = [
        _later_gather_squares(*packing.pack((part, count, slab)), dask_key_name=f"gather-{key}-{part.number:06d}")
        for part in plan.parts
    ]
    total = _make_total(squares, key)
    factors: Delayed = _later_find_factors(pickle.dumps(plan.scaling), total, dask_key_name=f"factors-{key}")
    return factors


@dataclass(frozen=True, slots=True)
class _Totals:
    """What the rounds of a cut tensor gather."""

    usual: list[Delayed]  # of each round, from all pieces at once
    rest: Delayed | list[Partial]  # of those that few tensors need, all in one task


def _make_totals(
    name: str, pieces: Sequence[Piece], factors: Delayed | None, token: str, slab: int, packing: Packing
) -> _Totals:
    totals: list[Delayed] = []
    projected, named = pieces[0].projected, name_in_key(name)
    for number in range(projected.usual_rounds):
        key = f"{named}-round{number}-{token}"
        partials = [
            _later_gather(*packing.pack((piece, slab)), list(totals), factors, dask_key_name=f"gather-{key}-{i:06d}")
            for i, piece in enumerate(pieces)
        ]
        totals.append(_make_total(partials, key))
    if projected.most_rounds == projected.usual_rounds:
        return _Totals(totals, [])
    rest = _later_gather_rest(
        *packing.pack((pieces, slab)), list(totals), factors, dask_key_name=f"gather-{named}-rest-{token}"
    )
    return _Totals(totals, rest)


def _make_total(partials: Sequence[Delayed], key: str) -> Delayed:
    """Add up in a tree: a histogram is half a megabyte a model, and those of hundreds of pieces must not meet."""
    level = 0
    while len(partials) > 1:
        level += 1
        partials = [
            _later_add(partials[i : i + FAN_IN], dask_key_name=f"total{level}-{key}-{i:06d}")
            for i in range(0, len(partials), FAN_IN)
        ]
    return partials[0]


def _check(spec: bytes, constants: Constants) -> tuple[Receipt, bool]:
    part, target, receipt = unpack(spec, constants)
    return receipt, target.check(part, receipt, find_workplace())


def _run(
    spec: bytes,
    constants: Constants,
    names: list[str],
    usual: list[list[Partial]],
    rests: list[list[Partial]],
    factors: Sequence[float] | None,
    gates: bytes | None,
) -> list[Receipt]:
    parts, shard, target, slab = unpack(spec, constants)
    parts = [replace(part, pieces=tuple(with_factors(piece, factors) for piece in part.pieces)) for part in parts]
    if gates is not None:
        parts = _put_gates(parts, gates)
    gathered = {name: [*found, *rest] for name, found, rest in zip(names, usual, rests, strict=True)}
    workplace = find_workplace()

    def work() -> list[Receipt]:
        if isinstance(target, ShardTarget):
            return run_shard(parts, shard, target, gathered, workplace, slab)
        return [run_part(part, shard, target, gathered, workplace, slab) for part in parts]

    return run_named(work, [piece for part in parts for piece in part.pieces], workplace)


def needs_gates(part: Part) -> bool:
    """Whether a part writes routers that are computed."""
    from mergemill.engine.tensors.drawn import Given  # of mixtures alone

    return any(isinstance(piece.tensor.expression, Given) for piece in part.pieces)


def _put_gates(parts: Sequence[Part], gates: bytes) -> list[Part]:
    from mergemill.engine.runs.tasks.gates import put_gates, read_gates  # of mixtures alone

    values, _ = read_gates(gates, "gates")
    return [put_gates(part, values) for part in parts]


def _compute_gates(job: bytes) -> bytes:
    from mergemill.engine.runs.tasks.gates import compute_gates

    return compute_gates(pickle.loads(job), find_workplace())


def _gather(spec: bytes, constants: Constants, totals: list[Partial], factors: Sequence[float] | None) -> Partial:
    piece, slab = unpack(spec, constants)
    workplace = find_workplace()
    return run_named(lambda: gather_piece(with_factors(piece, factors), totals, workplace, slab), [piece], workplace)


def _gather_rest(
    spec: bytes, constants: Constants, totals: list[Partial], factors: Sequence[float] | None
) -> list[Partial]:
    pieces, slab = unpack(spec, constants)
    pieces, workplace = [with_factors(piece, factors) for piece in pieces], find_workplace()
    return run_named(lambda: gather_rest(pieces, totals, workplace, slab), pieces, workplace)


def _gather_squares(spec: bytes, constants: Constants) -> Partial:
    part, count, slab = unpack(spec, constants)
    workplace = find_workplace()
    return run_named(lambda: gather_squares(part, count, workplace, slab), part.pieces, workplace)


def _find_factors(scaling: bytes, squares: Partial) -> Sequence[float]:
    return find_factors(pickle.loads(scaling), squares)


def _add(partials: list[Partial]) -> Partial:
    total: Partial = ()
    for partial in partials:
        total = add_partials(total, partial)
    return total


# By other names: a function that its own name does not lead to is pickled whole, with every task that calls it.
_later_check = delayed(_check, pure=False)
_later_run = delayed(_run, pure=False)
_later_gather = delayed(_gather, pure=False)
_later_gather_rest = delayed(_gather_rest, pure=False)
_later_gather_squares = delayed(_gather_squares, pure=False)
_later_find_factors = delayed(_find_factors, pure=False)
_later_compute_gates = delayed(_compute_gates, pure=False)
_later_add = delayed(_add, pure=False)
