"""Inputs of weight 0: where a method says that they change nothing, they are not read."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from mergemill.engine.methods.contract import Method
from mergemill.engine.plan.steps import Steps
from mergemill.engine.recipe import Guard
from mergemill.engine.tensors.kernels import Kernel
from mergemill.engine.tensors.merged import Merged


def find_weightless(method: Kernel, settings: Mapping[str, Any], steps: Steps, guard: Guard) -> list[int]:
    """Return the numbers of the inputs, beside the base, that need not be read; one is left in any case.

    None, where they are looked at nevertheless: by a step after the method, for the norms of whole task vectors, or by
    a guard that may undo or stop the merge, since it compares with the change of every input.
    """
    if steps.takes_squares or guard.policy != "warn" or not isinstance(method, Method) or not method.unread_at_zero:
        return []
    weights = settings[method.unread_at_zero]
    found = [i for i, weight in enumerate(weights) if weight == 0]
    return found if len(found) < len(weights) else found[:-1]


def leave_out_settings(
    method: Kernel, settings: Mapping[str, Any], count: int, numbers: Collection[int]
) -> Mapping[str, Any]:
    """Return the settings without those of the inputs of these numbers, of `count`."""
    if not numbers:
        return settings
    assert isinstance(method, Method)
    own = {parameter.name for parameter in method.parameters if parameter.per_model}
    return {
        name: tuple(value[i] for i in range(count) if i not in numbers) if name in own else value
        for name, value in settings.items()
    }


def leave_out(merged: Merged, numbers: Collection[int], settings: Mapping[str, Any]) -> Merged:
    """Return the merge without the inputs of these numbers; the others keep their places, and so their masks.

    settings: of those that are left (`leave_out_settings`).
    """
    if not numbers:
        return merged
    kept = [i for i in range(len(merged.inputs) - merged.has_base) if i not in numbers]
    return replace(
        merged,
        inputs=(*merged.inputs[: merged.has_base], *(merged.inputs[merged.has_base + i] for i in kept)),
        settings=settings,
        place=merged.place._replace(models=tuple(merged.place.models[i] for i in kept)),
        factors=tuple(merged.factors[i] for i in kept) if merged.factors else (),
    )
