"""NearSwap: take over the other model's elements where they are near the base's.

Source: alchemonaut, "QuartetAnemoi-70B", model card, 2024; https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.

For: one model, of which only what is near the base is to be taken over.

Evidence: none known.
"""

from mergemill.engine.methods.contract import merge_method
from mergemill.engine.tensors.fusion import Fusion, Join
from mergemill.engine.tensors.lazy import Tensor

_LEAST_DISTANCE = 1e-6


def _fuse(t: float) -> Fusion:
    return Fusion(Join("near", (), threshold=t))


@merge_method(reads="element", base="required", inputs=(1, 1), fused=_fuse)
def nearswap(base: Tensor, deltas: list[Tensor], *, t: float) -> Tensor:
    """Return ``base + r · D`` with ``r = clip(t / max(|D|, 1e-6), 0, 1)``: no element moves by more than `t`.

    Shapes: both ``[n]``; the result ``[n]``.
    """
    (delta,) = deltas
    share = delta.abs().clamp_(min=_LEAST_DISTANCE).reciprocal_().mul_(t).clamp_(0, 1)
    return base.add_(delta.mul_(share))
