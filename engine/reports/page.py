"""A comparison as one page of HTML: tables and pictures, light and dark, wide and narrow, without script or network."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from mergemill.engine.plan.sizes import format_size
from mergemill.engine.reports.charts import draw_bars, draw_heat, draw_lines
from mergemill.engine.reports.frame import frame
from mergemill.engine.reports.sums import (
    GroupChange,
    group_by_kind,
    group_by_layer,
    list_most_changed,
    list_stacks,
    sum_up,
)
from mergemill.engine.runs.differences import Diff
from mergemill.engine.tensors.comparing import LEAST_EXPONENT

MOST_TENSORS = 20  # that are listed of those that changed
MOST_STACKS = 3  # that are drawn
_LEAST = 1e-12  # below which a share of change is drawn as that: a logarithm knows no 0

_STYLE = """
.facts td { text-align: left; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.why { border-left: 4px solid #d0853a; padding-left: .75rem; }
""".strip()


def make_page(diff: Diff, *, title: str = "", facts: Sequence[tuple[str, str]] = ()) -> str:
    """Return the page; `facts` are told of what was compared, before all others."""
    title = title or f"{diff.models[1]} beside {diff.models[0]}"
    body = [
        f"<h1>{escape(title)}</h1>",
        _table([], [*facts, *_find_facts(diff)]).replace("<table>", '<table class="facts">'),
        *_show_why(diff),
        *_show_kinds(diff),
        *_show_pictures(diff),
        *_show_tensors(diff),
        *_show_lone(diff),
    ]
    return frame(title, body, figure_px=352, style=_STYLE)


def _find_facts(diff: Diff) -> Iterator[tuple[str, str]]:
    first, second, *base = diff.models
    yield "first", first
    yield "second", second
    if base:
        yield "base", base[0]
    yield "tensors in all", f"{len(diff.tensors):,}, {sum(each.identical for each in diff.tensors):,} of them identical"
    yield "read", f"{format_size(diff.read_bytes)} in {diff.seconds:.1f} s"


def _show_why(diff: Diff) -> Iterator[str]:
    if diff.why_not:
        yield "<h2>What stands in the way of a merge</h2>"
        yield f'<ul class="why">{"".join(f"<li>{escape(each)}</li>" for each in diff.why_not)}</ul>'


def _show_kinds(diff: Diff) -> Iterator[str]:
    for side, name in enumerate(name_sides(diff)):
        yield f"<h2>By kind of tensor: {escape(name)}</h2>"
        heads = ["kind", "tensors", "identical", "change", "cosine", "equal elements", "effective rank"]
        rows = [_tell_group(kind, sum_up(found, side)) for kind, found in group_by_kind(diff).items()]
        yield _table(heads, [*rows, _tell_group("all", sum_up(diff.tensors, side))])


def name_sides(diff: Diff) -> list[str]:
    """Return what each side of a comparison is, in words."""
    first, second, *base = diff.models
    return [f"{each} less {base[0]}" for each in (first, second)] if base else [f"{second} less {first}"]


def _tell_group(name: str, found: GroupChange) -> tuple[str, ...]:
    counts = f"{found.tensors:,}", f"{found.identical:,}"
    return (
        name,
        *counts,
        say_share(found.relative),
        say_number(found.cosine),
        f"{found.unchanged:.1%}",
        say_number(found.rank),
    )


def _show_pictures(diff: Diff) -> Iterator[str]:
    kinds = list(group_by_kind(diff))
    for side, name in enumerate(name_sides(diff)):
        yield f'<h2>Pictures: {escape(name)}</h2><div class="pictures">'
        for stack in list_stacks(diff)[:MOST_STACKS]:
            yield from _draw_stack(diff, side, stack, kinds)
        yield from _draw_histograms(diff, side)
        yield "</div>"


def _draw_stack(diff: Diff, side: int, stack: str, kinds: Sequence[str]) -> Iterator[str]:
    groups = {place: sum_up(found, side) for place, found in group_by_layer(diff.tensors, stack).items()}
    rows: list[dict[str, Any]] = [
        {
            "layer": layer,
            "kind": kind,
            "change": max(found.relative, _LEAST),
            "rank": found.rank,
            "cosine": found.cosine,
        }
        for (layer, kind), found in groups.items()
        if found.relative is not None and math.isfinite(found.relative)
    ]
    if not rows:
        return
    where = escape(stack or "layers")
    if any(row["change"] > _LEAST for row in rows):
        picture = draw_heat(rows, "layer", "kind", "change", order=kinds, log=True)
        yield _frame(f"Change by layer and kind ({where}): norm of the difference over the tensors' own", picture)
    alike = [row for row in rows if row["cosine"] is not None and side == 0]  # which is of both sides
    if alike:
        what = "the differences" if len(diff.models) == 3 else "the tensors"
        yield _frame(f"Cosine of {what} ({where})", draw_heat(alike, "layer", "kind", "cosine", order=kinds))
    ranked = [row for row in rows if row["rank"] is not None]
    if ranked:
        picture = draw_heat(ranked, "layer", "kind", "rank", order=kinds)
        yield _frame(f"Effective rank of the difference ({where}): (Σσ²)²/Σσ⁴, from a sketch", picture)
    if len({row["layer"] for row in rows}) > 1:
        picture = draw_lines(rows, "layer", "change", "kind", order=kinds)
        yield _frame(f"Change by depth ({where}), for each kind", picture)
    yield from _draw_experts(diff, side, stack)


def _draw_experts(diff: Diff, side: int, stack: str) -> Iterator[str]:
    rows = [
        {"layer": tensor.layer, "expert": expert, "drift": drift}
        for tensor in diff.tensors
        if tensor.stack == stack and side < len(tensor.deltas)
        for expert, drift in enumerate(tensor.deltas[side].experts)
        if drift is not None and math.isfinite(drift)
    ]
    if rows:
        picture = draw_heat(rows, "expert", "layer", "drift")
        yield _frame(f"Drift of the router by expert ({escape(stack)}): change of each expert's row", picture)


def _draw_histograms(diff: Diff, side: int) -> Iterator[str]:
    for kind, found in group_by_kind(diff).items():
        histograms = [each.deltas[side].histogram for each in found if side < len(each.deltas)]
        sums = [sum(each) for each in zip(*histograms, strict=True)]
        used = [place for place, count in enumerate(sums) if count]
        if not used:
            continue
        total = sum(sums)
        rows: list[Mapping[str, Any]] = [
            {"power of 2": place + LEAST_EXPONENT, "share": sums[place] / total}
            for place in range(used[0], used[-1] + 1)
        ]
        yield _frame(
            f"Sizes of differences of {kind}: share of what changed, sampled", draw_bars(rows, "power of 2", "share")
        )


def _frame(caption: str, picture: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{picture}</figure>"


def _show_tensors(diff: Diff) -> Iterator[str]:
    most = list_most_changed(diff, MOST_TENSORS)
    if not most:
        yield "<p>Nothing changed.</p>"
        return
    yield "<h2>Changed most</h2>"
    heads = ["tensor", *(f"change: {name}" for name in name_sides(diff)), "cosine", "equal signs", "effective rank"]
    yield _table(
        heads,
        [
            (
                each.name,
                *(say_share(delta.relative) for delta in each.deltas),
                say_number(each.cosine),
                say_share(each.signs),
                say_number(each.deltas[-1].rank),
            )
            for each in most
        ],
    )


def _show_lone(diff: Diff) -> Iterator[str]:
    rows = [(name, model) for model, names in diff.only.items() for name in names[:MOST_TENSORS]]
    rows += [(name, " and ".join(str(list(each)) for each in found)) for name, found in diff.shapes.items()][
        :MOST_TENSORS
    ]
    if rows:
        yield "<h2>Without a partner, or of another shape</h2>"
        yield _table(["tensor", "only in, or shapes"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    top = f"<thead><tr>{head}</tr></thead>" if heads else ""
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def say_share(value: float | None) -> str:
    """Return a share in percent.

    >>> say_share(0.01234), say_share(None), say_share(0.0)
    ('1.23%', '–', '0%')
    """
    return "–" if value is None else f"{100 * value:.3g}%"


def say_number(value: float | None) -> str:
    """Return a number in few digits.

    >>> say_number(0.99951), say_number(None)
    ('0.9995', '–')
    """
    return "–" if value is None else f"{value:.4g}"
