"""Passthrough: one model's tensor as it is, or scaled.

Source: layer stacking ("frankenmerging"); without a scale the plan copies the stored bytes and calls no kernel.

For: one model's tensors as they are, and layers of several stacked.

Evidence: stacks that were trained on, as SOLAR 10.7B, arXiv:2312.15166; none for stacks as they are.
"""

from mergemill.engine.methods.contract import PerModel, merge_method
from mergemill.engine.tensors.lazy import Tensor


@merge_method(reads="element", inputs=(1, 1))
def passthrough(models: list[Tensor], *, scale: PerModel[float | None] = (None,)) -> Tensor:
    """Return ``scale * models[0]``. Shapes: ``[n]`` to ``[n]``."""
    (factor,) = scale
    return models[0] if factor is None else models[0].mul_(factor)
