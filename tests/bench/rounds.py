"""Commands that are run in turn, round after round, each with nothing there of its output; and their medians."""

import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import Usage, measure
from programs import make_environ

Round = Mapping[str, Usage]


@dataclass(frozen=True)
class Medians:
    """Of one command over all rounds; ratios are those within a round, to another command."""

    cpu_s: float
    wall_s: float
    cpu_ratio: float
    wall_ratio: float
    peak_mib: int  # the most
    written_mib: int  # the most


def measure_anew(command: Sequence[str], outs: Iterable[Path]) -> Usage:
    """Return what a command takes whose outputs, folders or files, are removed first."""
    for out in outs:
        if out.is_dir():
            shutil.rmtree(out)
        out.unlink(missing_ok=True)
    return measure(command, make_environ())


def find_medians(rounds: Sequence[Round], name: str, other: str) -> Medians:
    """Return the medians of a command, and of its ratios to another one."""
    found, beside = [each[name] for each in rounds], [each[other] for each in rounds]
    pairs = list(zip(found, beside, strict=True))
    return Medians(
        cpu_s=statistics.median(each.cpu_s for each in found),
        wall_s=statistics.median(each.wall_s for each in found),
        cpu_ratio=statistics.median(each.cpu_s / to.cpu_s for each, to in pairs),
        wall_ratio=statistics.median(each.wall_s / to.wall_s for each, to in pairs),
        peak_mib=max(each.peak_bytes for each in found) >> 20,
        written_mib=max(each.written_bytes for each in found) >> 20,
    )
