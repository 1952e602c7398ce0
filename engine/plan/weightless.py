"""Inputs of weight 0: where a method says that they change nothing, they are not read."""

from collections.abc import Collection
from dataclasses import replace

from mergemill.engine.methods.contract import Method
from mergemill.engine.plan.steps import Steps
from mergemill.engine.recipe import Guard
from mergemill.engine.tensors.merged import Merged


def find_weightless(merged: Merged, steps: Steps, guard: Guard) -> list[int]:
    """Return the numbers of the inputs, beside the base, that need not be read; one is left in any case.

    None, where they are looked at nevertheless: by a step after the method, for the norms of whole task vectors, or by
    a guard that may undo or stop the merge, since it compares with the change of every input.
    """
    method = merged.kernel
    if steps.takes_squares or guard.policy != "warn" or not isinstance(method, Method) or not method.unread_at_zero:
        return []
    weights = merged.settings[method.unread_at_zero]
    found = [i for i, weight in enumerate(weights) if weight == 0]
    return found if len(found) < len(weights) else found[:-1]


def leave_out(merged: Merged, numbers: Collection[int]) -> Merged:
    """Return the merge without the inputs of these numbers; the others keep their places, and so their masks."""
    if not numbers:
        return merged
    assert isinstance(merged.kernel, Method)
    kept = [i for i in range(len(merged.inputs) - merged.has_base) if i not in numbers]
    own = {parameter.name for parameter in merged.kernel.parameters if parameter.per_model}
    return replace(
        merged,
        inputs=(*merged.inputs[: merged.has_base], *(merged.inputs[merged.has_base + i] for i in kept)),
        settings={
            name: tuple(value[i] for i in kept) if name in own else value for name, value in merged.settings.items()
        },
        place=replace(merged.place, models=tuple(merged.place.models[i] for i in kept)),
        factors=tuple(merged.factors[i] for i in kept) if merged.factors else (),
    )
