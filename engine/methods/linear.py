"""Linear: the weighted sum of the models, or their weighted average.

Source: Wortsman et al., "Model soups", arXiv:2203.05482, section 2.

For: fine-tunes of one run or one recipe; the first thing to try, and what others must beat.

Evidence: CLIP, ViT, BERT and T5 (the source); LLMs of 2 to 9B in MergeBench, arXiv:2505.10833.
"""

from collections.abc import Sequence

from mergemill.engine.methods.contract import PerModel, merge_method, say_number
from mergemill.engine.methods.sums import sum_weighted
from mergemill.engine.tensors import native
from mergemill.engine.tensors.device import divide_
from mergemill.engine.tensors.fusion import Fusion, Join
from mergemill.engine.tensors.lazy import Tensor


def _weights_cancel(*, weight: Sequence[float], normalize: bool) -> str | None:
    if normalize and abs(sum(weight)) < 1e-8:
        return f"the weights {', '.join(map(say_number, weight))} sum to zero; with normalize they must not"
    return None


def _fuse(weight: Sequence[float], normalize: bool) -> Fusion:
    return Fusion(Join("sum", tuple(weight), sum(weight) if normalize else 0.0))


@merge_method(reads="element", check=_weights_cancel, fused=_fuse, unread_at_zero="weight")
def linear(models: list[Tensor], *, weight: PerModel[float], normalize: bool = True) -> Tensor:
    """Return ``sum(weight[i] * models[i])``, divided by ``sum(weight)`` with `normalize`.

    Shapes: every model ``[n]``; the result ``[n]``.
    """
    if native.suits(*models):
        return native.combine(models, weight, sum(weight) if normalize else 0.0)
    result = sum_weighted(models, weight)
    return divide_(result, sum(weight)) if normalize else result
