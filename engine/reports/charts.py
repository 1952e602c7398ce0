"""Pictures as SVG, drawn by Vega-Lite: what is to be shown is data and a few words, and the library draws it.

vl-convert renders Vega-Lite to SVG without a browser, a server or the network, and needs no other package, so a page
holds pictures and no scripts (decided 2026-11-29). Against it: plotly.js and Bokeh put 1 to 4 MB of script into each
page, and a page that runs none cannot be made to; matplotlib's SVG has its colours fixed for one background. Here axes
and words take the colour of the page's text (``currentColor``), in light and in dark.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mergemill.engine.errors import InputError

WIDTH = 270  # pixels of a plot, without its axis: so that a telephone shows all of it
_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"  # a name, which nobody fetches
_BAR, _RULE = "#4c8dd6", "currentColor"
_HEAT = "viridis"
_SIZE = re.compile(r'<svg ([^>]*?)width="(\d+)" height="(\d+)"')

Rows = Sequence[Mapping[str, Any]]
Spec = dict[str, Any]


def draw_heat(rows: Rows, x: str, y: str, value: str, *, order: Sequence[str] | None = None, log: bool = False) -> str:
    """Return a heat map: a cell for each of `rows`, coloured by `value`."""
    scale: Spec = {"scheme": _HEAT} | ({"type": "log"} if log else {})
    tall = len({row[y] for row in rows})
    spec: Spec = {
        "height": max(24, min(18 * tall, 320)),
        "mark": {"type": "rect"},
        "encoding": {
            "x": {"field": x, "type": "ordinal", "axis": {"labelAngle": 0, "labelOverlap": True}},
            "y": {"field": y, "type": "ordinal", "sort": order, "title": None},
            "color": {
                "field": value,
                "type": "quantitative",
                "scale": scale,
                "legend": {"orient": "bottom", "gradientLength": 160, "format": ".2~g"},
            },
        },
    }
    return _draw(spec, rows)


def draw_lines(rows: Rows, x: str, y: str, color: str, *, order: Sequence[str]) -> str:
    """Return a line for each `color`."""
    spec: Spec = {
        "height": 180,
        "mark": {"type": "line", "point": {"size": 12}},
        "encoding": {
            "x": {"field": x, "type": "quantitative", "axis": {"tickMinStep": 1}},
            "y": {"field": y, "type": "quantitative", "axis": {"format": ".2~g"}},
            "color": {
                "field": color,
                "type": "nominal",
                "sort": order,
                "scale": {"scheme": "tableau10"},
                "legend": {"orient": "bottom", "columns": 3, "title": None},
            },
        },
    }
    return _draw(spec, rows)


def draw_bars(rows: Rows, x: str, y: str) -> str:
    """Return a bar for each of `rows`."""
    spec: Spec = {
        "height": 160,
        "mark": {"type": "bar", "color": _BAR},
        "encoding": {
            "x": {"field": x, "type": "ordinal", "sort": None, "axis": {"labelAngle": 0, "labelOverlap": True}},
            "y": {"field": y, "type": "quantitative", "axis": {"format": ".1~%"}},
        },
    }
    return _draw(spec, rows)


def _draw(spec: Spec, rows: Rows) -> str:
    """Return a specification drawn over `rows`, as large as its place in a page allows."""
    text: Spec = {"labelColor": _RULE, "titleColor": _RULE, "labelFontSize": 11, "titleFontSize": 11}
    lines: Spec = {"tickColor": _RULE, "domainColor": _RULE, "gridColor": _RULE, "gridOpacity": 0.15}
    config: Spec = {
        "background": None,
        "view": {"stroke": None},
        "axis": text | lines,
        "legend": text,
        "font": "inherit",
    }
    whole = {"$schema": _SCHEMA, "width": WIDTH, "data": {"values": [dict(row) for row in rows]}, **spec}
    drawn: str = _load().vegalite_to_svg(whole | {"config": config})
    return _SIZE.sub(r'<svg \1style="max-width:\2px"', drawn, count=1)


def _load() -> Any:
    """Return vl-convert; `InputError` where it is missing."""
    try:
        import vl_convert
    except ImportError as error:
        raise InputError("the page's pictures are drawn by vl-convert: pip install mergemill[report]") from error
    return vl_convert


def check_drawing() -> None:
    """Raise `InputError` where nothing can be drawn."""
    _load()
