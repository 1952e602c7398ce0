"""One suite for all methods: how each is called, what must come out (`ENTRIES`), and a harness (`Mill`).

The harness runs a method as a worker does: stored bytes, `Merged`, rounds of statistics, `merge_part`.
No pytest here, so that a script can use it as well.
"""

import itertools
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import torch
from oracles import Array, Bools
from tensors.masks import random_mask
from torch import Tensor

from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.methods.contract import Method
from mergemill.engine.plan.values import OutputTensor, Part, Piece
from mergemill.engine.run.task import gather_piece, merge_part
from mergemill.engine.run.workplace import Workplace
from mergemill.engine.storage.ranges import pin_file
from mergemill.engine.tensors.dtypes import TORCH_DTYPES, compute_dtype, item_bytes
from mergemill.engine.tensors.expressions import Merged, Stored
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.slabs import BLOCK, SLAB, Span, cut_evenly

Settings = Mapping[str, Any]
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


# ------------------------------------------------------------------------------------- what a method is given
@dataclass(frozen=True, slots=True)
class Task:
    """One merge of one tensor."""

    method: str
    inputs: tuple[Tensor, ...]  # the base, where the method takes one, comes first
    settings: Settings
    tensor: str = "model.layers.3.mlp.up_proj.weight"
    seed: int = 7
    models: tuple[int, ...] | None = None  # each model's place in the recipe; by default in order

    @property
    def has_base(self) -> bool:
        """Whether the first of the inputs is a base beside the models."""
        return get_method(self.method).base == "required"

    @property
    def places(self) -> tuple[int, ...]:
        """The place of each model in the recipe."""
        first = int(self.has_base)
        return self.models or tuple(range(first, len(self.inputs)))


@dataclass(frozen=True, slots=True)
class Expected:
    """What the oracle says."""

    values: Array
    doubtful: Bools  # an elected sign hangs on the last bit of a sum there: either answer is right


@dataclass(frozen=True, slots=True)
class Entry:
    """How the suite calls one method; `variants` are settings for `models` models."""

    models: int
    variants: tuple[Settings, ...]  # the first is the one that most tests use
    oracle: Callable[[Task], Expected]
    symmetric: bool  # permuting the models with their parameters changes nothing
    random: bool = False
    equal: Settings | None = None  # with these, equal models give that model


def find_entry(name: str) -> Entry:
    """Return the method's entry; an AssertionError says to add one."""
    if name not in ENTRIES:
        raise AssertionError(
            f"merge method {name!r} is not in ENTRIES of tests/methods/suite.py; "
            f"add an entry: its settings, its oracle from tests/oracles.py, and which claims hold for it"
        )
    return ENTRIES[name]


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


def make_task(
    name: str,
    values: Sequence[Tensor],
    given: Settings | None = None,
    *,
    tensor: str = "model.layers.3.mlp.up_proj.weight",
    seed: int = 7,
    models: tuple[int, ...] | None = None,
) -> Task:
    """Return a task over as many of `values` as the method takes: its base first, then its models."""
    method, entry = get_method(name), find_entry(name)
    count = entry.models + int(method.base == "required")
    inputs = tuple(values[:count])
    settings = fill_settings(method, entry.variants[0] if given is None else given, entry.models)
    return Task(name, inputs, settings, tensor, seed, models)


def make_values(
    shape: Sequence[int], *, dtype: torch.dtype = torch.float32, count: int = 4, seed: int = 1
) -> list[Tensor]:
    """Return `count` tensors as of a base and its fine-tunes: close together, heavy-tailed differences."""
    stream = np.random.default_rng([seed, *shape])
    base = stream.standard_normal(shape)
    others = [base + 0.1 * stream.standard_t(4, shape) for _ in range(count - 1)]
    return [torch.from_numpy(np.asarray(values)).to(dtype) for values in (base, *others)]


# ------------------------------------------------------------------------------------------------ the harness
class Roomy(Workplace):
    """Lends `room_bytes`, enough for slabs of any size, full of NaN: what is used unwritten shows."""

    def __init__(self, memory_bytes: int) -> None:
        super().__init__(memory_bytes, 1)
        self.room_bytes = 0
        self._arena = torch.empty(0, dtype=torch.uint8)

    @contextmanager
    def lend(self, size_bytes: int) -> Iterator[Tensor]:
        if len(self._arena) < self.room_bytes:
            self._arena = torch.empty(self.room_bytes, dtype=torch.uint8)
        yield self._arena[: self.room_bytes].fill_(0xFF)


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
        place = Place(task.tensor, stored[0].shape, task.seed, task.places)
        dtype = compute_dtype(source.dtype for source in stored)
        return Merged(get_method(task.method), stored, task.has_base, task.settings, place, dtype)

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
        # Every input as stored and decoded, and the result; and what aligning them adds.
        slots, item = 2 * len(expression.inputs) + 2, item_bytes(expression.dtype)
        workplace.room_bytes = slots * (expression.place.size * item + 1024)
        tensor = OutputTensor(expression.place.tensor, out or expression.dtype, expression)
        pieces = cut_pieces(tensor, parts)
        totals: list[Partial] = []
        if not pieces[0].whole:
            for number in range(expression.rounds()):
                partials = [gather_piece(pickled(piece), totals, workplace, slab) for piece in pieces]
                random.Random(number).shuffle(partials)
                totals.append(pickled(reduce(add_partials, partials, ())))
            assert expression.advance(totals)[0] is None, "more rounds than the method declares"
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
    """Cut a tensor into at most `parts` pieces at multiples of a block."""
    size = prod(tensor.expression.shape)
    spans = cut_evenly(size, -(-size // (parts * BLOCK)) * BLOCK) if parts > 1 else [Span(0, size)]
    item = item_bytes(tensor.dtype)
    return [Piece(tensor, span, span.start * item, len(spans) == 1) for span in spans]


def pickled(value: Any) -> Any:
    """Return `value` as it arrives on a worker."""
    return pickle.loads(pickle.dumps(value))


def bits_of(tensor: Tensor) -> bytes:
    """Return the tensor's bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# ------------------------------------------------------------------------------------------------ the oracles
def as_arrays(task: Task) -> list[Array]:
    """Return the task's inputs as float64."""
    return [np.asarray(tensor.double().numpy()) for tensor in task.inputs]


def certain(values: Array) -> Expected:
    """Return an expectation without doubt."""
    return Expected(np.asarray(values), np.zeros(np.shape(values), bool))


def expect_linear(task: Task) -> Expected:
    return certain(oracles.linear(as_arrays(task), **task.settings))


def expect_slerp(task: Task) -> Expected:
    base, other = as_arrays(task)
    return certain(oracles.slerp(base, other, **task.settings))


def expect_passthrough(task: Task) -> Expected:
    (tensor,) = as_arrays(task)
    return certain(oracles.passthrough(tensor, scale=task.settings["scale"][0]))


def make_deltas(task: Task) -> list[Array]:
    """Return the task vectors, rounded as the engine's are, so that both rank the same magnitudes."""
    wide = any(tensor.dtype == torch.float64 for tensor in task.inputs)
    kind = torch.float64 if wide else torch.float32
    base, *others = (tensor.to(kind) for tensor in task.inputs)
    return [np.asarray((other - base).double().numpy()) for other in others]


def take_arguments(settings: Settings, *left_out: str) -> dict[str, Any]:
    """Return settings as Python's arguments."""
    return {{"lambda": "lambda_"}.get(key, key): v for key, v in settings.items() if key not in left_out}


def expect_task_arithmetic(task: Task) -> Expected:
    return certain(oracles.task_arithmetic(as_arrays(task)[0], make_deltas(task), **take_arguments(task.settings)))


def expect_ties(task: Task) -> Expected:
    deltas = make_deltas(task)
    values = oracles.ties(as_arrays(task)[0], deltas, **take_arguments(task.settings))
    masks = [oracles.find_largest(x, share) for x, share in zip(deltas, task.settings["density"], strict=True)]
    return Expected(values, doubt_signs(task, deltas, masks))


def make_masks(task: Task) -> list[Bools]:
    """Return what each model of a random method keeps."""
    return [
        random_mask(x.numel(), share, seed=task.seed, model=model, tensor=task.tensor).reshape(tuple(x.shape))
        for x, share, model in zip(task.inputs[1:], task.settings["density"], task.places, strict=True)
    ]


def expect_dare_linear(task: Task) -> Expected:
    arguments = take_arguments(task.settings, "density")
    return certain(oracles.dare_linear(as_arrays(task)[0], make_deltas(task), masks=make_masks(task), **arguments))


def expect_dare_ties(task: Task) -> Expected:
    arguments, deltas, masks = take_arguments(task.settings, "density"), make_deltas(task), make_masks(task)
    values = oracles.dare_ties(as_arrays(task)[0], deltas, masks=masks, **arguments)
    return Expected(values, doubt_signs(task, deltas, masks))


def doubt_signs(task: Task, deltas: Sequence[Array], masks: Sequence[Bools]) -> Bools:
    """Return where the weighted deltas cancel but for rounding, so that the elected sign is anybody's."""
    sparse = oracles.sparsify(deltas, masks, rescale=task.settings["rescale"])
    weighted = np.array([w * x for w, x in zip(task.settings["weight"], sparse, strict=True)])
    return np.asarray((np.abs(weighted.sum(0)) < 1e-6 * np.abs(weighted).sum(0)) & (np.abs(weighted).sum(0) > 0))


# -------------------------------------------------------------------------------------------------- the table
WEIGHTS = (1.0, 0.6, 0.3)
SPARSE = (
    {"weight": WEIGHTS, "density": (0.5, 0.3, 0.9), "rescale": True, "normalize": True},
    {"weight": WEIGHTS, "density": (0.3, 0.3, 0.3), "rescale": False, "normalize": False},
    {
        "weight": (1.0, -0.5, 0.3),
        "density": (0.5, 0.5, 0.5),
        "rescale": True,
        "normalize": False,
        "lambda": 0.7,
    },
    {
        "weight": (0.0, 1.0, -2.0),
        "density": (0.3, 1.0, 0.5),
        "rescale": False,
        "normalize": True,
        "lambda": -1.3,
    },
    {"weight": WEIGHTS, "density": (0.0, 1.0, 0.5), "rescale": True, "normalize": True},
    {"weight": WEIGHTS, "density": (0.0, 0.0, 0.0)},
    {"weight": WEIGHTS, "density": (1.0, 1.0, 1.0)},
    {"weight": WEIGHTS, "density": (1e-9, 1e-4, 1e-3), "rescale": True},
    {"weight": (0.0, 0.0, 0.0), "density": (0.5, 0.5, 0.5), "normalize": True},
    {"weight": WEIGHTS, "density": (0.5, 0.5, 0.5), "lambda": 0.0},
)
EVENLY: Settings = {"weight": (1.0, 1.0, 1.0), "normalize": True}

ENTRIES: dict[str, Entry] = {
    "linear": Entry(
        models=3,
        variants=(
            {"weight": (0.5, 0.3, 0.2)},
            {"weight": (1.0, 2.0, 3.0), "normalize": True},
            {"weight": (1.0, -0.5, 0.0), "normalize": False},
            {"weight": (1.0, -0.5, 0.1), "normalize": True},
            {"weight": (0.0, 0.0, 0.0), "normalize": False},
        ),
        oracle=expect_linear,
        symmetric=True,
        equal={"weight": (0.7, 0.2, 1.1)},
    ),
    "slerp": Entry(
        models=2,
        variants=({"t": 0.3}, {"t": 0.0}, {"t": 1.0}, {"t": 0.5}, {"t": 1.4}),
        oracle=expect_slerp,
        symmetric=False,
        equal={"t": 0.3},
    ),
    "passthrough": Entry(
        models=1,
        variants=({"scale": (0.7,)}, {"scale": (None,)}, {"scale": (0.0,)}, {"scale": (-3.0,)}),
        oracle=expect_passthrough,
        symmetric=True,
        equal={},
    ),
    "task_arithmetic": Entry(
        models=3,
        variants=(
            {"weight": WEIGHTS, "normalize": False, "lambda": 0.7},
            {"weight": WEIGHTS, "normalize": True},
            {"weight": (1.0, -0.5, 0.0), "normalize": True, "lambda": -0.5},
            {"weight": (1.0, -0.5, -0.5), "normalize": True},
            {"weight": (0.0, 0.0, 0.0), "normalize": True},
        ),
        oracle=expect_task_arithmetic,
        symmetric=True,
        equal=EVENLY,
    ),
    "ties": Entry(
        models=3,
        variants=SPARSE,
        oracle=expect_ties,
        symmetric=True,
        equal=EVENLY,
    ),
    "dare_linear": Entry(
        models=3,
        variants=SPARSE,
        oracle=expect_dare_linear,
        symmetric=False,
        random=True,
        equal=EVENLY,
    ),
    "dare_ties": Entry(
        models=3,
        variants=SPARSE,
        oracle=expect_dare_ties,
        symmetric=False,
        random=True,
        equal=EVENLY,
    ),
}
