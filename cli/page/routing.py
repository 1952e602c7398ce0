"""What a mixture's router does with its prompts, as a table: a row a layer."""

from collections.abc import Mapping
from typing import Any


def make_routing_table(report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return heads and rows of a routing report; None where there is none, or what a driver noted is none.

    >>> told = {"routed": 2, "layers": [3], "picks": [[[0, 1], [1, 0]]], "own": [0.5], "experts": [[0], [0]]}
    >>> make_routing_table({**told, "condition": [None, None, None, 1.5]})["rows"]
    [['3', '50%', '50%', '50%', '1.5']]
    """
    try:
        return None if report is None else _make(report)
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _make(report: Mapping[str, Any]) -> dict[str, Any]:
    experts = [f"expert {number}" for number in range(report["routed"])]
    rows = []
    for layer, picks, own in zip(report["layers"], report["picks"], report["own"], strict=True):
        first = [picked[0] for picked in picks]
        shares = [f"{first.count(number) / max(1, len(first)):.0%}" for number in range(len(experts))]
        condition = report["condition"][layer]
        rows.append([str(layer), f"{own:.0%}", *shares, "infinite" if condition is None else f"{condition:.3g}"])
    return {"heads": ["layer", "own expert picked", *experts, "condition"], "rows": rows}
