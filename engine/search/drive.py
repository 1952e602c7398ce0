"""The loop of a search: a strategy asks, candidates are judged and noted, the strategy is told.

What was noted already is told again and not judged again. Everything that decides how a search goes on follows from the
trials in the order of their numbers, so one that was killed at any moment ends with the table of one that was not.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergemill.engine.errors import Cancelled, MergemillError, RunError, SourceChanged
from mergemill.engine.evaluation.evaluating import TextSource
from mergemill.engine.evaluation.judging import Judges
from mergemill.engine.recipe import Recipe, recipe_to_json
from mergemill.engine.recipe.searches import Budget
from mergemill.engine.recipe.templates import Values
from mergemill.engine.runs.options import RunOptions
from mergemill.engine.search.candidate import OpenCandidate, evaluate_together, open_candidate
from mergemill.engine.search.front import SumItem, find_front, rank_items
from mergemill.engine.search.judge import Judge
from mergemill.engine.search.plots import PLOT_NAME, make_plot
from mergemill.engine.search.report import write_reports
from mergemill.engine.search.state import digest_of, remove_candidates, write_best, write_file
from mergemill.engine.search.strategies.asking import Asking
from mergemill.engine.search.trials import (
    FAILED,
    SCORED,
    JudgedParent,
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
    sources: Sequence[TextSource]
    """The texts that candidates are judged on, by all of a generation together."""
    raced: TextSource | None
    """That of them on which candidates that are behind are judged no further."""
    sign: int
    """-1 where more is better, else 1."""
    budget: Budget
    title: str
    """For people: what is searched."""
    items: Sequence[SumItem] = ()
    """Of an objective that is a sum, its items."""
    by_items: bool = False
    """Whether the strategy is told how candidates rank by each item, not by their sum."""
    parents: Sequence[JudgedParent] = ()
    """For pictures: the models that candidates are made of, where they were judged."""
    judges: Judges | None = None
    """Workers that judge by texts; None where this process does."""

    def rank(self, trial: Trial) -> Any:
        """Return what the strategy is told of a trial."""
        return rank_items(trial, self.items) if self.by_items else rank(trial, self.sign)


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
    front: tuple[Trial, ...] = ()
    """Of a sum: the candidates than which none is better in all of its items."""


OnTrial = Callable[[TrialFinished], None]


def ignore(event: TrialFinished) -> None:
    """Do nothing with a trial."""


def drive_search(hunt: Hunt, asking: Asking, folder: Path, options: RunOptions, on_trial: OnTrial) -> Found:
    """Ask, judge and tell until the search is over; `RunError` where three in a row fail, or all of fewer."""
    started = time.perf_counter()
    remove_candidates(folder)
    with closing(_Log(hunt, folder, options, on_trial)) as log:
        try:
            stopped = _follow(hunt, asking, log)
        finally:  # also where it is interrupted
            if log.trials:
                _report(log)
    best = find_best(log.trials, hunt.sign)
    if best is None and log.trials:
        first = log.trials[0].error
        raise RunError(f"{folder}: no candidate has a score; the first of them: {first}; ask for more evaluations")
    front = tuple(find_front(log.trials, hunt.items))
    return Found(best, tuple(log.trials), time.perf_counter() - started, stopped, front)


def _follow(hunt: Hunt, asking: Asking, log: "_Log") -> str:
    """Judge what a strategy asks for until the search is over; returns why."""
    asked, generation, stopped = next(asking), 0, ""
    try:
        while not stopped:
            done = _take_all(log, generation, _fit(asked, hunt.budget, len(log.trials)))
            _report(log)
            stopped = _find_stop(hunt, log.trials)
            generation += 1
            if not stopped:
                asked = asking.send([hunt.rank(trial) for trial in done])
    except StopIteration as end:
        stopped = str(end.value)
    return stopped


def _report(log: "_Log") -> None:
    """Write what is known so far, for people."""
    hunt = log.hunt
    write_reports(log.folder, log.trials, hunt.sign, hunt.title, hunt.items)
    page = make_plot(log.trials, hunt.sign, hunt.title, items=hunt.items, parents=hunt.parents)
    write_file(log.folder / PLOT_NAME, page.encode())


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


def _take_all(log: _Log, generation: int, asked: Sequence[Values]) -> list[Trial]:
    """Return the trials of a generation; what is not known of it yet is judged together as far as it can be."""
    first, hunt = len(log.trials), log.hunt
    with ExitStack() as stack:
        opened = {
            first + place: stack.enter_context(
                open_candidate(first + place, values, hunt.make_recipe(values), log.folder, log.options, hunt.judges)
            )
            for place, values in enumerate(asked)
        }
        wanted = [candidate for number, candidate in opened.items() if log.find(number) is None]
        if wanted and hunt.raced:
            wanted = list(opened.values())  # who is behind hangs on all of them, also on those that are known
        if hunt.sources and len(wanted) > 1:
            with suppress(MergemillError):  # of one of them: then each is judged alone, and that one fails
                evaluate_together(wanted, hunt.sources, hunt.raced)
        return [_take(log, generation, number, each, log.find(number)) for number, each in opened.items()]


def _take(log: _Log, generation: int, number: int, candidate: OpenCandidate, known: Trial | None) -> Trial:
    """Return a candidate's trial, as it was noted, or judged now."""
    digest = digest_of(recipe_to_json(candidate.recipe))[:32]
    if known is not None and known.recipe_digest != digest:
        raise RunError(
            f"{log.folder}: candidate {number} was another recipe when this search began, with another version of "
            "mergemill or of a package that it draws with; remove the folder and search again"
        )
    trial = known or _judge(log.hunt, candidate, Trial(number, generation, candidate.values, digest))
    log.add(trial, candidate.recipe, kept=known is not None)
    return trial


def _judge(hunt: Hunt, candidate: OpenCandidate, blank: Trial) -> Trial:
    """Return the trial of a candidate that is judged now."""
    started, together_s = time.perf_counter(), sum(each.seconds for each in candidate.evaluations.values())
    found = blank
    try:
        judged = hunt.judge(candidate)
        holdout = hunt.holdout(candidate).score if hunt.holdout else None
        found = replace(
            blank, state=SCORED, score=judged.score, stderr=judged.stderr, parts=judged.parts, holdout=holdout
        )
        raced = any(each.raced for each in candidate.evaluations.values())
        found = replace(found, raced=raced, perplexity=judged.perplexity)
    except (Cancelled, SourceChanged):
        raise
    except MergemillError as failed:
        found = replace(blank, error=str(failed))
    finally:
        candidate.remove()
    seconds = round(together_s + time.perf_counter() - started, 3)
    return replace(found, seconds=seconds, bytes_read=candidate.bytes_read)
