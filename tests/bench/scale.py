"""Merges of large shapes by real worker processes: 70B on eight of them, their efficiency, a mixture of experts.

    python tests/bench/scale.py
    python tests/bench/scale.py --studies efficiency --latency-ms 30 --worker-rate 100MB

The models are sparse files, real headers before holes; the output is counted and dropped (`drop.py`). So any disk will
do, and all that a merge does is done but the writing. `whole`: a merge of the full shape; how long workers were in no
task, and the CPU time of the driver (scheduler, client and nannies are threads of it) beside the workers'.
`efficiency`: one worker against many where each read takes a latency, at first with nothing else that limits, where
they soon share the cores; then with a bandwidth for each worker, as on a network. `mixture`: 671B parameters are
planned, and the graph is run by workers whose tasks give a receipt at once, so that nothing but scheduling is left.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import dask
import drop
from checkpoints import LLAMAS, Shapes, list_shapes, make_config, write_model
from costs import take_time
from machine import describe_machine
from mixtures import FINE, V3, Mixture, list_experts, make_mixture_config
from tables import MIB, format_table
from watch import Found, measure_workers

from mergemill.engine import make_plan
from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import parse_recipe

STUDIES = ("whole", "efficiency", "mixture")
MIXTURES = {"256 experts a layer": V3, "512 experts a layer": FINE}
COLUMNS = (
    "workers",
    "tasks",
    "merging s",
    "all s",
    "GB/s of output",
    "CPU s: workers, driver",
    "cores used",
    "driver's share of CPU",
    "workers in no task",
    "peak of a worker beside its start MiB",
    "driver MiB",
)


def main() -> None:
    """Run the studies that the command line asks for."""
    options = parse_options()
    runs = dict(zip(STUDIES, (run_whole, run_efficiency, run_mixture), strict=True))
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name, drop.settings() as settings:
        place = describe_machine(Path(name))
        sys.stdout.write("\n".join(f"* {what}: {value}" for what, value in place.items()) + "\n\n")
        with dask.config.set(settings):
            for study in options.studies:
                text, found[study] = runs[study](Path(name) / study, options)
                sys.stdout.write(f"## {study}\n\n{text}\n\n")
                sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=lambda text: text.split(","), default=STUDIES, help=f"of {','.join(STUDIES)}")
    parser.add_argument("--shape", choices=LLAMAS, default="70B")
    parser.add_argument("--layers", type=int, default=None, help="of the shape in the study `whole`; else all")
    parser.add_argument("--far-layers", type=int, default=1, help="of the shape in the study `efficiency`")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--memory", default="1GiB", help="promised to each worker")
    parser.add_argument("--latency-ms", type=float, default=30.0, help="of a read")
    parser.add_argument("--worker-rate", type=parse_bytes, default="100MB", help="a second, of one worker")
    parser.add_argument("--folder", type=Path, default=None, help="for sparse files")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if unknown := set(options.studies) - set(STUDIES):
        parser.error(f"unknown study {', '.join(sorted(unknown))}; known: {', '.join(STUDIES)}")
    return options


def parse_bytes(text: str) -> int:
    return parse_size(text, what="a size")


def run_whole(folder: Path, options: argparse.Namespace) -> tuple[str, object]:
    """Merge the whole shape, linear, from two models."""
    write_shape(folder, options.shape, options.layers)
    plan, took_s = plan_linear(str(folder))
    found = merge(plan, folder, options.workers, options.memory)
    size = f"{options.shape}: {count_tensors(plan)} tensors, {plan.write_bytes / 1e9:.1f} GB, {len(plan.shards)} shards"
    title = f"{size}; planned in {took_s:.1f} CPU s; {options.workers} processes at {options.memory}."
    return f"{title}\n\n{format_found([found])}", asdict(found)


def run_efficiency(folder: Path, options: argparse.Namespace) -> tuple[str, object]:
    """Merge some layers with one and with many workers."""
    write_shape(folder, options.shape, options.far_layers)
    texts, results = [], []
    for rate in (float("inf"), float(options.worker_rate)):
        found = []
        for workers in (1, options.workers):
            counts = folder / f"counts-{workers}"
            far: dict[str, object] = {"latency_ms": round(options.latency_ms), "counts": str(counts)}
            far |= {} if rate == float("inf") else {"rate": int(rate)}
            plan, _ = plan_linear(f"far://{folder}", {"far": far})
            shutil.rmtree(counts)  # what planning read
            found.append(merge(plan, folder, workers, options.memory, counts))
        gain = found[0].merging_s / found[1].merging_s
        speed = "no limit of bandwidth" if rate == float("inf") else f"{rate / 1e6:.0f} MB/s a worker"
        title = f"{plan.write_bytes / 1e9:.1f} GB, {options.latency_ms:.0f} ms a read, {speed}"
        verdict = f"{gain:.2f} times as fast: efficiency {gain / options.workers:.2f}"
        texts.append(f"{title}:\n\n{format_found(found)}\n\n* {options.workers} workers are {verdict}")
        results.append([asdict(each) for each in found])
    return "\n\n".join(texts), results


def run_mixture(folder: Path, options: argparse.Namespace) -> tuple[str, object]:
    """Plan two sizes of experts, and have workers give receipts for all parts."""
    texts, results = [], []
    for name, mixture in MIXTURES.items():
        write_mixture(folder, mixture)
        plan, took_s = plan_linear(str(folder))
        found = merge(plan, folder, options.workers, options.memory, scheme="drop-all")
        size = f"{count_tensors(plan):,} tensors, {plan.write_bytes / 1e12:.2f} TB, {len(plan.parts):,} parts"
        texts.append(f"{name}: {size}; planned in {took_s:.1f} CPU s.\n\n{format_found([found])}")
        results.append(asdict(found) | {"plan_cpu_s": took_s})
        shutil.rmtree(folder)
    return "\n\n".join(texts), results


def write_shape(folder: Path, shape: str, layers: int | None) -> None:
    """Write two sparse models of a shape, of some of its layers or all."""
    llama = LLAMAS[shape]
    if layers is not None:
        llama = type(llama)(**asdict(llama) | {"layers": layers})
    write_two(folder, list_shapes(llama), make_config(llama))


def write_mixture(folder: Path, mixture: Mixture) -> None:
    """Write two sparse mixtures of experts."""
    write_two(folder, list_experts(mixture), make_mixture_config(mixture))


def write_two(folder: Path, shapes: Shapes, config: Mapping[str, object]) -> None:
    for number in (1, 2):
        write_model(folder / str(number), shapes, number=number, data="sparse", config=config)


def plan_linear(place: str, storage: Mapping[str, object] | None = None) -> tuple[Plan, float]:
    """Return a plan of the models that lie at a place, and the CPU seconds that it took."""
    models = [{"model": f"{place}/{number}", "parameters": {"weight": 0.5}} for number in (1, 2)]
    recipe = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
    before = take_time()
    plan = make_plan(parse_recipe(json.dumps(recipe | ({"storage_options": storage} if storage else {}))))
    return plan, (take_time() - before).cpu_s


def merge(
    plan: Plan, folder: Path, workers: int, memory: str, counts: Path | None = None, scheme: str = "drop"
) -> Found:
    """Run a plan, see that every byte of it was given to the sink, and return what it took."""
    out, clocks = folder / "out", folder / "clocks"
    os.environ[drop.CLOCKS] = str(clocks)  # for the workers
    found = measure_workers(plan, f"{scheme}://{out}", workers=workers, threads=1, memory=memory)
    dropped_bytes = sum(each["bytes"] for each in drop.read_counts(out / "counts", "drop"))
    wanted_bytes = sum(part.size_bytes for part in plan.parts)
    if dropped_bytes != wanted_bytes:
        raise SystemExit(f"{dropped_bytes} bytes came to the sink, not {wanted_bytes}")
    found.task_s = sum(each["busy_us"] for each in drop.read_counts(clocks, "task")) / 1e6
    for each in (out, clocks):
        shutil.rmtree(each)
    if counts:
        reads = drop.read_counts(counts, "read")
        found.busy_reads = sum(each["busy_us"] for each in reads) / 1e6 / found.merging_s / workers
        found.most_reads = max(each["most_in_flight"] for each in reads)
    return found


def count_tensors(plan: Plan) -> int:
    return len({piece.tensor.name for part in plan.parts for piece in part.pieces})


def format_found(found: list[Found]) -> str:
    """Return a row for each merge."""
    far = any(each.most_reads for each in found)
    columns = (*COLUMNS, "reads in flight a worker: mean, most") if far else COLUMNS
    return format_table(columns, [_make_row(each, far) for each in found])


def _make_row(found: Found, far: bool) -> list[str]:
    row = [
        f"{found.workers}",
        f"{found.tasks:,}",
        f"{found.merging_s:.1f}",
        f"{found.all_s:.1f}",
        f"{found.write_bytes / 1e9 / found.merging_s:.2f}",
        f"{found.workers_cpu_s:.1f}, {found.driver_cpu_s:.1f}",
        f"{(found.workers_cpu_s + found.driver_cpu_s) / found.merging_s:.2f} of {len(os.sched_getaffinity(0))}",
        f"{found.driver_share:.1%}",
        f"{found.idle_share:.1%}",
        f"{found.peak_bytes / MIB:.0f}",
        f"{found.driver_peak_bytes / MIB:.0f}",
    ]
    return [*row, f"{found.busy_reads:.1f}, {found.most_reads}"] if far else row


if __name__ == "__main__":
    main()
