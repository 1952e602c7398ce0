"""Merging tensors that are in memory already, by the kernels, slabs and settings of a merge of files.

What comes out has the bytes that a recipe's merge of the same tensors writes, where the base is not listed among the
recipe's models. The results are new tensors on the CPU, without gradients; the inputs may lie on any device, with any
strides, and are not changed. Beside inputs and result, no more is taken than a few slabs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.alike import copies_input
from mergemill.engine.plan.memory import make_piece
from mergemill.engine.plan.settings import Site, resolve_settings
from mergemill.engine.plan.values import OutputTensor, Piece
from mergemill.engine.runs.request import MethodOrName, Request, find_method, make_request
from mergemill.engine.runs.tasks.piece import merge_piece
from mergemill.engine.runs.worker.modes import own_modes
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.tensors.dtypes import (
    NAMES,
    TORCH_DTYPES,
    compute_dtype,
    is_mergeable,
    item_bytes,
    promote,
)
from mergemill.engine.tensors.expressions import Agreed, Expression, Held
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace

StateDict = Mapping[str, Tensor]


def merge_tensors(
    tensors: Sequence[Tensor],
    method: MethodOrName,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    name: str = "tensor",
    **parameters: Any,
) -> Tensor:
    """Return the merge of `tensors`, one of each model, all ``[*S]``: a new tensor ``[*S]`` of their common dtype.

    method: a name as in a recipe, or a decorated function. base: the base model's tensor; a method that merges the
    base with one other (slerp) also takes it as the first of two tensors. seed, name: what the masks of random methods
    hang on, as on a recipe's seed and the output tensor's name. parameters: as in a recipe, where a trailing
    underscore keeps Python's words free (``lambda_``); one that each model has its own of is a number for all, or a
    sequence of one for each. Raises `PlanError` where the arguments do not go together, `MergeError` where integer
    tensors differ.
    """
    where = "merge_tensors"
    request = make_request(tensors, find_method(method), base, parameters, seed=seed, dtype=None, where=where)
    piece = _make_piece(name, [*request.inputs], request)
    with _lent([piece]) as workplace:
        return _merge(piece, workplace)


def merge_state_dicts(
    models: Sequence[StateDict | torch.nn.Module],
    method: MethodOrName,
    *,
    base: StateDict | torch.nn.Module | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Return the merge of whole models, tensor by tensor, in the order of the first one's names.

    models: state dicts, or modules, of which the parameters and persistent buffers are taken; all have the same names
    and shapes. dtype: of the result; None is what each tensor's inputs promote to. Tensors that are not floating are
    copied where all models agree. Names that share one tensor in every model share it in the result. The rest is as in
    `merge_tensors`.
    """
    where = "merge_state_dicts"
    given = [_state(model, where) for model in models]
    base = None if base is None else _state(base, where)
    request = make_request(given, find_method(method), base, parameters, seed=seed, dtype=dtype, where=where)
    _check_names(request)
    inputs = {name: [state[name] for state in request.inputs] for name in request.inputs[0]}
    pieces = {name: _make_piece(name, tensors, request) for name, tensors in inputs.items()}
    merged: dict[tuple[object, ...], Tensor] = {}
    result: dict[str, Tensor] = {}
    with _lent(list(pieces.values())) as workplace:
        for name, piece in pieces.items():
            key = tuple(_identity(tensor) for tensor in inputs[name])
            if key not in merged:
                merged[key] = _merge(piece, workplace)
            result[name] = merged[key]
    return result


def _state(model: StateDict | torch.nn.Module, where: str) -> StateDict:
    if isinstance(model, torch.nn.Module):
        return model.state_dict()
    if isinstance(model, Mapping):
        return model
    raise PlanError(f"{where}: a model is a {type(model).__name__}; it must be a state dict or a torch.nn.Module")


def _check_names(request: Request[StateDict]) -> None:
    for name in {name: None for state in request.inputs for name in state}:
        has = [model for model, state in zip(request.names, request.inputs, strict=True) if name in state]
        if len(has) < len(request.names):
            lack = [model for model in request.names if model not in has]
            raise PlanError(
                f"{request.where}: tensor {name} is in {', '.join(has)} but not in {', '.join(lack)}; "
                f"only models with the same tensors can be merged"
            )


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Return what is equal for tensors that are the same elements of the same memory."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _make_piece(name: str, tensors: Sequence[Tensor], request: Request[Any]) -> Piece:
    """Return a whole output tensor to be merged from `tensors`."""
    for tensor, model in zip(tensors, request.names, strict=True):
        _check_tensor(tensor, f"{request.where}: tensor {name} of {model}")
    first = tuple(tensors[0].shape)
    for tensor, model in zip(tensors, request.names, strict=True):
        if tuple(tensor.shape) != first:
            raise PlanError(
                f"{request.where}: tensor {name}: {request.names[0]} has shape {list(first)}, "
                f"{model} {list(tensor.shape)}; shapes must match"
            )
    expression, dtype = _make_expression(name, tuple(Held(tensor) for tensor in tensors), request)
    return make_piece(OutputTensor(name, dtype, expression), Span(0, math.prod(first)), 0, whole=True)


def _check_tensor(tensor: object, where: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise PlanError(f"{where} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if tensor.dtype not in NAMES or tensor.layout != torch.strided or tensor.is_meta:
        kind = f"{tensor.dtype}, {tensor.layout}" + (", without values" if tensor.is_meta else "")
        raise PlanError(f"{where} is {kind}; it cannot be merged or copied")


def _make_expression(name: str, held: tuple[Held, ...], request: Request[Any]) -> tuple[Expression, str]:
    """As the planner fills a slot from files: floating tensors are merged, others must agree."""
    dtypes = [source.dtype for source in held]
    if not all(is_mergeable(dtype) for dtype in dtypes):
        if len(set(dtypes)) > 1:
            raise PlanError(
                f"{request.where}: tensor {name} is {', '.join(dtypes)}; "
                f"a buffer that is not floating must have one dtype in all models"
            )
        return Agreed(name, held, request.names), dtypes[0]
    method, shape, models = request.method, held[0].shape, request.names[request.has_base :]
    own = [(model.removeprefix("model "), name, own) for model, own in zip(models, request.own, strict=True)]
    settings = resolve_settings(method, Site(name, 0.0, (request.shared,)), own, where=request.where)
    dtype = request.dtype or promote(dtypes)
    if copies_input(method, settings):
        return held[0], dtype
    place = Place(name, shape, request.seed, request.places, block=method.block(shape, settings))
    wide = ["F64"] if request.dtype == "F64" else []
    return Merged(method, held, request.has_base, settings, place, compute_dtype([*dtypes, *wide])), dtype


def _merge(piece: Piece, workplace: Workplace) -> Tensor:
    """Return the piece's tensor, merged slab by slab as a worker does."""
    tensor, item = piece.tensor, item_bytes(piece.tensor.dtype)
    result = torch.empty(tensor.expression.shape, dtype=TORCH_DTYPES[tensor.dtype])
    data = result.view(-1).view(torch.uint8).numpy()
    with torch.no_grad(), workplace.lend(piece.projected.slab_bytes) as arena:
        for span, merged in merge_piece(piece, {}, Workspace(arena), workplace):
            data[span.start * item : span.stop * item] = merged
    return result


@contextmanager
def _lent(pieces: Sequence[Piece]) -> Iterator[Workplace]:
    """Yield the memory that the largest of `pieces` takes; with the modes of a worker, but for torch's threads.

    These are one, as a worker's, where a matrix method asks LAPACK, whose last bits hang on their number.
    """
    matrix = any(piece.tensor.expression.takes_matrices for piece in pieces)
    with own_modes(one_thread=matrix):
        yield Workplace(max((piece.projected.slab_bytes for piece in pieces), default=0), 1)
