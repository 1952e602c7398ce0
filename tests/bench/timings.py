"""Runs of programs: what each took, and their ratios."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from measure import Usage

Cost = Callable[["Run"], float]


@dataclass(frozen=True)
class Run:
    """One counted run of a program."""

    method: str
    program: str
    round: int  # runs of one round follow each other
    usage: Usage
    sync_s: float  # that syncing the output took afterwards
    output_bytes: int


@dataclass(frozen=True)
class Ratio:
    """A cost of one program by that of another."""

    medians: float  # the median of one by the median of the other
    least: float  # of the ratios within a round
    most: float

    def __str__(self) -> str:
        return f"{self.medians:.2f} ({self.least:.2f}–{self.most:.2f})"


def wall_s(run: Run) -> float:
    """The time from start to end."""
    return run.usage.wall_s


def synced_s(run: Run) -> float:
    """The time from start until the disk has the output."""
    return run.usage.wall_s + run.sync_s


def cpu_s(run: Run) -> float:
    """The CPU seconds of all processes."""
    return run.usage.cpu_s


def cpu_s_per_gib(run: Run) -> float:
    """CPU seconds by the output's size."""
    return run.usage.cpu_s / (run.output_bytes / 2**30)


def peak_bytes(run: Run) -> float:
    """The most memory at once."""
    return run.usage.peak_bytes


def peak_private_bytes(run: Run) -> float:
    """The most memory at once, without pages of files."""
    return run.usage.peak_private_bytes


def choose(runs: Sequence[Run], program: str) -> list[Run]:
    """Return the runs of one program."""
    return [run for run in runs if run.program == program]


def find_median(runs: Sequence[Run], program: str, cost: Cost) -> float:
    """Return the median cost of a program that was run."""
    return statistics.median(map(cost, choose(runs, program)))


def find_ratio(runs: Sequence[Run], program: str, other: str, cost: Cost) -> Ratio | None:
    """Return a program's cost by that of another; None where one was not run."""
    mine = {run.round: cost(run) for run in choose(runs, program)}
    theirs = {run.round: cost(run) for run in choose(runs, other)}
    within = [mine[number] / theirs[number] for number in mine if theirs.get(number)]
    if not within:
        return None
    medians = statistics.median(mine.values()) / statistics.median(theirs.values())
    return Ratio(medians, min(within), max(within))
