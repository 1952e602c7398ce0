"""How two models differ, tensor by tensor: planned from headers, measured on Dask in one pass, nothing written."""

import math
import pickle
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

from dask.delayed import delayed

from mergemill.engine.errors import RunError
from mergemill.engine.plan.compare import Comparison, TensorPlace, make_comparison
from mergemill.engine.plan.memory import check_memory
from mergemill.engine.plan.values import OutputTensor, Part, Plan
from mergemill.engine.runs.clusters.preflight import Needs
from mergemill.engine.runs.clusters.reach import choose_samples
from mergemill.engine.runs.crew import Crew, check_crew, find_workplace, open_crew
from mergemill.engine.runs.differences import Delta, Diff, TensorDiff
from mergemill.engine.runs.tasks.failures import WorkersDied, explain_deaths, run_named
from mergemill.engine.runs.tasks.measure import measure_part
from mergemill.engine.runs.worker.options import WorkerKeywords, WorkerOptions
from mergemill.engine.runs.worker.workers import choose_workers
from mergemill.engine.storage.ranges import is_remote
from mergemill.engine.tensors.comparing import Gathered, SideTotals, read_total
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.rounds import find_round
from mergemill.engine.tensors.sketch import find_effective_rank

OnPart = Callable[[int, int, int, int], None]  # given bytes done and to do, parts done and all parts


def diff(
    first: str,
    second: str,
    base: str | None = None,
    *,
    on_part: OnPart | None = None,
    **options: Unpack[WorkerKeywords],
) -> Diff:
    """Compare two models, and what each changed of a `base`; references are those of a recipe.

    on_part: is called in this thread as the work goes on. options: of the workers, see `WorkerOptions`. Raises
    `InputError` for models that cannot be opened, and `RunError` for what goes wrong later.
    """
    started = time.perf_counter()
    asked = WorkerOptions(**options)
    comparison = make_comparison(first, second, base, storage=asked.find_storage())
    measured = _measure(comparison.plan, asked, on_part or (lambda *_: None))
    tensors = [each for part in comparison.plan.parts for each in (piece.tensor for piece in part.pieces)]
    made = {each.name: _describe(each, comparison, measured.get(each.name)) for each in tensors}
    return Diff(
        comparison.models,
        tuple(made[name] for name in comparison.places if name in made),
        comparison.only,
        comparison.shapes,
        comparison.why_not,
        comparison.plan.read_bytes,
        round(time.perf_counter() - started, 3),
    )


@dataclass(slots=True)
class _Measuring:
    """The totals of all tensors, as their pieces come."""

    totals: dict[str, list[Partial]]  # of the rounds that are over
    going: dict[str, Partial]  # of the one that goes on
    left: Counter[str]  # pieces that it still lacks
    done: dict[str, Gathered]


def _measure(plan: Plan, asked: WorkerOptions, on_part: OnPart) -> Mapping[str, Gathered]:
    """Return what was gathered of each tensor."""
    chosen = choose_workers(plan, asked)
    check_memory(plan.parts, chosen.memory_bytes)
    files = {pin.url: pin.size_bytes for pin in plan.pins if not is_remote(pin.url)}
    needs = Needs(files, choose_samples(plan.pins), "")
    check_crew(chosen, needs, lambda *_: None, asked.wait_s)
    tally = _Measuring({}, {}, Counter(), {})
    token = plan.digest[:12] + secrets.token_hex(4)
    left = list(plan.parts)
    if not left:
        return {}
    with open_crew(chosen, token) as crew:
        if chosen.cluster:
            crew.check_needs(needs)
        try:
            while left:
                _run_round(left, tally, crew, token, on_part)
                left = [part for part in left if any(piece.tensor.name not in tally.done for piece in part.pieces)]
        except WorkersDied as error:
            raise explain_deaths(error, plan) from error
    return tally.done


def _run_round(parts: list[Part], tally: _Measuring, crew: Crew, token: str, on_part: OnPart) -> None:
    """Run the next round of all tensors that have one."""
    tensors = {piece.tensor.name: piece.tensor for part in parts for piece in part.pieces}
    tally.left = Counter(piece.tensor.name for part in parts for piece in part.pieces)
    rounds = max((len(found) for found in tally.totals.values()), default=0)
    done = 0

    def take(found: list[tuple[str, Partial]]) -> None:
        nonlocal done
        for name, partial in found:
            tally.going[name] = add_partials(tally.going.get(name, ()), partial)
            tally.left[name] -= 1
            if not tally.left[name]:
                _finish_round(tensors[name], tally)
        done += 1
        on_part(done, len(parts), done, len(parts))

    tasks = [
        _later_measure(
            pickle.dumps((part, {piece.tensor.name: tally.totals.get(piece.tensor.name, []) for piece in part.pieces})),
            dask_key_name=f"measure-{rounds}-{part.number:06d}-{token}",
        )
        for part in parts
    ]
    crew.run_tasks(tasks, take)


def _finish_round(tensor: OutputTensor, tally: _Measuring) -> None:
    """All pieces of a tensor have come: another round is due, or what was gathered is complete."""
    totals = tally.totals.setdefault(tensor.name, [])
    totals.append(tally.going.pop(tensor.name))
    if find_round(tensor.expression.rounds(), totals) is None:
        tally.done[tensor.name] = _read(tensor.expression, tally.totals.pop(tensor.name)[-1])


def _read(compared: Any, total: Partial) -> Gathered:
    return read_total(total, based=len(compared.inputs) == 3, is_number=compared.is_number)


def _run_measure(spec: bytes) -> list[tuple[str, Partial]]:
    part, totals = pickle.loads(spec)
    workplace = find_workplace()
    return run_named(lambda: measure_part(part, totals, workplace), part.pieces, workplace)


_later_measure = delayed(_run_measure, pure=False)


def _describe(tensor: OutputTensor, comparison: Comparison, found: Gathered | None) -> TensorDiff:
    place: TensorPlace = comparison.places[tensor.name]
    expression, models = tensor.expression, comparison.models
    if found is None and expression.size:
        raise RunError(f"{tensor.name}: was not measured (a fault of mergemill)")
    sides = found.sides if found is not None else ()
    pairs = [(models[0], models[2]), (models[1], models[2])] if len(models) == 3 else [(models[1], models[0])]
    same = found is None or found.apart == 0
    return TensorDiff(
        tensor.name,
        place.kind,
        place.stack,
        place.layer,
        expression.shape,
        tuple(each.dtype for each in expression.inputs),
        tuple(_describe_side(side, *names, expression.size) for side, names in zip(sides, pairs, strict=False)),
        same,
        _find_cosine(found),
        found.agreeing / found.signed if found is not None and found.signed else None,
    )


def _describe_side(side: SideTotals, model: str, less: str, size: int) -> Delta:
    norm, own = _root(side.squares), _root(side.own)
    rank = find_effective_rank(side.sketch, side.squares, side.fourths) if side.sketch.size else 0.0
    moved, stood = side.rows
    return Delta(
        model,
        less,
        norm,
        own,
        norm / own if own else None,
        side.zeros / size,
        side.unlike == 0,
        side.largest,
        rank or None,
        tuple(side.histogram.tolist()),
        tuple(math.sqrt(new / old) if old else None for new, old in zip(moved.tolist(), stood.tolist(), strict=True)),
    )


def _find_cosine(found: Gathered | None) -> float | None:
    """Return the cosine of the pair; NaN where they hold what is not finite, None where either is 0."""
    if found is None or not found.sides:
        return None
    first, second, product = found.squares
    both = math.sqrt(first) * math.sqrt(second) if first >= 0 and second >= 0 else math.nan
    if not both:
        return None
    cosine = product / both
    return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else math.nan


def _root(squares: float) -> float:
    return math.sqrt(squares) if squares >= 0 else math.nan
