"""Cost against the number of models, of tensors, and the size of a tensor, each merge by one thread of this process."""

import cProfile
import math
import multiprocessing
import pstats
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from checkpoints import ITEM_BYTES, Shapes
from costs import Cost, measure_merge, plan_recipe, read_status, reset_peak, take_time, write_models, write_recipe
from tables import GIB, MIB, format_table

NEAR = 1.25  # of the least cost for an element: what is called linear growth
WIDTH = 1024  # of a row of a large tensor
PER_LAYER = 128  # tensors
COLUMNS = (
    "elements of all inputs",
    "parts",
    "plan",
    "start",
    "merge",
    "commit",
    "all",
    "wall s",
    "ns an element",
    "CPU s per GiB",
    "peak MiB",
)


@dataclass(frozen=True)
class Row:
    """One merge of a study."""

    study: str
    method: str
    amount: int  # of what the study varies
    elements: int  # of all inputs
    cost: Cost

    @property
    def element_ns(self) -> float:
        """CPU time for an element of an input."""
        return self.cost.cpu_s / self.elements * 1e9


@dataclass(frozen=True)
class Study:
    """What is varied, and how the models look then."""

    name: str
    unit: str
    shapes: Callable[[int], Shapes]  # of the models, for an amount
    models: Callable[[int], int]  # how many are merged, beside the base


def list_studies(model_bytes: int) -> dict[str, Study]:
    """Return the studies; model_bytes: of one model where its size is not what is varied."""
    return {
        "models": Study(
            "models", "models beside the base", lambda _: make_tensors(16, model_bytes), lambda count: count
        ),
        "tensors": Study("tensors", "tensors", lambda count: make_tensors(count, model_bytes), lambda _: 2),
        "sizes": Study("bytes", "bytes of the one tensor", lambda size: make_tensors(1, size), lambda _: 2),
    }


def make_tensors(count: int, total_bytes: int) -> Shapes:
    """Return the shapes of a model of `count` equal tensors, of layers as experts have them."""
    size = max(1, total_bytes // ITEM_BYTES["BF16"] // count)
    shape = (size // WIDTH, WIDTH) if size % WIDTH == 0 else (size,)
    return {f"model.layers.{i // PER_LAYER}.experts.{i % PER_LAYER}.weight": shape for i in range(count)}


def warm_up(methods: Sequence[str], folder: Path, memory: str) -> None:
    """Merge a tiny model by each method, so that nothing is loaded for the first time while it is measured."""
    write_models(folder, make_tensors(2, 1 << 12), 2, "random")
    for method in methods:
        measure_merge(write_recipe(folder, method, 2), folder / "out", workers=0, threads=1, memory=memory)


def run_study(study: Study, amounts: Iterable[int], methods: Sequence[str], folder: Path, memory: str) -> list[Row]:
    """Merge once for each amount and method; the models of one amount at a time are on the disk."""
    rows = []
    for amount in amounts:
        place = folder / f"{study.name}-{amount}"
        count = study.models(amount)
        write_models(place, study.shapes(amount), count, "random")
        for method in methods:
            recipe = write_recipe(place, method, count)
            cost = measure_merge(recipe, place / "out", workers=0, threads=1, memory=memory)
            rows.append(Row(study.name, method, amount, count_elements(study.shapes(amount), method, count), cost))
        remove_models(place)
    return rows


def count_elements(shapes: Shapes, method: str, models: int) -> int:
    """Return the elements of all inputs of a merge, each counted once."""
    inputs = models + (method != "linear")
    return inputs * sum(math.prod(shape) for shape in shapes.values())


def remove_models(folder: Path) -> None:
    """Remove what `write_models` wrote: it may be the disk's largest."""
    for path in folder.rglob("*.safetensors"):
        path.unlink()


def format_study(study: Study, rows: Sequence[Row]) -> str:
    """Return a table and, for each method, where its growth stops being linear and what costs there."""
    methods = dict.fromkeys(row.method for row in rows)
    before: dict[str, Row] = {}
    lines = []
    for row in sorted(rows, key=lambda row: (list(methods).index(row.method), row.amount)):
        lines.append((row.method, f"{row.amount:,}", *_format_cost(row), _say_further(row, before.get(row.method))))
        before[row.method] = row
    table = format_table(("method", study.unit, *COLUMNS, f"CPU µs for one more of the {study.name}"), lines)
    ends = [find_end(method, study.unit, [row for row in rows if row.method == method]) for method in methods]
    return "\n".join([table, "", *(f"* {end}" for end in ends)])


def _format_cost(row: Row) -> list[str]:
    cost = row.cost
    phases = (cost.plan, cost.start, cost.merge, cost.commit)
    return [
        f"{row.elements:,}",
        f"{cost.parts}",
        *(f"{phase.cpu_s:.2f}" for phase in phases),
        f"{cost.cpu_s:.2f}",
        f"{cost.wall_s:.2f}",
        f"{row.element_ns:,.1f}",
        f"{cost.cpu_s / (row.elements * ITEM_BYTES['BF16'] / GIB):,.2f}",
        f"{cost.peak_bytes / MIB:.0f}",
    ]


def _say_further(row: Row, before: Row | None) -> str:
    if before is None:
        return "–"
    return f"{(row.cost.cpu_s - before.cost.cpu_s) / (row.amount - before.amount) * 1e6:,.3g}"


def find_end(method: str, unit: str, rows: Sequence[Row]) -> str:
    """Say between which amounts the cost for an element is near its least, and what weighs outside."""
    least = min(row.element_ns for row in rows)
    near = [row.amount for row in rows if row.element_ns <= NEAR * least]
    span = f"for {near[0]:,} to {near[-1]:,} {unit}" if len(near) > 1 else f"at {near[0]:,} {unit} alone"
    text = f"{method}: within {NEAR - 1:.0%} of the least, {least:.1f} ns an element, {span}"
    outside = [row for row in (rows[0], rows[-1]) if row.element_ns > NEAR * least]
    best = min(rows, key=lambda row: row.element_ns)
    return "; ".join([text, *(_explain(row, best) for row in outside)])


def _explain(row: Row, best: Row) -> str:
    """Say which phase makes an element dearer than in the best row."""
    extra = {name: _phase_ns(row, name) - _phase_ns(best, name) for name in ("plan", "start", "merge", "commit")}
    worst = max(extra, key=lambda name: extra[name])
    more = row.element_ns - best.element_ns
    return f"at {row.amount:,} {row.element_ns:,.1f} ns, {extra[worst] / more:.0%} of the rise in phase '{worst}'"


def _phase_ns(row: Row, phase: str) -> float:
    spent: float = getattr(row.cost, phase).cpu_s
    return spent / row.elements * 1e9


@dataclass(frozen=True)
class PlanRow:
    """What planning took for a number of tensors."""

    method: str
    tensors: int
    cpu_s: float
    peak_bytes: int  # resident, above what it was before
    parts: int


def study_plans(counts: Iterable[int], methods: Sequence[str], folder: Path, model_bytes: int) -> list[PlanRow]:
    """Plan merges of two sparse models beside a base, each in a process of its own; nothing is merged."""
    rows = []
    spawn = multiprocessing.get_context("spawn")
    for count in counts:
        write_models(folder / f"plan-{count}", make_tensors(count, model_bytes), 2, "sparse")
        for method in methods:
            recipe = write_recipe(folder / f"plan-{count}", method, 2)
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                rows.append(pool.submit(_measure_plan, recipe, method, count).result())
    return rows


def _measure_plan(recipe: Path, method: str, count: int) -> PlanRow:
    plan_recipe(write_small(recipe))  # what is imported at first use does not count
    before_bytes = reset_peak()
    before = take_time()
    plan = plan_recipe(recipe)
    spent = take_time() - before
    return PlanRow(method, count, spent.cpu_s, read_status("VmHWM") - before_bytes, len(plan.parts))


def write_small(recipe: Path) -> Path:
    """Return a recipe as this one, of models with two tensors."""
    small = recipe.parent / "small"
    write_models(small, make_tensors(2, 1 << 12), 2, "sparse")
    return write_recipe(small, recipe.stem.rsplit("-", 1)[0], 2)


def format_plans(rows: Sequence[PlanRow]) -> str:
    """Return a table of what plans took."""
    lines = [
        (
            row.method,
            f"{row.tensors:,}",
            f"{row.cpu_s:.2f}",
            f"{row.cpu_s / row.tensors * 1e6:.0f}",
            f"{row.peak_bytes / MIB:.0f}",
            f"{row.peak_bytes / row.tensors / 1024:.1f}",
        )
        for row in rows
    ]
    return format_table(("method", "tensors of each model", "CPU s", "µs a tensor", "peak MiB", "KiB a tensor"), lines)


def profile_plan(recipe: Path, count: int) -> str:
    """Return a table of the functions that a plan spends most of its own time in."""
    profile = cProfile.Profile()
    profile.runcall(plan_recipe, recipe)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total_s = sum(own for _, _, own, _, _ in stats.values())
    dearest = sorted(stats.items(), key=lambda item: -item[1][2])[:count]
    lines = [
        (f"{Path(file).name}:{line} {name}", f"{calls:,}", f"{own / total_s:.0%}", f"{whole / total_s:.0%}")
        for (file, line, name), (_, calls, own, whole, _) in dearest
    ]
    return format_table(("function", "calls", "own time", "with what it calls"), lines)
