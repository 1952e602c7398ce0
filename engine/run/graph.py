"""A plan as a graph of `dask.delayed` tasks: a round of statistics before the parts that need one, no tensor in it.

Task arguments are pickled beforehand: Dask looks into the arguments of delayed functions, and would take plans apart.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dask.delayed import Delayed, delayed

from mergemill.engine.plan.memory import needs_passes
from mergemill.engine.plan.values import Part, Piece, Plan
from mergemill.engine.run.cluster import find_workplace
from mergemill.engine.run.receipts import Receipt
from mergemill.engine.run.task import check_part, gather_piece, run_part
from mergemill.engine.tensors.expressions import Merged
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.slabs import SLAB

FAN_IN = 4  # partial statistics that one task adds up


def make_tasks(
    plan: Plan, parts: Sequence[Part], paths: Sequence[Path], kept: Mapping[int, Receipt], slab: int = SLAB
) -> list[Delayed]:
    """Return a task for each of `parts`; its result is ``(Receipt, whether the part of an earlier run was kept)``.

    paths: where each shard of the plan is written. kept: receipts of an earlier run, whose parts are checked first.
    """
    totals = {name: _make_totals(name, pieces, plan.digest, slab) for name, pieces in iter_cut_tensors(plan, parts)}
    return [
        _run(
            pickle.dumps((part, plan.shards[part.shard].name, paths[part.shard], kept.get(part.number), slab)),
            [piece.tensor.name for piece in _cut_pieces(part)],
            [totals[piece.tensor.name] for piece in _cut_pieces(part)],
            dask_key_name=f"merge-{part.number:06d}-{plan.digest[:12]}",
        )
        for part in parts
    ]


def iter_cut_tensors(plan: Plan, parts: Sequence[Part]) -> Iterator[tuple[str, list[Piece]]]:
    """Yield the tensors of which `parts` hold pieces and whose statistics need all pieces of the plan."""
    wanted = {piece.tensor.name for part in parts for piece in _cut_pieces(part)}
    pieces: dict[str, list[Piece]] = {}
    for part in plan.parts:
        for piece in _cut_pieces(part):
            if piece.tensor.name in wanted:
                pieces.setdefault(piece.tensor.name, []).append(piece)
    yield from pieces.items()


def _make_totals(name: str, pieces: Sequence[Piece], digest: str, slab: int) -> list[Delayed]:
    expression = pieces[0].tensor.expression
    assert isinstance(expression, Merged)
    totals: list[Delayed] = []
    for number in range(expression.rounds()):
        key = f"{name}-round{number}-{digest[:12]}"
        partials = [
            _gather(pickle.dumps((piece, slab)), list(totals), dask_key_name=f"gather-{key}-{i:06d}")
            for i, piece in enumerate(pieces)
        ]
        totals.append(_make_total(partials, key))
    return totals


def _make_total(partials: Sequence[Delayed], key: str) -> Delayed:
    """Add up in a tree: a histogram is half a megabyte a model, and those of hundreds of pieces must not meet."""
    level = 0
    while len(partials) > 1:
        level += 1
        partials = [
            _add(partials[i : i + FAN_IN], dask_key_name=f"total{level}-{key}-{i:06d}")
            for i in range(0, len(partials), FAN_IN)
        ]
    return partials[0]


def _cut_pieces(part: Part) -> list[Piece]:
    return [piece for piece in part.pieces if not piece.whole and needs_passes(piece)]


@delayed(pure=False, traverse=True)
def _run(spec: bytes, names: list[str], totals: list[list[Partial]]) -> tuple[Receipt, bool]:
    part, shard, path, receipt, slab = pickle.loads(spec)
    workplace = find_workplace()
    if receipt is not None and check_part(part, path, receipt, workplace):
        return receipt, True
    return run_part(part, shard, path, dict(zip(names, totals, strict=True)), workplace, slab), False


@delayed(pure=False)
def _gather(spec: bytes, totals: list[Partial]) -> Partial:
    piece, slab = pickle.loads(spec)
    return gather_piece(piece, totals, find_workplace(), slab)


@delayed(pure=False)
def _add(partials: list[Partial]) -> Partial:
    total: Partial = ()
    for partial in partials:
        total = add_partials(total, partial)
    return total
