"""The tables of a comparison, as Markdown."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence

from contents import Likeness
from programs import BESIDE, FLOOR, MERGEKIT, RANDOM, URING
from timings import Cost, Run, choose, cpu_s, find_median, find_ratio, peak_bytes, peak_private_bytes, synced_s, wall_s

COLUMNS = (
    "method",
    "program (runs)",
    "wall s",
    "with a sync after",
    "CPU s",
    "CPU s per GiB",
    "peak MiB (private)",
    "read, from disk, written GiB",
    "wall / floor",
    "wall / beside",
    "wall / uring",
    "wall / mergekit",
    "CPU / mergekit",
)
GIB, MIB = 1 << 30, 1 << 20


def format_runs(runs: Mapping[str, Sequence[Run]]) -> str:
    """Return a row for each method and program."""
    rows = [
        _make_row(method, program, taken)
        for method, taken in runs.items()
        for program in dict.fromkeys(run.program for run in taken)
    ]
    return format_table(COLUMNS, rows)


def _make_row(method: str, program: str, runs: Sequence[Run]) -> list[str]:
    own = choose(runs, program)
    private = find_median(runs, program, peak_private_bytes) / MIB
    cpu_per_gib = find_median(runs, program, cpu_s) / (own[0].output_bytes / GIB)
    io = [(run.usage.read_bytes, run.usage.disk_read_bytes, run.usage.written_bytes) for run in own]
    return [
        method,
        f"{program} ({len(own)})",
        format_spread(runs, program, wall_s),
        format_spread(runs, program, synced_s),
        format_spread(runs, program, cpu_s),
        f"{cpu_per_gib:.2f}",
        f"{find_median(runs, program, peak_bytes) / MIB:.0f} ({private:.0f})",
        ", ".join(f"{statistics.median(column) / GIB:.2f}" for column in zip(*io, strict=True)),
        *(format_ratio(runs, program, floor, wall_s) for floor in (FLOOR, BESIDE, URING)),
        format_ratio(runs, program, MERGEKIT, wall_s),
        format_ratio(runs, program, MERGEKIT, cpu_s),
    ]


def format_spread(runs: Sequence[Run], program: str, cost: Cost) -> str:
    """Return the median, the least and the most of a cost."""
    found = sorted(map(cost, choose(runs, program)))
    return f"{statistics.median(found):.2f} ({found[0]:.2f}–{found[-1]:.2f})"


def format_ratio(runs: Sequence[Run], program: str, other: str, cost: Cost) -> str:
    """Return the ratio to another program, or a dash for itself or where it was not run."""
    ratio = None if program == other else find_ratio(runs, program, other, cost)
    return "–" if ratio is None else str(ratio)


def format_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_disk(runs: Mapping[str, Sequence[Run]]) -> str:
    """Say how fast the floor read and wrote, over all methods."""
    found = [json.loads(run.usage.output) for taken in runs.values() for run in choose(taken, FLOOR)]
    if not found:
        return ""
    read, written = (
        statistics.median(one[f"{key}_bytes"] / one[seconds] / GIB for one in found)
        for key, seconds in (("read", "read_s"), ("written", "write_s"))
    )
    return f"The floor reads {read:.1f} GiB/s and writes, synced, {written:.1f} GiB/s."


def format_likeness(method: str, found: Likeness) -> str:
    """Say how far mergemill's and mergekit's outputs agree."""
    same = f"{method}: both wrote the same {found.tensors} tensors"
    if method in RANDOM:
        return f"{same} (values are drawn, and not compared)."
    return (
        f"{same}; in the first rows of {found.looked_into} of them {found.equal_share:.2%} of the elements are equal, "
        f"and none differs by more than {found.most_difference:.2g}."
    )
