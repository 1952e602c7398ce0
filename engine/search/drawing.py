"""Pictures of points as SVG: a few lines of text, so no library is needed, and a page holds them without a script.

Axes and words take the colour of the page's text, in light and in dark.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 210  # of a picture
LEFT, RIGHT, TOP, BOTTOM = 58, 8, 8, 34  # around the plot
TICKS = 5  # about so many on an axis
POINT, BEST, LINE = "#4c8dd6", "#d0853a", "#d0853a"


@dataclass(frozen=True, slots=True)
class Axis:
    """One side of a plot."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    """Places and what stands there."""

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 to 1."""
        return 0.5 if self.high == self.low else (value - self.low) / (self.high - self.low)


def make_axis(title: str, values: Sequence[float]) -> Axis:
    """Return an axis on which all values have a place."""
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or abs(high) * 0.04 or 0.5
    return Axis(title, low - room, high + room, tuple((tick, f"{tick:.6g}") for tick in find_ticks(low, high)))


def make_choices(title: str, choices: Sequence[str]) -> Axis:
    """Return an axis of named places, 0, 1, and so on."""
    return Axis(title, -0.5, len(choices) - 0.5, tuple((place, name) for place, name in enumerate(choices)))


def find_ticks(low: float, high: float) -> list[float]:
    """Return round numbers from `low` to `high`.

    >>> find_ticks(0.0, 1.0), find_ticks(7.31, 7.34), find_ticks(3, 3)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [7.31, 7.32, 7.33, 7.34], [3])
    """
    if not low < high:
        return [low]
    rough = (high - low) / TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Level:
    """A height that is drawn as a line, and what stands at its end."""

    y: float
    name: str


@dataclass(frozen=True, slots=True)
class Dot:
    """A point, and what is told where a mouse lies on it."""

    x: float
    y: float
    told: str
    best: bool = False


def draw_dots(
    x: Axis, y: Axis, dots: Sequence[Dot], *, steps: Sequence[tuple[float, float]] = (), levels: Sequence[Level] = ()
) -> str:
    """Return a picture of points, with a line in steps through others, and level lines."""
    body = [*_draw_axes(x, y)]
    for level in levels:
        height = _down(y, level.y)
        body.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>')
        body.append(f'<text x="{WIDTH - RIGHT}" y="{height - 3:g}" text-anchor="end">{escape(level.name)}</text>')
    if steps:
        body.append(f'<path d="{_step_path(x, y, steps)}" fill="none" stroke="{LINE}" stroke-width="1.5"/>')
    body += [
        f'<circle cx="{_across(x, dot.x)}" cy="{_down(y, dot.y)}" r="{4.5 if dot.best else 3}" '
        f'fill="{BEST if dot.best else POINT}"><title>{escape(dot.told)}</title></circle>'
        for dot in sorted(dots, key=lambda dot: dot.best)
    ]
    label = escape(f"{y.title} against {x.title}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg>'


def _draw_axes(x: Axis, y: Axis) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    yield f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none"/>'
    for value, name in x.ticks:
        yield f'<text x="{_across(x, value)}" y="{bottom + 13}" text-anchor="middle">{escape(name)}</text>'
    for value, name in y.ticks:
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_down(y, value)}" y2="{_down(y, value)}"/>'
        yield f'<text x="{LEFT - 5}" y="{_down(y, value) + 3:g}" text-anchor="end">{escape(name)}</text>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x.title)}</text>'


def _step_path(x: Axis, y: Axis, steps: Sequence[tuple[float, float]]) -> str:
    """Return a path that keeps each height until the next place."""
    path = f"M{_across(x, steps[0][0])} {_down(y, steps[0][1])}"
    return path + "".join(f"H{_across(x, place)}V{_down(y, height)}" for place, height in steps[1:])


def _across(axis: Axis, value: float) -> float:
    return round(LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT), 1)


def _down(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM), 1)
