"""What a method would take of a worker for models like one that is there, from its headers alone."""

from dataclasses import dataclass
from typing import Any

from mergemill.engine.checkpoint.checkpoint import open_checkpoint
from mergemill.engine.checkpoint.weights import StoredTensor
from mergemill.engine.errors import PlanError
from mergemill.engine.methods.contract import Method, Parameter
from mergemill.engine.plan.alike import copies_input
from mergemill.engine.plan.draft import SHARD_SIZE
from mergemill.engine.plan.fill import say_count
from mergemill.engine.plan.layout import make_layout
from mergemill.engine.plan.memory import stream_bytes
from mergemill.engine.plan.values import OutputTensor
from mergemill.engine.tensors.dtypes import TORCH_DTYPES, compute_dtype, is_mergeable
from mergemill.engine.tensors.expressions import Agreed, Expression, Stored
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.slabs import BLOCK

USUAL_MODELS = 2  # beside a base, where nobody says how many


@dataclass(frozen=True, slots=True)
class Cost:
    """The memory of a merge of equally large models, and how often it reads them."""

    models: int  # merged, beside a base
    base: bool  # whether there is one besides
    tensor: str  # the largest that is merged
    dtype: str
    shape: tuple[int, ...]
    parts: int  # over which it is cut
    slab: str  # what is in memory of it at once, if not a few blocks: "row" or "tensor"; else "block"
    passes: int  # over its inputs, at most
    stream_bytes: int  # for it, when every pass reads the inputs
    keep_bytes: int | None  # for it, when they are read once and kept; None where one pass will do, or it is cut
    least_tensor: str  # the one that takes most memory
    least_bytes: int  # the least `--memory` with which the whole merge runs


def estimate_cost(method: Method, model: str, *, models: int | None = None) -> Cost:
    """Return what `method` takes for `models` models (beside the base) like the one at `model`, written in its dtypes.

    Parameters have their defaults. Raises `PlanError` where the method does not take so many, or the model holds
    nothing to merge, and `CheckpointError` where there is none.
    """
    count = _check_count(method, models)
    stored = [tensor for tensor in open_checkpoint(model).tensors.values() if tensor.dtype in TORCH_DTYPES]
    tensors = [OutputTensor(tensor.name, tensor.dtype, _express(method, tensor, count)) for tensor in stored]
    merged = [tensor for tensor, source in zip(tensors, stored, strict=True) if is_mergeable(source.dtype)]
    if not merged:
        raise PlanError(f"{model}: holds no tensor that could be merged")
    _, parts = make_layout(tensors, SHARD_SIZE)
    largest = max(merged, key=lambda tensor: tensor.expression.size)
    pieces = [piece for part in parts for piece in part.pieces if piece.tensor is largest]
    worst = max(parts, key=stream_bytes)
    passes = 1 + (method.most_rounds if largest.expression.is_merged else 0)
    return Cost(
        models=count,
        base=_has_base(method),
        tensor=largest.name,
        dtype=largest.dtype,
        shape=largest.expression.shape,
        parts=len(pieces),
        slab=_name_slab(largest.expression),
        passes=passes,
        stream_bytes=max(piece.projected.slab_bytes for piece in pieces),
        keep_bytes=pieces[0].projected.keep_bytes if passes > 1 and pieces[0].whole else None,
        least_tensor=max(worst.pieces, key=lambda piece: piece.projected.slab_bytes).tensor.name,
        least_bytes=stream_bytes(worst),
    )


def _check_count(method: Method, models: int | None) -> int:
    least, most = method.least_inputs, method.most_inputs
    count = models if models is not None else max(least, USUAL_MODELS if most is None else min(most, USUAL_MODELS))
    if count < least or (most is not None and count > most):
        raise PlanError(f"{method.name} takes {say_count(method)}; {count} were asked for")
    return count


def _has_base(method: Method) -> bool:
    return method.base in ("required", "optional")


def _express(method: Method, tensor: StoredTensor, count: int) -> Expression:
    """Return the tensor merged with itself, or as it is where it is only copied."""
    stored = Stored(tensor.file, tensor.offset_bytes, tensor.dtype, tensor.shape)
    inputs = (stored,) * (count + _has_base(method))
    if not is_mergeable(tensor.dtype):
        return Agreed(tensor.name, inputs, ("",) * len(inputs))
    settings = {parameter.name: _choose(parameter, count) for parameter in method.parameters}
    if copies_input(method, settings):
        return stored
    place = Place(tensor.name, tensor.shape, 0, tuple(range(count)), block=method.block(tensor.shape, settings))
    return Merged(method, inputs, _has_base(method), settings, place, compute_dtype([tensor.dtype]))


def _choose(parameter: Parameter, count: int) -> Any:
    """Return the default; for a parameter that has none, what it can be."""
    value = parameter.default
    if parameter.required:
        within = parameter.within
        value = parameter.kind(1 if within is None or within.holds(1) else within.least or within.most or 0)
    return (value,) * count if parameter.per_model else value


def _name_slab(expression: Expression) -> str:
    if expression.block == BLOCK:
        return "block"
    return "tensor" if expression.block >= expression.size else "row"
