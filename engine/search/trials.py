"""Trials: what is known of each candidate, and the file that has a line for each.

The file is only appended to. A line that a kill cut short counts for nothing, and is taken away before the next.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemill.engine.errors import OutputError
from mergemill.engine.recipe.templates import Values

TRIALS_NAME = "trials.jsonl"
SCORED, FAILED = "scored", "failed"


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate that was judged, or that could not be."""

    number: int
    generation: int
    values: Values
    recipe_digest: str
    state: str = FAILED
    """``scored`` or ``failed``."""
    score: float | None = None
    """As the objective says it; of a failed one nothing."""
    stderr: float | None = None
    """The score's standard error, where the objective knows it."""
    holdout: float | None = None
    seconds: float = 0.0
    bytes_read: int = 0
    """From the sources."""
    error: str | None = None
    parts: tuple[float, ...] = ()
    """Of a sum: the score of each of its items."""
    raced: bool = False
    """Whether half of the windows alone were looked at, since it was behind."""
    perplexity: float | None = None
    """Where the score is an entropy: that of the same text."""

    def to_json(self) -> dict[str, Any]:
        """Return the line's mapping; what is empty or was not asked for is left out, but for the score."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in self.values.items()}
        found = {
            "number": self.number,
            "generation": self.generation,
            "values": values,
            "recipe_digest": self.recipe_digest,
            "state": self.state,
            "score": self.score,
            "stderr": self.stderr,
            "holdout": self.holdout,
            "seconds": self.seconds,
            "bytes_read": self.bytes_read,
        }
        beside = {"error": self.error, "parts": self.parts, "raced": self.raced, "perplexity": self.perplexity}
        return found | {name: value for name, value in beside.items() if value}


@dataclass(frozen=True, slots=True)
class JudgedParent:
    """A model that candidates are made of, judged as they are."""

    model: str
    score: float | None
    """None where it could not be judged."""
    stderr: float | None = None
    holdout: float | None = None


def read_trials(folder: Path) -> dict[int, Trial]:
    """Return the trials of a search by number; of a number that was tried again, the last."""
    path = folder / TRIALS_NAME
    if not path.exists():
        return {}
    whole = path.read_bytes().rpartition(b"\n")[0]
    found: dict[int, Trial] = {}
    for place, line in enumerate(whole.split(b"\n") if whole else []):
        try:
            trial = _parse_line(json.loads(line))
        except (ValueError, TypeError, KeyError):
            raise OutputError(
                f"{path}:{place + 1}: is no line of a search; remove the folder and search again"
            ) from None
        found[trial.number] = trial
    return dict(sorted(found.items()))


def _parse_line(line: Mapping[str, Any]) -> Trial:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in line["values"].items()}
    if line["state"] not in (SCORED, FAILED) or (line["state"] == SCORED) != (line["score"] is not None):
        raise ValueError
    return Trial(**{**line, "values": values, "parts": tuple(line.get("parts", ()))})


def open_trials(folder: Path) -> int:
    """Return a descriptor that lines are appended to, after what a kill cut short was taken away."""
    path = folder / TRIALS_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    stored = path.read_bytes()
    os.ftruncate(descriptor, stored.rfind(b"\n") + 1)
    return descriptor


def append_trial(descriptor: int, trial: Trial) -> None:
    """Write a trial's line, and return once it is on the disk."""
    os.write(descriptor, json.dumps(trial.to_json(), ensure_ascii=False, allow_nan=False).encode() + b"\n")
    os.fsync(descriptor)


def list_again(trials: Mapping[int, Trial], most: int) -> set[int]:
    """Return the numbers that are tried again: `most` failures, which ended the search before, are no result."""
    last: list[int] = []
    for number in sorted(trials, reverse=True):
        if trials[number].state == SCORED:
            break
        last.append(number)
    return set(last) if len(last) >= most else set()


def find_best(trials: Sequence[Trial], sign: int) -> Trial | None:
    """Return the trial of the best score, of equal ones the first; None where none has one.

    sign: -1 where more is better, else 1.
    """
    scored = [trial for trial in trials if trial.score is not None]
    return min(scored, key=lambda trial: (rank(trial, sign), trial.number), default=None)


def rank(trial: Trial, sign: int) -> float:
    """Return what is less for a better trial; a failed one ranks last."""
    return math.inf if trial.score is None else sign * trial.score


def count_stalled(trials: Sequence[Trial], sign: int) -> int:
    """Return how many trials came after the last that was better by more than its standard error.

    >>> made = [Trial(i, 0, {}, "", SCORED, s, 0.1, None, 0.0, 0) for i, s in enumerate([3.0, 2.0, 1.95, 2.5])]
    >>> count_stalled(made, 1)
    2
    """
    best, last = math.inf, -1
    for place, trial in enumerate(trials):
        if rank(trial, sign) < best - (trial.stderr or 0.0):
            best, last = rank(trial, sign), place
    return len(trials) - 1 - last
