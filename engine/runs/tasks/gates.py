"""The task that computes gates: a forward pass of the base model by what its expressions give, and a file of gates.

The file is a safetensors file: ``layers.{i}.gate`` [experts, hidden] and ``layers.{i}.shared_gate`` [1, hidden], in
float32, with the routing report in its metadata. It is kept with the output, and taken by ``gate_mode: file``.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mergemill.engine.checkpoint.header import parse_header
from mergemill.engine.checkpoint.layout import TensorInfo, file_order, make_header
from mergemill.engine.errors import RunError
from mergemill.engine.forward.gates import GatesFound, find_gates
from mergemill.engine.forward.layers import ModelWeights, Pass
from mergemill.engine.forward.report import make_report
from mergemill.engine.plan.gates import EMBEDDING, GateJob, name_gate
from mergemill.engine.plan.values import Part, Piece
from mergemill.engine.runs.tasks.piece import merge_piece
from mergemill.engine.runs.worker.modes import own_modes
from mergemill.engine.runs.worker.workplace import Counts, Workplace
from mergemill.engine.storage.ranges import check_pin
from mergemill.engine.tensors.drawn import Given
from mergemill.engine.tensors.expressions import Leaf
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.slabs import SLAB, Span
from mergemill.engine.tensors.workspace import Arena, Workspace

Values = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]
_REPORT = "mergemill.routing"  # in the metadata


@own_modes()
def compute_gates(job: GateJob, workplace: Workplace) -> bytes:
    """Return the file of gates; a layer is read module by module where the worker has too little for all of it."""
    leafwise = job.arena_bytes + job.layer_bytes > workplace.memory_bytes
    beside_bytes = job.leaf_bytes if leafwise else job.layer_bytes
    stop = "routers" if job.asked.mode == "router_input" else "inputs"
    with workplace.lend(job.arena_bytes, beside_bytes) as arena:
        weights = ModelWeights(
            functools.partial(_read, job, arena, workplace), functools.partial(_read_rows, job, arena, workplace)
        )
        how = Pass(stop, leafwise)  # type: ignore[arg-type]
        found = find_gates(json.loads(job.config_text), weights, job.asked, EMBEDDING, how)
    for pin in dict.fromkeys(job.pins):
        check_pin(pin, workplace.storage)
    return write_gates(job, found)


def write_gates(job: GateJob, found: GatesFound) -> bytes:
    """Return gates as a safetensors file."""
    rows = found.rows.astype("<f4")
    values = {name_gate(layer): rows[layer, : job.asked.routed] for layer in range(job.layers)}
    if len(job.asked.positive) > job.asked.routed:
        values |= {name_gate(layer, shared=True): rows[layer, job.asked.routed :] for layer in range(job.layers)}
    infos = file_order(TensorInfo(name, "F32", each.shape) for name, each in values.items())
    report = json.dumps(make_report(found, job.asked, job.chosen))
    header = make_header(infos, {"format": "pt", _REPORT: report})
    return header + b"".join(values[info.name].tobytes() for info in infos)


def read_gates(data: bytes, where: str) -> tuple[Values, dict[str, Any]]:
    """Return the gates of a file by their names, and the routing report; `HeaderError` for one that is damaged."""
    header = parse_header(data, file_bytes=len(data), where=where)
    values = {}
    for info, start_bytes in zip(header.tensors, header.offsets_bytes, strict=True):
        values[info.name] = np.frombuffer(data, "<f4", info.elements, start_bytes).reshape(info.shape)
    return values, json.loads(header.metadata[_REPORT])


def put_gates(part: Part, values: Values) -> Part:
    """Return a part with the gates that its routers are."""
    return replace(part, pieces=tuple(_put(piece, values) for piece in part.pieces))


def _put(piece: Piece, values: Values) -> Piece:
    given = piece.tensor.expression
    if not isinstance(given, Given):
        return piece
    return piece._replace(tensor=piece.tensor._replace(expression=given.put(values[given.name])))


def _read(job: GateJob, arena: Arena, workplace: Workplace, name: str, out: Tensor) -> None:
    """Fill in a tensor, made by its expression slab by slab; `RunError` where the model's code wants another."""
    piece = job.tensors.get(name)
    shape = None if piece is None else piece.tensor.expression.shape
    if piece is None or shape != tuple(out.shape):
        has = "has none" if shape is None else f"has {list(shape)}"
        raise RunError(f"the model's code takes {name} of shape {list(out.shape)}, and the base model {has}")
    flat = out.view(-1).numpy()
    for span, values in _merge(piece, arena, workplace):
        flat[span.start : span.stop] = values


def _read_rows(job: GateJob, arena: Arena, workplace: Workplace, name: str, rows: Sequence[int]) -> Tensor:
    """Return some rows of a matrix; of one that has rounds all are made, and few kept."""
    piece = job.tensors[name]
    columns = piece.tensor.expression.shape[1]
    made = torch.empty((len(rows), columns), dtype=torch.float32)
    wanted = {row: place for place, row in enumerate(rows)}
    flat = made.numpy()
    spans = [piece.span] if piece.projected.most_rounds else _find_spans(piece, sorted(wanted), columns)
    for part in spans:
        for span, values in _merge(piece._replace(span=part, whole=part == piece.span), arena, workplace):
            for row in range(span.start // columns, -(-span.stop // columns)):
                if row in wanted:
                    low, high = max(row * columns, span.start), min((row + 1) * columns, span.stop)
                    here = flat[wanted[row], low - row * columns : high - row * columns]
                    here[:] = values[low - span.start : high - span.start]
    return made


def _find_spans(piece: Piece, rows: Sequence[int], columns: int) -> list[Span]:
    """Return spans of whole blocks that hold these rows; of a tensor that is there, the rows alone."""
    expression = piece.tensor.expression
    block = columns if isinstance(expression, Leaf) else expression.block
    spans: list[Span] = []
    for row in rows:
        start = row * columns // block * block
        stop = min(-(-(row + 1) * columns // block) * block, expression.size)
        if spans and start <= spans[-1].stop:
            spans[-1] = Span(spans[-1].start, max(stop, spans[-1].stop))
        else:
            spans.append(Span(start, stop))
    return spans


def _merge(
    piece: Piece, arena: Arena, workplace: Workplace
) -> Iterator[tuple[Span, np.ndarray[Any, np.dtype[np.float32]]]]:
    with Workspace(arena, storage=workplace.storage, cache=workplace.cache) as work:
        for span, data in merge_piece(piece, {}, work, workplace, SLAB):
            yield span, data.view("<f4")
        workplace.count(Counts(work.read_bytes))
