"""What the router of a mixture does with the prompts that it was made of, as one page: pictures by layer and expert."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mergemill.engine.reports.charts import draw_heat, draw_lines
from mergemill.engine.reports.frame import frame

_STYLE = ".facts td, .facts th { text-align: left; white-space: normal; }"

Report = Mapping[str, Any]


def make_routing_page(report: Report, *, title: str, facts: Sequence[tuple[str, str]] = ()) -> str:
    """Return the page of a routing report; `facts` are told of the mixture before the pictures.

    A prompt is called by its number and by the experts that it is for; what it says is in the recipe.
    """
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    body = [f"<h1>{escape(title)}</h1>", f'<div class="wide"><table class="facts">{rows}</table></div>']
    body += ['<div class="pictures">', *_draw(report), "</div>"]
    return frame(title, body, figure_px=352, style=_STYLE)


def list_shares(report: Report) -> list[dict[str, Any]]:
    """Return for each layer and expert which share it has of what is picked there, for prompts that are an expert's.

    >>> list_shares({"layers": [3], "picks": [[[0, 1], [0, 2], [0, 1]]], "experts": [[0], [1], []], "routed": 3})[0]
    {'layer': 3, 'expert': 'expert 0', 'share': 0.5}
    """
    found = []
    for layer, picks in zip(report["layers"], report["picks"], strict=True):
        all_picked = [one for picked, own in zip(picks, report["experts"], strict=True) if own for one in picked]
        found += [
            {"layer": layer, "expert": f"expert {each}", "share": all_picked.count(each) / max(1, len(all_picked))}
            for each in range(report["routed"])
        ]
    return found


def list_prompts(report: Report) -> list[dict[str, Any]]:
    """Return for each prompt and expert in which share of the layers the expert is picked."""
    count = len(report["layers"])
    return [
        {
            "prompt": _name_prompt(number, own),
            "expert": each,
            "share": sum(each in picks[number] for picks in report["picks"]) / count,
        }
        for number, own in enumerate(report["experts"])
        for each in range(report["routed"])
    ]


def _name_prompt(number: int, own: Sequence[int]) -> str:
    whose = f"of {', '.join(map(str, own))}" if own else "of none"
    return f"prompt {number + 1}, {whose}"


def _draw(report: Report) -> list[str]:
    experts = [f"expert {each}" for each in range(report["routed"])]
    conditions = [
        {"layer": layer, "condition number": each, "what": "rows of the router"}
        for layer, each in enumerate(report["condition"])
        if each is not None
    ]
    pictures = []
    if report["layers"]:
        prompts = [_name_prompt(number, own) for number, own in enumerate(report["experts"])]
        pictures += [
            (
                "Which expert is picked in which layer",
                draw_heat(list_shares(report), "layer", "expert", "share", order=experts),
            ),
            (
                "For which prompt an expert is picked, as a share of the layers",
                draw_heat(list_prompts(report), "expert", "prompt", "share", order=prompts),
            ),
            (
                "Share of the prompts for which one of their own experts is picked",
                draw_lines(
                    [
                        {"layer": layer, "share": each, "what": "own expert is picked"}
                        for layer, each in zip(report["layers"], report["own"], strict=True)
                    ],
                    "layer",
                    "share",
                    "what",
                    order=["own expert is picked"],
                ),
            ),
        ]
    if conditions:
        drawn = draw_lines(conditions, "layer", "condition number", "what", order=["rows of the router"])
        pictures.append((f"How hard {len(experts)} experts are to tell apart: above 5 is much", drawn))
    return [f"<figure><figcaption>{escape(words)}</figcaption>{picture}</figure>" for words, picture in pictures]
