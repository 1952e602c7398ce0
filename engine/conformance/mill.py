"""Runs a method on one tensor as a worker does: stored bytes, `Merged`, rounds of statistics, `merge_part`."""

import itertools
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.methods.contract import Method
from mergemill.engine.plan.memory import make_piece
from mergemill.engine.plan.values import OutputTensor, Part, Piece
from mergemill.engine.runs.tasks.piece import gather_piece
from mergemill.engine.runs.tasks.rounds import settle
from mergemill.engine.runs.tasks.task import merge_part
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.ranges import pin_file
from mergemill.engine.tensors.dtypes import NAMES, TORCH_DTYPES, compute_dtype, item_bytes
from mergemill.engine.tensors.expressions import Stored
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.rounds import find_round
from mergemill.engine.tensors.slabs import SLAB, Span, cut_evenly
from mergemill.engine.tensors.workspace import Arena

Settings = Mapping[str, Any]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Task:
    """One merge of one tensor."""

    method: str | Method  # a built-in's name
    inputs: tuple[Tensor, ...]  # the base, where the method takes one, comes first
    settings: Settings
    tensor: str = "model.layers.3.mlp.up_proj.weight"
    seed: int = 7
    models: tuple[int, ...] | None = None  # each model's place in the recipe; by default in order
    optional_base: bool = False  # of a method that takes one or none: whether the first of the inputs is one

    @property
    def kernel(self) -> Method:
        """The method itself."""
        return get_method(self.method) if isinstance(self.method, str) else self.method

    @property
    def has_base(self) -> bool:
        """Whether the first of the inputs is a base beside the models."""
        return self.optional_base or self.kernel.base == "required"

    @property
    def places(self) -> tuple[int, ...]:
        """The place of each model in the recipe."""
        first = int(self.has_base)
        return self.models or tuple(range(first, len(self.inputs)))

    def arrays(self) -> list[Array]:
        """Return the inputs as float64, for an oracle."""
        return [np.asarray(tensor.double().numpy()) for tensor in self.inputs]


def fill_settings(method: Method, given: Settings, models: int) -> Settings:
    """Return `given` with the method's defaults, as the planner resolves them."""
    unknown = set(given) - {parameter.name for parameter in method.parameters}
    assert not unknown, f"{method.name} has no parameter {unknown}"
    filled: dict[str, Any] = {}
    for parameter in method.parameters:
        default = (parameter.default,) * models if parameter.per_model else parameter.default
        value = given.get(parameter.name, default)
        assert not parameter.required or parameter.name in given, f"{method.name} needs {parameter.name}"
        filled[parameter.name] = value[:models] if parameter.per_model else value
    return filled


def make_values(
    shape: Sequence[int], *, dtype: torch.dtype = torch.float32, count: int = 4, seed: int = 1
) -> list[Tensor]:
    """Return `count` tensors as of a base and its fine-tunes: close together, heavy-tailed differences."""
    stream = np.random.default_rng([seed, *shape])
    base = stream.standard_normal(shape)
    others = [base + 0.1 * stream.standard_t(4, shape) for _ in range(count - 1)]
    return [torch.from_numpy(np.asarray(values)).to(dtype) for values in (base, *others)]


class Roomy(Workplace):
    """Lends `room_bytes`, enough for slabs of any size, full of NaN: what is used unwritten shows."""

    def __init__(self, memory_bytes: int) -> None:
        super().__init__(memory_bytes, 1)
        self.room_bytes = 0
        self._arena: Arena = np.empty(0, np.uint8)

    @contextmanager
    def lend(self, size_bytes: int, beside_bytes: int = 0) -> Iterator[Arena]:
        """Lend all the room there is."""
        if len(self._arena) < self.room_bytes:
            self._arena = self._map(self.room_bytes)
        arena = self._arena[: self.room_bytes]
        arena.fill(0xFF)
        yield arena


class Mill:
    """Runs tasks as a worker does, over files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._keeping, self._streaming = Roomy(1 << 30), Roomy(0)

    def store(self, tensors: Sequence[Tensor]) -> tuple[Stored, ...]:
        """Write `tensors` into one new file, with other bytes around them."""
        path = self._folder / f"stored-{next(self._numbers)}.bin"
        places: list[tuple[int, Tensor]] = []
        with open(path, "wb") as file:
            for tensor in tensors:
                file.write(b"\xff" * 24)
                places.append((file.tell(), tensor))
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            file.write(b"\xff" * 24)
        pin = pin_file(path)
        return tuple(Stored(pin, at, NAMES[x.dtype], tuple(x.shape)) for at, x in places)

    def express(self, task: Task) -> Merged:
        """Return the task as an expression over a new file."""
        stored = self.store(task.inputs)
        method, shape = task.kernel, stored[0].shape
        place = Place(task.tensor, shape, task.seed, task.places, block=method.block(shape, task.settings))
        dtype = compute_dtype(source.dtype for source in stored)
        return Merged(method, stored, task.has_base, task.settings, place, dtype)

    def merge(
        self, task: Task, *, out: str | None = None, slab: int = SLAB, parts: int = 1, keep: bool = True
    ) -> Tensor:
        """Return the task's result as dtype `out` (None: that of the accumulation)."""
        return self.run(self.express(task), out=out, slab=slab, parts=parts, keep=keep)

    def run(
        self,
        expression: Merged,
        *,
        out: str | None = None,
        slab: int = SLAB,
        parts: int = 1,
        keep: bool = True,
    ) -> Tensor:
        """Return what the expression's parts write, each gathered and merged by itself."""
        workplace = self._keeping if keep else self._streaming
        # Every tensor that is read as stored and decoded, and each result; and what aligning them and whole chunks add.
        slots = 3 * sum(1 for _ in expression.reads(Span(0, 1))) + 2
        workplace.room_bytes = slots * (expression.size * item_bytes(expression.dtype) + 4096)
        tensor = OutputTensor(expression.place.tensor, out or expression.dtype, expression)
        pieces = cut_pieces(tensor, parts)
        totals: list[Partial] = []
        while not pieces[0].whole and find_round(settle(tensor), totals) is not None:
            partials = [gather_piece(pickled(piece), totals, workplace, slab) for piece in pieces]
            random.Random(len(totals)).shuffle(partials)
            totals.append(pickled(reduce(add_partials, partials, ())))
        assert len(totals) <= expression.count_rounds()[1], "more rounds than the method declares"
        data = bytearray(prod(expression.shape) * item_bytes(tensor.dtype))

        def sink(offset: int, piece: memoryview) -> None:
            data[offset : offset + len(piece)] = piece

        for number, piece in enumerate(pieces):
            size = piece.span.size * item_bytes(tensor.dtype)
            part = Part(number, 0, piece.offset_bytes, piece.offset_bytes + size, (pickled(piece),))
            merge_part(part, "shard", sink, {tensor.name: totals} if totals else {}, workplace, slab)
        kind = TORCH_DTYPES[tensor.dtype]
        return (
            torch.frombuffer(data, dtype=kind).view(expression.shape)
            if data
            else torch.empty(expression.shape, dtype=kind)
        )


def cut_pieces(tensor: OutputTensor, parts: int) -> list[Piece]:
    """Cut a tensor into at most `parts` pieces at multiples of its block."""
    size, block = prod(tensor.expression.shape), tensor.expression.block
    spans = cut_evenly(size, -(-size // (parts * block)) * block, block) if parts > 1 else [Span(0, size)]
    item = item_bytes(tensor.dtype)
    return [make_piece(tensor, span, span.start * item, whole=len(spans) == 1) for span in spans]


def pickled(value: Any) -> Any:
    """Return `value` as it arrives on a worker."""
    return pickle.loads(pickle.dumps(value))


def bits_of(tensor: Tensor) -> bytes:
    """Return the tensor's bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
