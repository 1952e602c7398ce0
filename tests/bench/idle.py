"""Where a merge leaves cores idle: python tests/bench/idle.py.

Runs one merge of the shape of 1.1B parameters and looks, every 20 ms, at how long each of its threads has run so far,
by the kernel's own clock (``schedstat``). Prints a trace, a row a thread and a column a moment, and for each phase how
many cores its threads used, and how many they wanted: the rest of the time they slept, waiting for the disk, for one
another, or for nothing. Linux only.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from checkpoints import LLAMAS, open_models
from measure import list_family
from programs import MERGEMILL, MODELS, list_models, make_command, make_environ, make_job
from tables import format_table

LOOK_S = 0.02
COLUMNS = 100  # of the trace
SHADES = " ▁▂▃▄▅▆▇█"
LEAST_SHARE = 0.01  # of the running time of all threads: others have no row
PHASES = ("start and plan", "merge", "commit")


@dataclass(frozen=True)
class Look:
    """What the kernel says of the threads at one moment."""

    at_s: float  # since the start
    ran_ns: Mapping[int, int]  # by thread, since its start
    waited_ns: Mapping[int, int]  # for a core
    phase: int


def main() -> None:
    """Trace the merges that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="linear,ties")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    methods = asked.methods.split(",")
    with tempfile.TemporaryDirectory() as made:
        folder = asked.folder or Path(made)
        dtypes = {name: MODELS[name] for name in list_models(methods)}
        models = open_models(folder, dtypes, replace(LLAMAS["1.1B"], layers=asked.layers), "random")
        for method in methods:
            job = make_job(method, models, folder)
            looks = trace(make_command(MERGEMILL, job, asked.memory), job.out)
            sys.stdout.write(f"\n## {method}\n\n{draw(looks)}\n\n{sum_up(looks)}\n")


def trace(command: Sequence[str], out: Path) -> list[Look]:
    """Run a command, and return what was seen of its threads."""
    shutil.rmtree(out, ignore_errors=True)
    record, journal = out / ".mergemill" / "plan.json", out / ".mergemill" / "journal.jsonl"
    looks, sizes = [], []
    started = time.perf_counter()
    process = subprocess.Popen(command, env=make_environ(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        ran_ns, waited_ns = read_threads(process.pid)
        looks.append(Look(time.perf_counter() - started, ran_ns, waited_ns, int(record.exists())))
        sizes.append(journal.stat().st_size if journal.exists() else 0)
        time.sleep(LOOK_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    last = max(sizes)  # from which on no part was finished
    return [
        Look(look.at_s, look.ran_ns, look.waited_ns, 2 if look.phase and size == last else look.phase)
        for look, size in zip(looks, sizes, strict=True)
    ]


def read_threads(pid: int) -> tuple[dict[int, int], dict[int, int]]:
    """Return how long each thread of a process and its descendants has run, and has waited for a core."""
    ran_ns, waited_ns = {}, {}
    for each in list_family(pid):
        for thread in Path(f"/proc/{each}/task").glob("*"):
            try:
                ran, waited, _ = (thread / "schedstat").read_text().split()
            except (OSError, ValueError):  # it has ended
                continue
            ran_ns[int(thread.name)], waited_ns[int(thread.name)] = int(ran), int(waited)
    return ran_ns, waited_ns


def draw(looks: Sequence[Look]) -> str:
    """Return the trace: how much of each moment a thread ran; below, the phases."""
    width_s = looks[-1].at_s / COLUMNS
    busy_s: dict[int, list[float]] = defaultdict(lambda: [0.0] * COLUMNS)
    phases = [0] * COLUMNS
    before: dict[int, int] = {}
    for look in looks:
        column = min(COLUMNS - 1, int(look.at_s / width_s))
        phases[column] = look.phase
        for thread, ran in look.ran_ns.items():
            busy_s[thread][column] += (ran - before.get(thread, 0)) / 1e9
        before |= look.ran_ns
    all_s = sum(sum(row) for row in busy_s.values())
    rows = [
        "".join(SHADES[min(8, round(8 * each / width_s))] for each in row)
        for row in busy_s.values()
        if sum(row) > LEAST_SHARE * all_s
    ]
    return "\n".join([*rows, "".join("pmc"[phase] for phase in phases), f"one column: {1000 * width_s:.0f} ms"])


def sum_up(looks: Sequence[Look]) -> str:
    """Return a table of the phases."""
    wall_s, ran_s, waited_s = ([0.0] * len(PHASES) for _ in range(3))
    for earlier, look in pairwise(looks):
        wall_s[look.phase] += look.at_s - earlier.at_s
        ran_s[look.phase] += _grown(earlier.ran_ns, look.ran_ns)
        waited_s[look.phase] += _grown(earlier.waited_ns, look.waited_ns)
    found = zip(PHASES, wall_s, ran_s, waited_s, strict=True)
    return format_table(
        ["phase", "wall s", "cores used", "cores wanted"],
        [
            [name, f"{wall:.2f}", f"{ran / wall:.2f}", f"{(ran + waited) / wall:.2f}"]
            for name, wall, ran, waited in found
            if wall
        ],
    )


def _grown(earlier: Mapping[int, int], later: Mapping[int, int]) -> float:
    """Return by how much the clocks of all threads have gone on, in seconds; those that have ended are left out."""
    return sum(value - earlier.get(thread, 0) for thread, value in later.items()) / 1e9


if __name__ == "__main__":
    main()
