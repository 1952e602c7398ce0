"""The tables of a search, for people and spreadsheets."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergemill.engine.recipe.templates import Values
from mergemill.engine.search.front import SumItem, find_front
from mergemill.engine.search.state import BEST_NAME, write_file
from mergemill.engine.search.trials import Trial, find_best, rank

TABLE_NAME, PAGE_NAME = "table.csv", "README.md"
MOST_ROWS = 20  # of the page


def write_reports(folder: Path, trials: Sequence[Trial], sign: int, title: str, items: Sequence[SumItem] = ()) -> None:
    """Write the table and the page of a search as it stands; items: of an objective that is a sum."""
    write_file(folder / TABLE_NAME, make_table(trials, items).encode())
    write_file(folder / PAGE_NAME, make_page(trials, sign, title, items).encode())


def make_table(trials: Sequence[Trial], items: Sequence[SumItem] = ()) -> str:
    """Return all trials as CSV: a column for each number of each variable; of a sum for each item, and the front."""
    front = {trial.number for trial in find_front(trials, items)}
    of_sum = ["front", *(item.name for item in items)] if len(items) > 1 else []
    names = list(spread_values(trials[0].values)) if trials else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    raced = any(trial.raced for trial in trials)
    heads = ["number", "generation", "state", "score", "stderr", *(["estimated"] if raced else ()), "holdout"]
    writer.writerow([*heads, *of_sum, *names, "seconds", "bytes_read"])
    for trial in trials:
        known: list[Any] = [trial.number, trial.generation, trial.state, trial.score, trial.stderr]
        known += [*([int(trial.raced)] if raced else ()), trial.holdout]
        known += [int(trial.number in front), *(trial.parts or [None] * len(items))] if of_sum else []
        values = spread_values(trial.values)
        writer.writerow([*known, *(values.get(name) for name in names), trial.seconds, trial.bytes_read])
    return text.getvalue()


def make_page(trials: Sequence[Trial], sign: int, title: str, items: Sequence[SumItem] = ()) -> str:
    """Return the page: the best, the front of a sum, and the table of the best few."""
    best = find_best(trials, sign)
    failed = sum(trial.score is None for trial in trials)
    lines = [f"# {title}", "", f"{len(trials)} candidates were judged{f', {failed} of them failed' if failed else ''}."]
    if best is not None:
        lines += ["", f"The best is number {best.number}: {say_score(best)}. Its recipe: [{BEST_NAME}]({BEST_NAME})."]
    front = find_front(trials, items)
    if front:
        lines += [
            "",
            f"The front, than which no candidate is better in one item without being worse in another, by "
            f"{items[0].name}: {', '.join(f'number {trial.number}' for trial in front)}.",
        ]
    names = list(spread_values(trials[0].values)) if trials else []
    of_sum = ["of the front", *(item.name for item in items)] if len(items) > 1 else []
    heads = ["number", "score", "hold-out", *of_sum, *names]
    lines += ["", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for trial in sort_trials(trials, sign)[:MOST_ROWS]:
        values = spread_values(trial.values)
        cells = [str(trial.number), say_score(trial), say_number(trial.holdout)]
        if of_sum:
            cells += ["yes" if trial in front else "", *map(say_number, trial.parts or [None] * len(items))]
        lines.append(f"| {' | '.join([*cells, *(say_number(values.get(name)) for name in names)])} |")
    return "\n".join(lines) + "\n"


def sort_trials(trials: Sequence[Trial], sign: int) -> list[Trial]:
    """Return the trials, the best first and those that failed last."""
    return sorted(trials, key=lambda trial: (rank(trial, sign), trial.number))


def say_score(trial: Trial) -> str:
    """Return a score with its error, and whether it is that of half of the windows and the best's on the rest.

    >>> say_score(Trial(0, 0, {}, "", "scored", 7.25, 0.1)), say_score(Trial(0, 0, {}, "", "scored", 9.5, raced=True))
    ('7.25 ± 0.1', '9.5, estimated')
    """
    if trial.score is None:
        return "failed"
    error = f" ± {trial.stderr:.2g}" if trial.stderr is not None else ""
    return f"{say_number(trial.score)}{error}{', estimated' if trial.raced else ''}"


def say_number(value: object) -> str:
    """Return a value as tables show it.

    >>> say_number(0.123456789), say_number(None), say_number("ties")
    ('0.123457', '', 'ties')
    """
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def spread_values(values: Values) -> Mapping[str, object]:
    """Return values by column: a gradient has one for each of its numbers."""
    found: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, tuple) and not all(isinstance(each, str) for each in value):
            found |= {f"{name}[{place}]": each for place, each in enumerate(value)}
        else:
            found[name] = " + ".join(map(str, value)) if isinstance(value, tuple) else value
    return found
