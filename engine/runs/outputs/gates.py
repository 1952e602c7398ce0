"""Gates beside an unfinished output: computed once, kept with a checksum, and a file of the finished one."""

import json
from dataclasses import replace
from typing import Any

from mergemill.engine.plan.small_files import CARD_NAME, GATES_NAME
from mergemill.engine.plan.values import Plan, SmallFile
from mergemill.engine.runs.outputs.notes import Notes
from mergemill.engine.runs.outputs.record import checksum

RECEIPT_NAME = "gates.json"


def keep_gates(notes: Notes, data: bytes) -> None:
    """Keep a file of gates, then what tells that it is whole."""
    notes.write(GATES_NAME, data)
    notes.write(RECEIPT_NAME, json.dumps({"checksum": checksum([data])}).encode())


def find_gates_kept(notes: Notes) -> bytes | None:
    """Return the gates that an earlier run has kept; None where it has not, or they are damaged."""
    data, receipt = notes.read(GATES_NAME), notes.read(RECEIPT_NAME)
    if data is None or receipt is None:
        return None
    try:
        told = json.loads(receipt)["checksum"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return data if told == checksum([data]) else None


def forget_gates(notes: Notes) -> None:
    """Remove what was kept, once it is a file of the output."""
    notes.remove(RECEIPT_NAME)
    notes.remove(GATES_NAME)


def add_gates(plan: Plan, data: bytes, report: dict[str, Any]) -> Plan:
    """Return the plan with the file of gates, and with the report in the card: what is written is known now."""
    files = [_tell(file, report) if file.name == CARD_NAME else file for file in plan.files]
    return replace(plan, files=(SmallFile(GATES_NAME, data, None), *files))


def _tell(card: SmallFile, report: dict[str, Any]) -> SmallFile:
    assert card.data is not None
    return replace(card, data=card.data.rstrip() + f"\n\n{describe_routing(report)}".encode())


def describe_routing(report: dict[str, Any]) -> str:
    """Return the routing report as a section of a card."""
    rows = ["| layer | condition number | prompts whose own expert is picked |", "|---|---|---|"]
    own = dict(zip(report["layers"], report["own"], strict=True))
    for layer, condition in enumerate(report["condition"]):
        told = "∞" if condition is None else f"{condition:.3g}"
        rows.append(f"| {layer} | {told} | {f'{own[layer]:.0%}' if layer in own else '–'} |")
    shares = count_picks(report)
    picked = [f"* expert {expert}: {share:.0%} of what is picked" for expert, share in enumerate(shares)]
    body = "\n".join(rows) + ("\n\n" + "\n".join(picked) if picked else "")
    return f"## Routing\n\nWhat the untrained router does with the prompts that it was made of.\n\n{body}\n"


def count_picks(report: dict[str, Any]) -> list[float]:
    """Return each expert's share of what is picked, over all layers, for prompts that are some expert's own.

    >>> count_picks({"picks": [[[0, 1], [0, 2], [0, 1]]], "experts": [[0], [1], []], "routed": 3})
    [0.5, 0.25, 0.25]
    """
    picks = [
        expert
        for layer in report["picks"]
        for prompt, own in zip(layer, report["experts"], strict=True)
        if own
        for expert in prompt
    ]
    return [picks.count(expert) / len(picks) for expert in range(report["routed"])] if picks else []
