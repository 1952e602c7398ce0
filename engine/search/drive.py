"""The loop of a search: a strategy asks, candidates are judged and noted, the strategy is told.

What was noted already is told again and not judged again. Everything that decides how a search goes on follows from the
trials in the order of their numbers, so one that was killed at any moment ends with the table of one that was not.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mergemill.engine.errors import Cancelled, MergemillError, RunError, SourceChanged
from mergemill.engine.recipe import Recipe, recipe_to_json
from mergemill.engine.recipe.searches import Budget
from mergemill.engine.recipe.templates import Values
from mergemill.engine.runs.options import RunOptions
from mergemill.engine.search.candidate import open_candidate
from mergemill.engine.search.judge import Judge
from mergemill.engine.search.report import write_reports
from mergemill.engine.search.state import digest_of, remove_candidates, write_best
from mergemill.engine.search.strategies.asking import Asking
from mergemill.engine.search.trials import (
    FAILED,
    SCORED,
    Trial,
    append_trial,
    count_stalled,
    find_best,
    list_again,
    open_trials,
    rank,
    read_trials,
)

MOST_FAILED = 3  # in a row, which end a search


@dataclass(frozen=True, slots=True)
class Hunt:
    """A search that is ready to go: what its candidates are, and what is measured of them."""

    make_recipe: Callable[[Values], Recipe]
    judge: Judge
    holdout: Judge | None
    sign: int
    """-1 where more is better, else 1."""
    budget: Budget
    title: str
    """For people: what is searched."""


@dataclass(frozen=True, slots=True)
class TrialFinished:
    """A candidate was judged."""

    trial: Trial
    best: Trial | None
    kept: bool
    """An earlier run judged it."""


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a search."""

    best: Trial | None
    trials: tuple[Trial, ...]
    seconds: float
    """Of this run."""
    stopped: str
    """Why it ended: evaluations, hours, stall, or what the strategy says."""


OnTrial = Callable[[TrialFinished], None]


def ignore(event: TrialFinished) -> None:
    """Do nothing with a trial."""


def drive_search(hunt: Hunt, asking: Asking, folder: Path, options: RunOptions, on_trial: OnTrial) -> Found:
    """Ask, judge and tell until the search is over; raises `RunError` where three candidates in a row fail."""
    started = time.perf_counter()
    remove_candidates(folder)
    with closing(_Log(hunt, folder, options, on_trial)) as log:
        stopped = _follow(hunt, asking, log)
    return Found(find_best(log.trials, hunt.sign), tuple(log.trials), time.perf_counter() - started, stopped)


def _follow(hunt: Hunt, asking: Asking, log: "_Log") -> str:
    """Judge what a strategy asks for until the search is over; returns why."""
    asked, generation, stopped = next(asking), 0, ""
    try:
        while not stopped:
            done = [_take(log, generation, values) for values in _fit(asked, hunt.budget, len(log.trials))]
            write_reports(log.folder, log.trials, hunt.sign, hunt.title)
            stopped = _find_stop(hunt, log.trials)
            generation += 1
            if not stopped:
                asked = asking.send([rank(trial, hunt.sign) for trial in done])
    except StopIteration as end:
        stopped = str(end.value)
    return stopped


def _fit(asked: Sequence[Values], budget: Budget, done: int) -> Sequence[Values]:
    return asked if budget.evaluations is None else asked[: max(0, budget.evaluations - done)]


def _find_stop(hunt: Hunt, trials: Sequence[Trial]) -> str:
    """Return why a search ends after a generation; empty where it goes on."""
    budget = hunt.budget
    if budget.evaluations is not None and len(trials) >= budget.evaluations:
        return "evaluations"
    if budget.hours is not None and sum(trial.seconds for trial in trials) >= 3600 * budget.hours:
        return "hours"
    if budget.stall is not None and count_stalled(trials, hunt.sign) >= budget.stall:
        return "stall"
    return ""


class _Log:
    """The trials of a search, of earlier runs and this one, in the order of their numbers."""

    def __init__(self, hunt: Hunt, folder: Path, options: RunOptions, on_trial: OnTrial) -> None:
        self.hunt, self.folder, self.options, self._on_trial = hunt, folder, options, on_trial
        self._known = read_trials(folder)
        for number in list_again(self._known, MOST_FAILED):
            del self._known[number]
        self._descriptor = open_trials(folder)
        self.trials: list[Trial] = []

    def close(self) -> None:
        """Close the file of trials."""
        os.close(self._descriptor)

    def find(self, number: int) -> Trial | None:
        return self._known.get(number)

    def add(self, trial: Trial, recipe: Recipe, *, kept: bool) -> None:
        """Note a trial, tell of it, and end where too many failed."""
        if not kept:
            append_trial(self._descriptor, trial)
        self.trials.append(trial)
        best = find_best(self.trials, self.hunt.sign)
        if best is not None and best.number == trial.number:
            write_best(self.folder, recipe)
        self._on_trial(TrialFinished(trial, best, kept))
        last = self.trials[-MOST_FAILED:]
        if len(last) == MOST_FAILED and all(each.state == FAILED for each in last):
            raise RunError(
                f"{self.folder}: {MOST_FAILED} candidates in a row failed; the first of them: {last[0].error}"
            )


def _take(log: _Log, generation: int, values: Values) -> Trial:
    """Return the trial of the next candidate, as it was noted, or judged now."""
    number, recipe = len(log.trials), log.hunt.make_recipe(values)
    digest = digest_of(recipe_to_json(recipe))[:32]
    known = log.find(number)
    if known is not None and known.recipe_digest != digest:
        raise RunError(
            f"{log.folder}: candidate {number} was another recipe when this search began, with another version of "
            "mergemill or of a package that it draws with; remove the folder and search again"
        )
    trial = known or _judge(log, Trial(number, generation, values, digest, FAILED, None, None, None, 0.0, 0), recipe)
    log.add(trial, recipe, kept=known is not None)
    return trial


def _judge(log: _Log, blank: Trial, recipe: Recipe) -> Trial:
    started = time.perf_counter()
    score = stderr = holdout = error = None
    parts: tuple[float, ...] = ()
    with open_candidate(blank.number, blank.values, recipe, log.folder, log.options) as candidate:
        try:
            judged = log.hunt.judge(candidate)
            holdout = log.hunt.holdout(candidate).score if log.hunt.holdout else None
            score, stderr, parts = judged.score, judged.stderr, judged.parts
        except (Cancelled, SourceChanged):
            raise
        except MergemillError as failed:
            error = str(failed)
        seconds = round(time.perf_counter() - started, 3)
        return Trial(
            blank.number,
            blank.generation,
            blank.values,
            blank.recipe_digest,
            FAILED if score is None else SCORED,
            score,
            stderr,
            holdout,
            seconds,
            candidate.bytes_read,
            error,
            parts,
        )
