"""Fisher merging: the average in which every element of every model weighs as much as it matters there.

Source: Matena and Raffel, "Merging models with Fisher-weighted averaging", arXiv:2111.09832, section 3, equation 6. An
element that matters to no model, which the paper leaves open, is averaged by the weights alone.

For: fine-tunes of one model, of which the diagonal of the Fisher information or another importance is known.

Evidence: BERT, RoBERTa, T5 and CLIP-like vision models (the source).
"""

from collections.abc import Sequence

from mergemill.engine.errors import MergeError
from mergemill.engine.methods.contract import PerModel, merge_method, say_number
from mergemill.engine.methods.linear import linear
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place


def weigh_in(*, weight: Sequence[float]) -> str | None:
    """Return what is wrong with the weights of a mean in which nothing may cancel."""
    if any(each < 0 for each in weight) or not sum(weight):
        return f"the weights {', '.join(map(say_number, weight))} must not be negative, and one must be more than 0"
    return None


# The largest importance, the sums of what is weighted and of the weights, and what is compared.
@merge_method(reads="element", check=weigh_in, extra_slabs=6)
def fisher(
    models: list[Tensor], importances: list[Tensor] | None, place: Place, *, weight: PerModel[float] = (1.0,)
) -> Tensor:
    """Return ``Σ wᵢFᵢθᵢ / Σ wᵢFᵢ``, F `importances`; ``Σ wᵢθᵢ / Σ wᵢ`` where that divides by 0, or there are none.

    Shapes: all ``[n]``. `MergeError` where an importance is negative or not finite.
    """
    if importances is None:
        return linear(models, weight=weight)
    check_importances(importances, place)
    largest = importances[0].clone()
    for each in importances[1:]:
        torch.maximum(largest, each, out=largest)
    nobody = largest == 0
    largest.masked_fill_(nobody, 1.0)
    total, divisor = torch.zeros_like(largest), torch.zeros_like(largest)
    for model, importance, w in zip(models, importances, weight, strict=True):
        importance.div_(largest).masked_fill_(nobody, 1.0).mul_(w)  # shares, so that no product leaves the range
        divisor.add_(importance)
        total.add_(model.mul_(importance))
    return total.div_(divisor)


def check_importances(importances: list[Tensor], place: Place) -> None:
    """Raise `MergeError` where an importance is less than nothing, or no number."""
    for number, each in enumerate(importances, start=1):
        if not bool(((each >= 0) & (each < float("inf"))).all()):
            raise MergeError(
                f"{place.tensor}: the importance of model {number} has elements below 0 or not finite; give what is "
                f"squared or absolute, such as the diagonal of the Fisher information"
            )
