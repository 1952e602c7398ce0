"""What an adapter loses of the change that it stands for: known when it is made, and told in its card."""

from collections.abc import Mapping
from dataclasses import replace

from mergemill.engine.plan.small_files import CARD_NAME
from mergemill.engine.plan.values import Plan


def add_losses(plan: Plan, losses: Mapping[str, float | None]) -> Plan:
    """Return the plan with the error of each module in the card."""
    section = f"\n\n{describe_losses(losses)}".encode()
    files = [
        replace(file, data=file.data.rstrip() + section) if file.name == CARD_NAME and file.data is not None else file
        for file in plan.files
    ]
    return replace(plan, files=tuple(files))


def describe_losses(losses: Mapping[str, float | None]) -> str:
    """Return the errors as a section of a card.

    >>> print(describe_losses({"layers.0.q_proj": 0.25, "layers.1.q_proj": 0.0}))
    ## Errors
    <BLANKLINE>
    What is lost of each module's change D, ‖D − BA‖ / ‖D‖, the largest first.
    <BLANKLINE>
    | module | error |
    |---|---|
    | `layers.0.q_proj` | 25.0000% |
    | `layers.1.q_proj` | 0.0000% |
    <BLANKLINE>
    """
    rows = [f"| `{name}` | {'not finite' if loss is None else f'{loss:.4%}'} |" for name, loss in losses.items()]
    told = "What is lost of each module's change D, ‖D − BA‖ / ‖D‖, the largest first."
    return "\n".join(["## Errors", "", told, "", "| module | error |", "|---|---|", *rows]) + "\n"
