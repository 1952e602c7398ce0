"""What routers are like: how well their rows can be told apart, and which experts they pick for the prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergemill.engine.forward.gates import GatePrompts, GatesFound

LARGE = 5.0  # of a condition number: rows nearly depend on each other


def make_report(found: GatesFound, asked: GatePrompts, chosen: int) -> dict[str, Any]:
    """Return the routing report: JSON values.

    ``routed`` is how many experts there are, ``condition`` the condition number of each layer's router. For the
    ``layers`` of which the router's input is known, ``picks`` are for each prompt the `chosen` experts that the router
    picks, ``experts`` those that the prompt is for, and ``own`` is the share of such prompts that one of their own is
    picked for.
    """
    rows = found.rows[:, : asked.routed]
    experts = [
        [row for row in range(asked.routed) if number in asked.positive[row]] for number in range(len(asked.prompts))
    ]
    picks = {layer: _pick(states @ rows[layer].T, chosen) for layer, states in sorted(found.states.items())}
    return {
        "routed": asked.routed,
        "condition": [_find_condition(each, asked.routed - asked.contrast) for each in rows],
        "layers": list(picks),
        "experts": experts,
        "picks": list(picks.values()),
        "own": [_find_share(each, experts) for each in picks.values()],
    }


def _find_condition(rows: np.ndarray[Any, np.dtype[np.float64]], rank: int) -> float | None:
    """Return the condition number; None where it is infinite.

    rank: the most that rows can have. Those whose mean was subtracted depend on each other: one less than they are.
    """
    values = np.linalg.svd(rows, compute_uv=False)
    least = values[max(1, min(rank, len(values))) - 1]
    return round(float(values[0] / least), 4) if least > 1e-12 * values[0] else None


def _pick(logits: np.ndarray[Any, np.dtype[np.float64]], chosen: int) -> list[list[int]]:
    return [list(map(int, order[:chosen])) for order in np.argsort(-logits, axis=1, kind="stable")]


def _find_share(picks: Sequence[Sequence[int]], experts: Sequence[Sequence[int]]) -> float:
    own = [bool({*picked} & {*mine}) for picked, mine in zip(picks, experts, strict=True) if mine]
    return round(sum(own) / max(1, len(own)), 4)


def warn_of_report(report: dict[str, Any], *, where: str) -> list[str]:
    """Return a warning that names the layers whose rows nearly depend on each other."""
    bad = [i for i, each in enumerate(report["condition"]) if each is None or each > LARGE]
    if not bad:
        return []
    worst = max(report["condition"][i] or float("inf") for i in bad)
    named = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    return [
        f"{where}: the router's rows can hardly be told apart in layers {named}: condition number up to {worst:.3g}, "
        f"above {LARGE:g}; prompts that differ more help, and so may contrast: true"
    ]
