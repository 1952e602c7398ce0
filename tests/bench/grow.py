"""How the cost of a merge grows: with models, tensors, their size, and workers; and what planning takes.

    python tests/bench/grow.py
    python tests/bench/grow.py --studies tensors,plan --tensors 1,100,10000,100000 --plan-tensors 1000,10000,100000
    python tests/bench/grow.py --studies workers --shapes 8B,70B --latency-ms 30 --worker-rate 500MB --store-rate 20GB

Merges run in this process on one thread (but for workers), and their CPU seconds are given by phase: planning, opening
the output, merging, committing. Every table is followed by where growth stops being linear, and which phase or bound is
why. Workers: real processes as far as there are cores; above, a simulation of the real task graph whose tasks take what
a real worker took for them, on a store of the latency and bandwidth that the flags say (`simulate.py` has the model).
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from checkpoints import LLAMAS, list_shapes, write_model
from costs import CONFIG, Cost, measure_merge, plan_recipe, write_models, write_recipe
from simulate import Outcome, Place, find_end, simulate
from studies import (
    format_plans,
    format_study,
    list_studies,
    make_tensors,
    profile_plan,
    run_study,
    study_plans,
    warm_up,
)
from tables import MIB, format_table
from workers import Overhead, Rates, describe_place, list_tasks, measure_overhead, measure_rates

from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.graph import make_tasks
from mergemill.engine.runs.outputs.target import FileTarget

STUDIES = ("models", "tensors", "sizes", "plan", "workers")
LOCAL = Place(scheduler_s=0.0, message_s=0.0, latency_s=0.0, worker_rate=float("inf"), store_rate=float("inf"))


def main() -> None:
    """Run the studies that the command line asks for."""
    options = parse_options()
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        warm_up(options.methods, folder, options.memory)
        for study in options.studies:
            text, found[study] = run_one(study, folder, options)
            sys.stdout.write(f"## {study}\n\n{text}\n\n")
            sys.stdout.flush()
            shutil.rmtree(folder)
            folder.mkdir()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=split_list, default=STUDIES, help=f"of {','.join(STUDIES)}")
    parser.add_argument("--methods", type=split_list, default=("linear", "ties"), help="of linear,ties,dare_ties")
    parser.add_argument("--bytes", type=parse_bytes, default="32MiB", help="of one model")
    parser.add_argument("--models", type=split_numbers, default="2,4,8,16", help="beside the base")
    parser.add_argument("--tensors", type=split_numbers, default="1,10,100,1000", help="of a model, same bytes")
    parser.add_argument("--sizes", type=split_sizes, default="1kB,32kB,1MB,32MB,256MB", help="of the only tensor")
    parser.add_argument("--plan-tensors", type=split_numbers, default="1000,10000")
    parser.add_argument("--workers", type=split_numbers, default="1,2,4,8,16,32,64", help="that are simulated")
    parser.add_argument("--shapes", type=split_list, default=("8B",), help=f"that are simulated, of {','.join(LLAMAS)}")
    parser.add_argument("--latency-ms", type=float, default=30.0, help="of a request to the store")
    parser.add_argument("--message-ms", type=float, default=0.5, help="between scheduler and worker")
    parser.add_argument("--worker-rate", type=parse_bytes, default="500MB", help="a second, of one worker")
    parser.add_argument("--store-rate", type=parse_bytes, default="20GB", help="a second, of the store for all workers")
    parser.add_argument("--memory", default="512MiB", help="promised to each worker")
    parser.add_argument("--folder", type=Path, default=None, help="on a disk with room for the largest study")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if unknown := set(options.studies) - set(STUDIES):
        parser.error(f"unknown study {', '.join(sorted(unknown))}; known: {', '.join(STUDIES)}")
    return options


def split_list(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def split_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def split_sizes(text: str) -> tuple[int, ...]:
    return tuple(parse_bytes(part) for part in text.split(","))


def parse_bytes(text: str) -> int:
    return parse_size(text, what="a size")


def run_one(study: str, folder: Path, options: argparse.Namespace) -> tuple[str, object]:
    """Return a study's tables, and its figures for JSON."""
    if study == "workers":
        return run_workers(folder, options)
    if study == "plan":
        return run_plans(folder, options)
    chosen = list_studies(options.bytes)[study]
    rows = run_study(chosen, getattr(options, study), options.methods, folder, options.memory)
    return format_study(chosen, rows), [asdict(row) for row in rows]


def run_plans(folder: Path, options: argparse.Namespace) -> tuple[str, object]:
    """Plan for growing numbers of tensors, and profile a plan."""
    rows = study_plans(options.plan_tensors, options.methods, folder, options.bytes)
    recipe = write_recipe(folder / f"plan-{min(options.plan_tensors)}", options.methods[-1], 2)
    profile = profile_plan(recipe, 12)
    title = f"Profile of the plan for {min(options.plan_tensors):,} tensors, {options.methods[-1]}:"
    return f"{format_plans(rows)}\n\n{title}\n\n{profile}", [asdict(row) for row in rows]


def run_workers(folder: Path, options: argparse.Namespace) -> tuple[str, object]:
    """Measure real workers, then simulate many."""
    memory_bytes = parse_bytes(options.memory)
    overhead = measure_overhead(memory_bytes)
    texts = [say_overhead(overhead)]
    found: dict[str, object] = {"overhead": asdict(overhead)}
    # Half in one tensor that is cut over parts, half in small ones: so each kind of task is timed.
    small = make_tensors(32, 4 * options.bytes)
    shapes = {"model.embed_tokens.weight": make_first_shape(8 * options.bytes)} | small
    write_models(folder / "timed", shapes, 2, "random")
    for method in options.methods:
        recipe = write_recipe(folder / "timed", method, 2)
        rates = measure_rates(plan_recipe(recipe), folder / "timed-out", memory_bytes)
        shutil.rmtree(folder / "timed-out")
        costs = measure_workers(recipe, folder / "out", options.memory)
        texts.append(format_workers(method, costs, simulate_here(plan_recipe(recipe), rates, overhead)))
        found[method] = {"rates": asdict(rates), "measured": {count: asdict(cost) for count, cost in costs.items()}}
        for shape in options.shapes:
            plan = plan_shape(folder / shape, shape, method)
            outcomes, text = simulate_shape(shape, method, plan, rates, overhead, options)
            texts.append(text)
            found[f"{method} {shape}"] = [asdict(outcome) for outcome in outcomes]
    return "\n\n".join(texts), found


def make_first_shape(size_bytes: int) -> tuple[int, ...]:
    (shape,) = make_tensors(1, size_bytes).values()
    return shape


def say_overhead(found: Overhead) -> str:
    return (
        f"A task that does nothing takes {found.scheduler_s * 1e3:.2f} ms of CPU time of the scheduler and the client, "
        f"{found.worker_s * 1e3:.2f} ms of the worker, and {found.wall_s * 1e3:.2f} ms until the next."
    )


def measure_workers(recipe: Path, out: Path, memory: str) -> dict[int, Cost]:
    """Merge with one to as many processes as there are cores, at most four."""
    most = min(4, len(os.sched_getaffinity(0)))
    return {
        count: measure_merge(recipe, out, workers=count, threads=1, memory=memory)
        for count in (1, 2, 4)
        if count <= most
    }


def simulate_here(plan: Plan, rates: Rates, overhead: Overhead) -> list[Outcome]:
    """Simulate the processes that were measured: the page cache answers at once."""
    tasks = list_tasks(plan, make_tasks(plan, plan.parts, make_targets(plan)), rates)
    place = Place(overhead.scheduler_s, overhead.worker_s / 2, LOCAL.latency_s, LOCAL.worker_rate, LOCAL.store_rate)
    return [simulate(tasks, count, place) for count in (1, 2, 4)]


def make_targets(plan: Plan) -> list[FileTarget]:
    return [FileTarget(Path(plan.shards[part.shard].name)) for part in plan.parts]


def format_workers(method: str, costs: dict[int, Cost], outcomes: Sequence[Outcome]) -> str:
    """Return a table of real processes beside the simulation of the same."""
    simulated = {outcome.workers: outcome for outcome in outcomes}
    lines = [
        (
            method,
            f"{count}",
            f"{cost.merge.wall_s:.2f}",
            f"{simulated[count].seconds:.2f}",
            f"{cost.wall_s:.2f}",
            f"{cost.cpu_s:.2f}",
            f"{costs[1].merge.wall_s / cost.merge.wall_s:.2f}",
        )
        for count, cost in costs.items()
    ]
    columns = ("method", "processes", "merging s", "simulated s", "all s", "CPU s", "gain in merging")
    return format_table(columns, lines)


def plan_shape(folder: Path, shape: str, method: str) -> Plan:
    """Plan a merge of two sparse models of a shape, beside the base."""
    for number in range(3):
        write_model(folder / str(number), list_shapes(LLAMAS[shape]), number=number, data="sparse", config=CONFIG)
    return plan_recipe(write_recipe(folder, method, 2))


def simulate_shape(
    shape: str, method: str, plan: Plan, rates: Rates, overhead: Overhead, options: argparse.Namespace
) -> tuple[list[Outcome], str]:
    """Simulate one plan on growing numbers of workers; returns the outcomes and their table."""
    tasks = list_tasks(plan, make_tasks(plan, plan.parts, make_targets(plan)), rates)
    place = Place(
        overhead.scheduler_s,
        options.message_ms / 1e3 + overhead.worker_s / 2,
        options.latency_ms / 1e3,
        options.worker_rate,
        options.store_rate,
    )
    outcomes = [simulate(tasks, count, place) for count in options.workers]
    first = outcomes[0]
    lines = [
        (
            f"{outcome.workers}",
            f"{outcome.seconds:,.1f}",
            f"{first.seconds / outcome.seconds:.1f}",
            f"{first.seconds * first.workers / outcome.seconds / outcome.workers:.0%}",
            f"{len(tasks) / outcome.workers:,.1f}",
            *(f"{bound:,.1f}" for bound in outcome.bounds.values()),
        )
        for outcome in outcomes
    ]
    bounds = [f"at least, by {reason}" for reason in first.bounds]
    table = format_table(("workers", "s", "gain", "efficiency", "tasks a worker", *bounds), lines)
    size = f"{len(plan.parts)} parts of {plan.parts[0].size_bytes / MIB:.0f} MiB, {len(tasks)} tasks"
    title = f"Simulated: {method}, {shape}, {size}; {describe_place(place)}."
    return outcomes, f"{title}\n\n{table}\n\n* {find_end(outcomes)}"


if __name__ == "__main__":
    main()
