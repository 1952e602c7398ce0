"""What a plan says first: the dtype that is written and why, and whose config and tokenizer the output has."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.plan.values import OutputTensor, Plan
from mergemill.engine.recipe import ModelRef, Recipe
from mergemill.engine.tensors.dtypes import is_mergeable, item_bytes


def describe_donor(recipe: Recipe, models: Sequence[str]) -> str:
    """Say whose config and tokenizer the output has, with the recipe's word for why."""
    base = recipe.base_model
    donor = f"{base}, the base model" if base is not None else f"{models[0]}, the first model"
    source = recipe.tokenizer.source if recipe.tokenizer is not None else None
    other = isinstance(source, ModelRef) and str(source) != (models[0] if base is None else str(base))
    return f"{donor}; tokenizer of {source}" if other else donor


def describe_choice(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> str:
    """Say why tensors are written in their dtypes."""
    chosen = next((key for key in ("out_dtype", "dtype") if getattr(recipe, key) is not None), "")
    if chosen:
        return f"as {chosen} says"
    stored = sorted({dtype for each in checkpoints.values() if (dtype := _find_main(each))})
    return f"which holds {' and '.join(stored)}" if len(stored) > 1 else "as the models are stored"


def find_dtypes(plan: Plan) -> str:
    """Return the dtypes that are written, those of most bytes first, and why."""
    sizes: Counter[str] = Counter()
    for part in plan.parts:
        for piece in part.pieces:
            dtypes = dict.fromkeys(info.dtype for info in piece.tensor.infos)  # a weight's and its scales'
            sizes[" with ".join(dtypes)] += piece.span.size * item_bytes(piece.tensor.dtype)
    written = ", ".join(sorted(sizes, key=lambda dtype: (-sizes[dtype], dtype))) or "none"
    return f"{written}, {plan.dtype_from}" if plan.dtype_from else written


def warn_of_dtypes(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], tensors: Sequence[OutputTensor], *, where: str
) -> list[str]:
    """Return a warning where no dtype is given and the models are stored in several."""
    if recipe.dtype is not None or recipe.out_dtype is not None:
        return []
    stored = {name: dtype for name, each in checkpoints.items() if (dtype := _find_main(each))}
    if len(set(stored.values())) < 2:
        return []
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += prod(tensor.expression.shape)
    written = max(sizes, key=lambda dtype: (sizes[dtype], dtype), default="")
    named = ", ".join(f"{name} in {dtype}" for name, dtype in stored.items())
    return [
        f"{where}: the models are stored in several dtypes ({named}); most is written in {written}; 'dtype' chooses"
    ]


def _find_main(checkpoint: Checkpoint) -> str:
    """Return the floating dtype of most of a model's bytes."""
    sizes: Counter[str] = Counter()
    for stored in checkpoint.tensors.values():
        if is_mergeable(stored.dtype):
            sizes[stored.dtype] += stored.nbytes
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype), default="")
