"""A search as a page of HTML: its best, pictures of its scores, the table of all candidates; no script, no network."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from mergemill.engine.reports.frame import frame
from mergemill.engine.search.drawing import Axis, Dot, Level, draw_dots, make_axis, make_choices
from mergemill.engine.search.front import SumItem, find_front
from mergemill.engine.search.report import say_number, say_score, sort_trials, spread_values
from mergemill.engine.search.trials import JudgedParent, Trial, find_best

PLOT_NAME = "plot.html"
MOST_PICTURES, MOST_ROWS = 24, 500

_STYLE = """
svg { font-size: 11px; } svg text { fill: currentColor; } svg .axis { stroke: currentColor; }
svg .grid { stroke: var(--line); }
svg .level { stroke: currentColor; stroke-dasharray: 4 3; opacity: .6; }
""".strip()


def make_plot(
    trials: Sequence[Trial],
    sign: int,
    title: str,
    *,
    items: Sequence[SumItem] = (),
    parents: Sequence[JudgedParent] = (),
) -> str:
    """Return the page. sign: -1 where more is better, else 1. items: of an objective that is a sum."""
    best = find_best(trials, sign)
    told = f"<p>The best of {len(trials)} is number {best.number}: {escape(say_score(best))}.</p>" if best else ""
    drawn = [*_draw(trials, sign, parents), *_draw_fronts(trials, items)]
    pictures = "".join(f"<figure><figcaption>{what}</figcaption>{svg}</figure>" for what, svg in drawn)
    shown = f'<div class="pictures">{pictures}</div><h2>Candidates, the best first</h2>{_table(trials, sign)}'
    shown += _list_parents(parents)
    return frame(title, [f"<h1>{escape(title)}</h1>", told, shown], figure_px=366, style=_STYLE)


def _draw(trials: Sequence[Trial], sign: int, parents: Sequence[JudgedParent]) -> Iterator[tuple[str, str]]:
    """Yield captions and pictures: scores in the order of candidates, against the hold-out, and each variable."""
    scored = [trial for trial in trials if trial.score is not None]
    best = find_best(trials, sign)
    if not scored or best is None:
        return
    heights = [trial.score for trial in scored if trial.score is not None]
    levels = _find_levels(heights, parents)
    scores = make_axis("score", [*heights, *(level.y for level in levels)])
    if scored[0].number == 0:
        levels = [*levels, Level(heights[0], "")]
    told = f"dashed: candidate 0{' and the models alone' if len(levels) > 1 else ''}"
    numbers = make_axis("candidate", [float(trial.number) for trial in scored])
    dots = [_dot(trial, float(trial.number), best) for trial in scored]
    picture = draw_dots(numbers, scores, dots, steps=_find_steps(scored, sign), levels=levels)
    yield f"Score of each candidate, and the best so far; {told}", picture
    held = [trial for trial in scored if trial.holdout is not None]
    if held:
        axis = make_axis("hold-out", [trial.holdout for trial in held if trial.holdout is not None])
        dots = [_dot(trial, trial.holdout or 0.0, best) for trial in held]
        yield "Score against the hold-out, which was not searched on", draw_dots(axis, scores, dots)
    for name in list(spread_values(trials[0].values))[:MOST_PICTURES]:
        axis, places = _find_axis(name, scored)
        dots = [_dot(trial, places[spread_values(trial.values)[name]], best) for trial in scored]
        yield f"Score against {escape(name)}; {told}", draw_dots(axis, scores, dots, levels=levels)


def _find_levels(scores: Sequence[float], parents: Sequence[JudgedParent]) -> list[Level]:
    """Return the models that a picture has room for: one that is far off would leave none for the candidates."""
    room = max(scores) - min(scores) or abs(scores[0])
    known = [(each.score, each.model) for each in parents if each.score is not None]
    near = [(score, name) for score, name in known if min(scores) - room <= score <= max(scores) + room]
    return [Level(score, Path(name).name) for score, name in near]


def _draw_fronts(trials: Sequence[Trial], items: Sequence[SumItem]) -> Iterator[tuple[str, str]]:
    """Yield a picture of each two items of a sum, in which those of the front are marked."""
    scored = [trial for trial in trials if trial.score is not None]
    front = {trial.number for trial in find_front(trials, items)}
    for first, second in itertools.islice(itertools.combinations(range(len(items)), 2), MOST_PICTURES if front else 0):
        x, y = (make_axis(items[place].name, [trial.parts[place] for trial in scored]) for place in (first, second))
        dots = [
            Dot(trial.parts[first], trial.parts[second], f"number {trial.number}", trial.number in front)
            for trial in scored
        ]
        yield f"{escape(items[second].name)} against {escape(items[first].name)}: the front", draw_dots(x, y, dots)


def _list_parents(parents: Sequence[JudgedParent]) -> str:
    """Return a table of the models alone, where they were judged."""
    rows = "".join(
        f"<tr><td>{escape(each.model)}</td><td>{say_number(each.score) or 'not judged'}</td>"
        f"<td>{say_number(each.holdout)}</td></tr>"
        for each in parents
    )
    head = "<thead><tr><th>model</th><th>score</th><th>hold-out</th></tr></thead>"
    return (
        f'<h2>The models alone</h2><div class="wide"><table>{head}<tbody>{rows}</tbody></table></div>' if rows else ""
    )


def _find_axis(name: str, trials: Sequence[Trial]) -> tuple[Axis, Mapping[object, float]]:
    """Return the axis of a variable, and where each of its values lies on it."""
    values = list(dict.fromkeys(spread_values(trial.values).get(name) for trial in trials))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        numbers = {value: float(value) for value in values if isinstance(value, int | float)}
        return make_axis(name, list(numbers.values())), {key: numbers[key] for key in numbers}
    return make_choices(name, [str(value) for value in values]), {value: place for place, value in enumerate(values)}


def _dot(trial: Trial, x: float, best: Trial) -> Dot:
    assert trial.score is not None
    return Dot(x, trial.score, f"number {trial.number}: {say_score(trial)}", trial.number == best.number)


def _find_steps(trials: Sequence[Trial], sign: int) -> list[tuple[float, float]]:
    """Return the best score so far, where each candidate is."""
    found: list[tuple[float, float]] = []
    for trial in trials:
        assert trial.score is not None
        better = not found or sign * trial.score < sign * found[-1][1]
        found.append((float(trial.number), trial.score if better else found[-1][1]))
    return found


def _table(trials: Sequence[Trial], sign: int) -> str:
    names = list(spread_values(trials[0].values)) if trials else []
    head = "".join(f"<th>{escape(each)}</th>" for each in ("number", "score", "hold-out", *names))
    rows = []
    for trial in sort_trials(trials, sign)[:MOST_ROWS]:
        values = spread_values(trial.values)
        cells = [str(trial.number), say_score(trial), say_number(trial.holdout)]
        cells += [say_number(values.get(name)) for name in names]
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
