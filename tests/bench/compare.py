"""Compare mergemill with mergekit and with the plain I/O floor, in turn, on this machine.

    MERGEMILL_MERGEKIT_PYTHON=/path/to/mergekit/venv/bin/python \\
        python tests/bench/compare.py --shape 1.1B --methods linear,ties --runs 5 --mergekit-runs 3

makes the models, runs every program N times in turn, so that a drift of the machine hits all alike, and prints a
Markdown table: the median of each cost with its least and most, and ratios of medians with the least and most of the
ratios within a round. Methods that read the same models share the runs of the floors, six at a time. Peak memory is
resident memory summed over all processes, sampled every 20 ms; the private part leaves out pages of mapped files.
mergekit does not sync what it writes, so each program's output is synced once more after it has ended, and the time is
given with that too. The small merges that come first also warm up the programs.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from checkpoints import LLAMAS, Data, Llama, count_bytes, list_shapes, open_models
from contents import Contents, DifferentWorkError, Likeness, compare_contents, read_contents
from machine import describe_machine
from measure import ProgramError, drop_from_cache, measure, sync_files
from programs import (
    FLOOR,
    FLOORS,
    MERGEKIT,
    MERGEMILL,
    MODELS,
    PROGRAMS,
    RECIPES,
    Job,
    find_missing,
    find_script,
    knows,
    list_models,
    list_weights,
    make_command,
    make_environ,
    make_job,
)
from tables import format_disk, format_likeness, format_runs, format_table
from targets import judge, judge_small
from timings import Run, find_median, wall_s

SMALL, SMALL_METHOD = "1MB", "ties"
SHARING = 6  # methods for one run of a floor, so that it is taken within a minute of each


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    llama: Llama
    data: Data
    methods: tuple[str, ...]
    programs: tuple[str, ...]
    runs: int
    mergekit_runs: int
    cold: bool
    memory: str


def main() -> None:
    """Run the comparison that the command line asks for."""
    asked = parse_arguments()
    options = make_options(asked)
    with open_folder(asked.folder, keep=asked.keep) as folder:
        check_room(folder, options)
        small = list(run_small(folder, options))
        help_s = measure_help(options)
        models = open_models(folder, choose_models(options.methods), options.llama, options.data)
        runs: dict[str, list[Run]] = {}
        likeness: dict[str, Likeness] = {}
        for jobs in group_jobs([make_job(method, models, folder) for method in options.methods]):
            taken, found = run_methods(jobs, options)
            runs, likeness = runs | taken, likeness | found
        runs = {method: runs[method] for method in options.methods}
        machine = describe_machine(folder)
    verdicts = [verdict for method in runs for verdict in judge(method, runs[method], options.cold)]
    small_s = find_median(small, MERGEMILL, wall_s) if MERGEMILL in options.programs else None
    verdicts += judge_small(small_s, statistics.median(help_s) if help_s else None)
    title = f"{asked.shape}, bfloat16, {options.data} data, page cache {'cold' if options.cold else 'warm'}"
    report = [
        f"{title}; --memory {options.memory}",
        format_runs(runs),
        f"Three models of 1 MB, {SMALL_METHOD}:",
        format_runs({SMALL_METHOD: small}),
        format_table(["machine", ""], machine.items()),
        format_disk(runs),
        "\n".join(format_likeness(method, found) for method, found in likeness.items()),
        "\n".join(f"* {verdict}" for verdict in verdicts),
    ]
    sys.stdout.write("\n\n".join(part for part in report if part) + "\n")
    if asked.json:
        found = {
            "options": asdict(options),
            "machine": machine,
            "runs": {method: [asdict(run) for run in taken] for method, taken in runs.items()},
            "small": [asdict(run) for run in small],
            "help_s": help_s,
            "likeness": {method: asdict(each) for method, each in likeness.items()},
            "targets": [asdict(verdict) for verdict in verdicts],
        }
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=LLAMAS, default="1.1B")
    parser.add_argument("--layers", type=int, default=None, help="another number of layers than the shape has")
    parser.add_argument("--data", choices=("random", "sparse"), default="random", help="sparse takes no disk")
    parser.add_argument("--methods", type=split_list, default=("linear",), help=f"all, or of {','.join(RECIPES)}")
    parser.add_argument("--programs", type=split_list, default=PROGRAMS, help=f"of {','.join(PROGRAMS)}")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mergekit-runs", type=int, default=None, help="fewer, of the slow one")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before every run")
    parser.add_argument("--memory", default="512MiB", help="promised to mergemill")
    parser.add_argument("--folder", type=Path, default=None, help="on a disk with room for models and an output")
    parser.add_argument("--keep", action="store_true", help="leave the models in --folder, and use those made before")
    parser.add_argument("--json", type=Path, default=None, help="where every run goes")
    asked = parser.parse_args()
    if asked.methods == ("all",):
        asked.methods = tuple(RECIPES)
    if asked.keep and not asked.folder:
        parser.error("--keep needs --folder: where the models stay")
    if asked.runs < 1 or (asked.mergekit_runs is not None and asked.mergekit_runs < 1):
        parser.error("--runs and --mergekit-runs must be at least 1")
    for what, chosen, known in (("method", asked.methods, RECIPES), ("program", asked.programs, PROGRAMS)):
        if unknown := set(chosen) - set(known):
            parser.error(f"unknown {what} {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return asked


def split_list(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def make_options(asked: argparse.Namespace) -> Options:
    """Return the options, without programs that are not here."""
    for program in asked.programs:
        if reason := find_missing(program):
            tell(f"without {program}: {reason}")
    if asked.cold and asked.data == "sparse":
        tell("--cold with --data sparse: what is a hole is never read from the disk, so reading is as if warm")
    llama = LLAMAS[asked.shape]
    return Options(
        llama=llama if asked.layers is None else replace(llama, layers=asked.layers),
        data=asked.data,
        methods=asked.methods,
        programs=tuple(program for program in asked.programs if not find_missing(program)),
        runs=asked.runs,
        mergekit_runs=asked.runs if asked.mergekit_runs is None else min(asked.runs, asked.mergekit_runs),
        cold=asked.cold,
        memory=asked.memory,
    )


@contextlib.contextmanager
def open_folder(folder: Path | None, *, keep: bool) -> Iterator[Path]:
    """Yield the folder to work in: a new one inside `folder` that is removed afterwards, or itself, to stay."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    if folder is not None and keep:
        yield folder.absolute()
        return
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield Path(name)


def check_room(folder: Path, options: Options) -> None:
    """Refuse to begin what the disk cannot hold."""
    shapes = list_shapes(options.llama)
    size_bytes = count_bytes(shapes)
    made = [] if options.data == "sparse" else list(choose_models(options.methods).values())
    there_bytes = sum(path.stat().st_blocks * 512 for path in list_weights(folder))
    need_bytes = sum(count_bytes(shapes, dtype) for dtype in made) + size_bytes - there_bytes
    free_bytes = shutil.disk_usage(folder).free
    if need_bytes > free_bytes:
        raise SystemExit(
            f"{folder}: {need_bytes / 1e9:.1f} GB are needed, {free_bytes / 1e9:.1f} GB are free; "
            f"take --layers, --data sparse, or another --folder"
        )


def run_small(folder: Path, options: Options) -> Iterator[Run]:
    """Yield runs of a merge of three models of 1 MB, without the floor; they also load the programs once."""
    models = open_models(folder / "small", choose_models([SMALL_METHOD]), LLAMAS[SMALL], "random")
    job = make_job(SMALL_METHOD, models, folder / "small")
    programs = [program for program in options.programs if program not in FLOORS]
    for program in programs:
        run_once(program, job, 0, options)
    for number in range(options.runs):
        for program in programs:
            if program != MERGEKIT or number < options.mergekit_runs:
                yield run_once(program, job, number, options)


def measure_help(options: Options) -> list[float]:
    """Return the seconds of `mergemill --help`."""
    if MERGEMILL not in options.programs:
        return []
    command = [find_script(MERGEMILL), "--help"]
    return [measure(command, make_environ()).wall_s for _ in range(options.runs)]


def group_jobs(jobs: Sequence[Job]) -> list[Sequence[Job]]:
    """Return jobs that read the same files and write as much together, as many as share a run of a floor."""
    alike: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        alike.setdefault((job.sources, job.size_bytes), []).append(job)
    return [found[i : i + SHARING] for found in alike.values() for i in range(0, len(found), SHARING)]


def run_methods(jobs: Sequence[Job], options: Options) -> tuple[dict[str, list[Run]], dict[str, Likeness]]:
    """Run all programs in turn; returns the runs by method, and how far the outputs agree where two programs merged."""
    if not options.cold:
        run_once(FLOOR, jobs[0], 0, options)  # the inputs go into the page cache
    runs: dict[str, list[Run]] = {job.method: [] for job in jobs}
    contents: dict[str, dict[str, Contents]] = {job.method: {} for job in jobs}
    for number in range(options.runs):
        floors = [run_once(each, jobs[0], number, options) for each in options.programs if each in FLOORS]
        for job in jobs:
            runs[job.method] += [replace(run, method=job.method) for run in floors]
            for program in (each for each in options.programs if each not in FLOORS):
                if not knows(program, job.method) or (program == MERGEKIT and number >= options.mergekit_runs):
                    continue
                runs[job.method].append(run_once(program, job, number, options))
                if number == 0:
                    contents[job.method][program] = read_contents(job.out)
    remove(jobs[0].out)
    return runs, {method: compare_outputs(method, found) for method, found in contents.items() if len(found) > 1}


def compare_outputs(method: str, contents: Mapping[str, Contents]) -> Likeness:
    """Return how far mergemill's and mergekit's outputs agree; ends where they hold other tensors."""
    try:
        return compare_contents(contents[MERGEMILL], contents[MERGEKIT])
    except DifferentWorkError as error:
        raise SystemExit(f"{method}: mergemill and mergekit did not do the same work: {error}") from error


def run_once(program: str, job: Job, number: int, options: Options) -> Run:
    """Run a program once, from a clean state."""
    remove(job.out)
    os.sync()
    if options.cold:
        drop_from_cache(job.sources)
    try:
        usage = measure(make_command(program, job, options.memory), make_environ())
    except ProgramError as error:
        raise SystemExit(f"{job.method}: {error}") from error
    written = [job.out] if job.out.is_file() else list_weights(job.out)
    sync_s = sync_files(written)
    tell(f"{job.method} {program} {number + 1}: {usage.wall_s:.2f} s + {sync_s:.2f} s, CPU {usage.cpu_s:.2f} s")
    return Run(job.method, program, number, usage, sync_s, sum(path.stat().st_size for path in written))


def choose_models(methods: Sequence[str]) -> dict[str, str]:
    """Return the dtypes of the models that any of the methods reads, by name."""
    return {name: MODELS[name] for name in list_models(methods)}


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def tell(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
