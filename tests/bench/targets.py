"""What a merge may cost at most, beside the floor and beside mergekit, and whether it did."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from programs import FLOOR, MERGEKIT, MERGEMILL
from timings import Cost, Run, cpu_s, cpu_s_per_gib, find_ratio, peak_bytes, synced_s, wall_s

ELEMENTWISE = ("linear", "slerp", "task_arithmetic")
SMALL_S, HELP_S = 3.0, 0.3


@dataclass(frozen=True)
class Target:
    """The most that one cost may be of another program's."""

    what: str
    other: str
    cost: Cost
    most: float | Fraction


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured."""

    asked: str
    measured: str
    met: bool | None  # None: not measured

    def __str__(self) -> str:
        word = {True: "met", False: "missed", None: "not measured"}[self.met]
        return f"{self.asked}: {self.measured}{' – ' if self.measured else ''}{word}"


def list_targets(method: str, cold: bool) -> list[Target]:
    """Return what is asked of a method."""
    elementwise = method in ELEMENTWISE
    return [
        Target("wall", FLOOR, wall_s, 1.4 if elementwise else 2.5),
        Target("wall", MERGEKIT, wall_s, Fraction(1, 3 if elementwise else 12)),
        Target("wall with a sync after", MERGEKIT, synced_s, Fraction(1, 3 if elementwise else 12)),
        Target("CPU seconds", MERGEKIT, cpu_s, Fraction(1, 5 if elementwise else 15)),
        Target("peak memory", MERGEKIT, peak_bytes, Fraction(1, 5)),
        *([Target("CPU seconds per GiB", MERGEKIT, cpu_s_per_gib, Fraction(1, 5))] if cold else []),
    ]


def judge(method: str, runs: Sequence[Run], cold: bool) -> Iterator[Verdict]:
    """Yield a verdict for each target of a method."""
    for target in list_targets(method, cold):
        asked = f"{method}: {target.what} at most {_say(target.most)} {target.other}'s"
        ratio = find_ratio(runs, MERGEMILL, target.other, target.cost)
        if ratio is None:
            yield Verdict(asked, "", None)
            continue
        inverse = f", 1/{1 / ratio.medians:.1f}" if isinstance(target.most, Fraction) else ""
        yield Verdict(asked, f"{ratio}{inverse}", ratio.medians <= target.most)


def judge_small(merge_s: float | None, help_s: float | None) -> list[Verdict]:
    """Return the verdicts for what a person waits for."""
    return [
        _judge_seconds("a merge of three 1 MB models under 3 s", merge_s, SMALL_S),
        _judge_seconds("mergemill --help under 0.3 s", help_s, HELP_S),
    ]


def _judge_seconds(asked: str, found_s: float | None, most_s: float) -> Verdict:
    return Verdict(asked, "" if found_s is None else f"{found_s:.2f} s", None if found_s is None else found_s < most_s)


def _say(most: float | Fraction) -> str:
    return f"{most} of" if isinstance(most, Fraction) else f"{most:g} times the"
