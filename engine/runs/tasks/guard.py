"""The guard: which tensors came out broken or changed far more than their inputs, and what changed most.

It watches what is calculated: merged tensors, rows that are made for another tokenizer, and tensors that are only cast,
which may make infinities. A tensor that is copied holds what its source held.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mergemill.engine.errors import RunError
from mergemill.engine.methods.contract import say_number
from mergemill.engine.plan.values import OutputTensor, Plan
from mergemill.engine.runs.outputs.receipts import Receipt
from mergemill.engine.tensors.drift import Drift

_NOISE = 1e-6  # of the base's norm: a change as small as this is rounding, whatever the inputs' own
MOST_CHANGED = 10
PREFIX, FACTOR = "base_model.model.", ".lora_"  # around the modules in the names of an adapter's factors

# Of a piece: whether the base was kept, how many values are not finite, and sampled squares; None is no finite number.
Row = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class TensorChange:
    """How far one tensor of the output lies from its base (or, without one, from its first input)."""

    tensor: str
    change: float | None  # ‖merged − base‖ / ‖base‖, from a sample; None where that is not finite
    growth: float | None  # ‖merged − base‖ / the largest ‖Wᵢ − base‖, likewise; 0 where there is nothing to compare
    broken: int  # values that are not finite
    kept_base: bool  # the base was written instead
    fault: str  # what the guard found, for people; empty where nothing


@dataclass(frozen=True, slots=True)
class Report:
    """What the guard saw of a whole merge."""

    faults: tuple[TensorChange, ...]
    most_changed: tuple[TensorChange, ...]  # at most ten, the most changed first


def find_fault(drift: Drift, most_growth: float) -> str:
    """Say what is wrong with a tensor that drifted so; empty where nothing is."""
    if drift.broken:
        return f"has {drift.broken:,} values that are not finite"
    growth = find_growth(drift)
    if growth > most_growth:
        most = say_number(most_growth)
        return f"changed {_say_more(growth, most_growth)} times as much as any of its inputs, more than {most} times"
    return ""


def _say_more(value: float, than: float) -> str:
    """Return a number in as few digits as show that it is more.

    >>> _say_more(12.3456, 10.0), _say_more(10.0001, 10.0)
    ('12.3', '10.0001')
    """
    return next(text for digits in (3, 6, 17) if float(text := f"{value:.{digits}g}") > than)


def find_growth(drift: Drift) -> float:
    """Return the tensor's change as a multiple of the largest among its inputs; 0 where there is none to compare.

    Infinite where only the change is not finite; what follows from inputs that are not finite says nothing.
    """
    if not drift.inputs or not all(map(math.isfinite, [drift.base, *drift.inputs])):
        return 0.0
    if not math.isfinite(drift.moved):
        return math.inf
    largest = max([*drift.inputs, _NOISE**2 * drift.base])
    return math.sqrt(drift.moved / largest) if largest > 0 else 0.0


def make_report(plan: Plan, receipts: Iterable[Receipt]) -> Report:
    """Sum up what the receipts of all parts say of the tensors, whatever the order in which the parts ended."""
    changes, unmerged = _find_changes(plan, receipts)
    merged = [change for change in changes if change.tensor not in unmerged]
    return Report(tuple(change for change in changes if change.fault), tuple(merged[:MOST_CHANGED]))


def find_losses(plan: Plan, receipts: Iterable[Receipt]) -> Mapping[str, float | None]:
    """Return ‖D − BA‖ / ‖D‖ of each module of an adapter that is cut from a change D, the largest first."""
    tensors = [piece.tensor for part in plan.parts for piece in part.pieces]
    factors = {each.name for each in tensors if getattr(each.expression.made_with, "tells_loss", False)}
    changes, unmerged = _find_changes(plan, receipts)
    return {
        change.tensor.removeprefix(PREFIX).partition(FACTOR)[0]: change.change
        for change in changes
        if change.tensor in factors and change.tensor not in unmerged
    }


def _find_changes(plan: Plan, receipts: Iterable[Receipt]) -> tuple[list[TensorChange], Mapping[str, str]]:
    """Return what the receipts say of each tensor, the most changed first, and which no method merges.

    Any order of the receipts gives the same.
    """
    rows: dict[str, list[Row]] = {}
    unmerged: dict[str, str] = {}  # tensors that no method merges: of a cast what to what
    for receipt in sorted(receipts, key=lambda receipt: receipt.part):
        pieces = [piece for piece in plan.parts[receipt.part].pieces if _is_watched(piece.tensor)]
        if len(receipt.drifts) != len(pieces):
            continue  # nothing was merged, or the journal is of a version without a guard, or damaged
        for piece, row in zip(pieces, receipt.drifts, strict=True):
            if _is_row(row) and len(row) == len(rows.get(piece.tensor.name, [row])[0]):
                rows.setdefault(piece.tensor.name, []).append(row)
            if is_cast(piece.tensor):
                unmerged[piece.tensor.name] = f", cast from {piece.tensor.expression.dtype} to {piece.tensor.dtype}"
            elif not piece.tensor.expression.is_merged:
                unmerged[piece.tensor.name] = ""
    changes = [_make_change(name, found, plan.guard.growth, unmerged.get(name, "")) for name, found in rows.items()]
    return sorted(changes, key=lambda change: (-_rank(change), change.tensor)), unmerged


def is_cast(tensor: OutputTensor) -> bool:
    """Whether a tensor is one input's, written in another dtype."""
    return not tensor.expression.is_merged and tensor.expression.dtype != tensor.dtype


def _is_watched(tensor: OutputTensor) -> bool:
    return tensor.expression.is_watched or is_cast(tensor)


def check_report(report: Report, policy: str, out: str) -> None:
    """Raise `RunError` for the worst fault where the guard's policy is to fail."""
    if policy != "fail" or not report.faults:
        return
    worst = report.faults[0]
    more = f" (and {len(report.faults) - 1} more tensors)" if len(report.faults) > 1 else ""
    raise RunError(
        f"{out}: {worst.tensor} {worst.fault}{more}; the guard's policy is 'fail', so nothing was "
        f"committed. Change the recipe and merge into another folder, or mergemill abort {out}"
    )


def to_row(drift: Drift, *, kept_base: bool) -> Row:
    """Return a drift as a receipt keeps it: rows of the pieces of one tensor add up, number by number."""
    return [int(kept_base), drift.broken, *map(_finite, [drift.base, *drift.inputs, drift.moved])]


def _is_row(row: Row) -> bool:
    """Whether that can be what `to_row` made: it is empty for a piece that was not merged; a journal may be damaged."""
    return len(row) >= 4 and None not in row[:2] and all(number is None or 0 <= number < math.inf for number in row)


def _make_change(tensor: str, rows: Sequence[Row], most_growth: float, cast: str) -> TensorChange:
    kept, broken, base, *inputs, moved = map(_add_up, zip(*rows, strict=True))
    drift = Drift(int(broken), moved, base, tuple(inputs))
    fault = find_fault(drift, most_growth)
    return TensorChange(
        tensor=tensor,
        change=_finite(math.sqrt(moved / base)) if base > 0 else None if moved else 0.0,
        growth=_finite(find_growth(drift)),
        broken=drift.broken,
        kept_base=kept > 0,
        fault=fault and fault + cast,
    )


def _add_up(numbers: Sequence[float | None]) -> float:
    return sum(math.nan if number is None else number for number in numbers)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rank(change: TensorChange) -> float:
    return math.inf if change.change is None else change.change
