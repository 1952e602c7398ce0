"""Expressions read exactly the spans that they say, and describe all that their value depends on."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergemill.engine.errors import MergeError
from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.storage.ranges import Pin, pin_file
from mergemill.engine.tensors import workspace
from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.expressions import Agreed, Expression, Read, Stored, input_bytes
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.rounds import Round, finish_rounds
from mergemill.engine.tensors.slabs import BLOCK, SLAB, Span
from mergemill.engine.tensors.workspace import Arena, Workspace

SIZE = 2 * BLOCK + 100
SPANS = [Span(0, SIZE), Span(0, 1), Span(BLOCK, 2 * BLOCK), Span(2 * BLOCK, SIZE), Span(BLOCK, BLOCK)]
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@pytest.fixture
def store(tmp_path: Path) -> Callable[[Tensor], Stored]:
    def write(tensor: Tensor) -> Stored:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.bin"
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        path.write_bytes(b"\xff" * 40 + data + b"\xff" * 40)
        return Stored(pin_file(path), 40, NAMES[tensor.dtype], tuple(tensor.shape))

    return write


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Read]:
    """Every range that is read from storage."""
    seen: list[Read] = []
    plain = workspace.read_into

    def record(pin: Pin, offset_bytes: int, buffer: memoryview, *how: Any) -> None:
        seen.append(Read(pin, offset_bytes, len(buffer)))
        plain(pin, offset_bytes, buffer, *how)

    monkeypatch.setattr(workspace, "read_into", record)
    return seen


def make_values(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_merged(*inputs: Expression, method: str = "task_arithmetic", **settings: Any) -> Merged:
    models = len(inputs) - 1
    given = {"weight": (1.0,) * models, "normalize": False, "lambda": 1.0} | settings
    place = Place("x", inputs[0].shape, 5, tuple(range(1, models + 1)))
    return Merged(get_method(method), inputs, True, given, place, "F32")


def work_for(expression: Expression, span: Span, dtype: str) -> Workspace:
    """Return a workspace of no more than the expression says it takes."""
    return Workspace(np.full(expression.slab_bytes(span.size, dtype), 0xFF, np.uint8))


def evaluate(expression: Expression, span: Span, work: Workspace, dtype: str) -> Tensor:
    """Return a span of an expression; its rounds have memory of their own."""

    def gather(asked: Round) -> Partial:
        whole = Span(0, expression.size)
        return asked.take(whole, Workspace(np.empty(expression.step_bytes(whole.size, dtype) * 8, np.uint8)), ())

    return finish_rounds(expression.rounds(), (), gather).slab(span, work, dtype)


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_stored_reads_the_span_and_decodes_it(
    store: Callable[[Tensor], Stored], reads: list[Read], span: Span, dtype: torch.dtype
) -> None:
    values = make_values(1).to(dtype)
    stored = store(values)
    found = evaluate(stored, span, work_for(stored, span, "F32"), "F32")
    assert torch.equal(found, values[span.start : span.stop].float())
    assert (
        reads
        == list(stored.reads(span))
        == [Read(stored.pin, 40 + span.start * dtype.itemsize, span.size * dtype.itemsize)]
    )


def test_stored_gives_memory_that_may_be_overwritten(store: Callable[[Tensor], Stored]) -> None:
    stored = store(make_values(1))
    work = Workspace(np.zeros(1 << 22, np.uint8), keep=True)
    evaluate(stored, Span(0, SIZE), work, "F32").fill_(3.0)
    assert torch.equal(evaluate(stored, Span(0, SIZE), work, "F32"), make_values(1))
    assert work.read_bytes == 4 * SIZE


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_agreed_reads_the_span_of_every_input(store: Callable[[Tensor], Stored], reads: list[Read], span: Span) -> None:
    values = torch.arange(SIZE)
    agreed = Agreed("positions", tuple(store(values) for _ in range(3)), ("a", "b", "c"))
    found = evaluate(agreed, span, work_for(agreed, span, "I64"), "I64")
    assert torch.equal(found, values[span.start : span.stop])
    assert reads == list(agreed.reads(span))
    assert sum(read.size_bytes for read in reads) == 3 * 8 * span.size
    assert (agreed.shape, agreed.dtype) == ((SIZE,), "I64")


def compare(agreed: Agreed, span: Span, work: Workspace) -> Arena:
    """Return the bytes on which all inputs agree."""
    return finish_rounds(agreed.rounds(), (), lambda asked: ()).encode(span, work, agreed.dtype)


def test_agreed_names_the_two_models_that_differ(store: Callable[[Tensor], Stored]) -> None:
    values, other = torch.arange(SIZE), torch.arange(SIZE)
    other[-1] += 1
    agreed = Agreed("positions", (store(values), store(values), store(other)), ("org/a", "org/b", "org/c"))
    work = Workspace(np.empty(1 << 24, np.uint8))
    assert len(compare(agreed, Span(0, BLOCK), work)) == 8 * BLOCK, "they agree so far"
    with pytest.raises(MergeError, match=r"positions: org/a and org/c hold different values.*I64") as caught:
        compare(agreed, Span(BLOCK, SIZE), work)
    assert "org/b" not in str(caught.value)


def test_agreed_compares_bytes_and_not_values(store: Callable[[Tensor], Stored]) -> None:
    inputs = (store(torch.tensor([0.0, torch.nan])), store(torch.tensor([-0.0, torch.nan])))
    agreed, work = Agreed("x", inputs, ("a", "b")), Workspace(np.empty(1024, np.uint8))
    assert len(compare(agreed, Span(1, 2), work)) == 4, "equal NaN are equal bytes"
    with pytest.raises(MergeError):
        compare(agreed, Span(0, 1), work)


@pytest.mark.parametrize("span", SPANS[:4], ids=str)
def test_merged_reads_the_span_of_every_input(store: Callable[[Tensor], Stored], reads: list[Read], span: Span) -> None:
    values = [make_values(i, torch.bfloat16) for i in range(3)]
    merged = make_merged(*map(store, values))
    found = evaluate(merged, span, work_for(merged, span, "F32"), "F32")
    base, *models = (value[span.start : span.stop].float() for value in values)
    assert torch.equal(found, base + ((models[0] - base) + (models[1] - base)))
    assert reads == list(merged.reads(span))
    assert sum(read.size_bytes for read in reads) == 3 * 2 * span.size


def test_merged_converts_its_result(store: Callable[[Tensor], Stored]) -> None:
    merged, span = make_merged(*(store(make_values(i)) for i in range(2))), Span(0, 1000)
    wide = evaluate(merged, span, work_for(merged, span, "F32"), "F32")
    narrow = evaluate(merged, span, work_for(merged, span, "BF16"), "BF16")
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wide.bfloat16())


def test_merged_nests(store: Callable[[Tensor], Stored], reads: list[Read]) -> None:
    values, span = [make_values(i) for i in range(3)], Span(BLOCK, SIZE)
    inner = make_merged(store(values[0]), store(values[1]))
    outer = make_merged(inner, store(values[2]), **{"lambda": 0.5})
    found = evaluate(outer, span, work_for(outer, span, "F32"), "F32")
    base = values[0] + (values[1] - values[0])
    assert torch.equal(found, (base + (values[2] - base) * 0.5)[span.start :])
    assert reads == list(outer.reads(span))
    assert input_bytes(outer) == 3 * 4 * SIZE


def test_rounds_are_none_where_nothing_must_be_known(store: Callable[[Tensor], Stored]) -> None:
    inputs = [store(make_values(i)) for i in range(2)]
    settings = {"density": (1.0,), "rescale": False}
    assert make_merged(*inputs).count_rounds() == (0, 0)
    assert make_merged(*inputs, method="ties", **settings).count_rounds() == (0, 0)
    assert make_merged(*inputs, method="ties", **settings | {"density": (0.5,)}).count_rounds() == (3, 8)
    assert make_merged(*inputs, method="dare_ties", **settings | {"density": (0.5,)}).count_rounds() == (0, 0)


def test_projected_bytes_grow_with_the_slab_and_the_inputs(store: Callable[[Tensor], Stored]) -> None:
    two, three = (make_merged(*(store(make_values(i)) for i in range(count))) for count in (2, 3))
    assert two.slab_bytes(BLOCK, "F32") < two.slab_bytes(SLAB, "F32") < three.slab_bytes(SLAB, "F32")


def make_all(store: Callable[[Tensor], Stored]) -> dict[str, Expression]:
    first, second = store(make_values(0)), store(make_values(1))
    return {
        "stored": first,
        "agreed": Agreed("x", (first, second), ("a", "b")),
        "merged": make_merged(first, second),
        "nested": make_merged(make_merged(first, second), second),
    }


@pytest.mark.parametrize("kind", ["stored", "agreed", "merged", "nested"])
def test_expressions_pickle_small(store: Callable[[Tensor], Stored], kind: str) -> None:
    expression = make_all(store)[kind]
    data = pickle.dumps(expression)
    assert pickle.loads(data) == expression
    assert pickle.loads(data).describe() == expression.describe()
    assert len(data) < 4000


@pytest.mark.parametrize("kind", ["stored", "agreed", "merged", "nested"])
def test_descriptions_are_json(store: Callable[[Tensor], Stored], kind: str) -> None:
    json.dumps(make_all(store)[kind].describe(), allow_nan=False)


def test_a_description_differs_when_anything_differs(store: Callable[[Tensor], Stored]) -> None:
    stored = store(make_values(0))
    other = dataclasses.replace(stored, offset_bytes=48)
    merged = make_merged(stored, other)
    pin, place, change = stored.pin, merged.place, dataclasses.replace
    expressions: list[Expression] = [
        stored,
        other,
        change(stored, dtype="I32"),
        change(stored, shape=(1, SIZE)),
        change(stored, pin=change(pin, url="/elsewhere")),
        change(stored, pin=change(pin, size_bytes=1)),
        change(stored, pin=change(pin, stamp="mtime_ns:1")),
        Agreed("x", (stored, other), ("a", "b")),
        Agreed("x", (other, stored), ("a", "b")),
        Agreed("x", (stored,), ("a",)),
        merged,
        change(merged, kernel=get_method("ties")),
        change(merged, inputs=(other, stored)),
        change(merged, inputs=(stored, other, other)),
        change(merged, inputs=(stored, merged)),
        change(merged, has_base=False),
        change(merged, settings={**merged.settings, "lambda": 0.5}),
        change(merged, place=place._replace(seed=6)),
        change(merged, place=place._replace(tensor="y")),
        change(merged, place=place._replace(models=(2,))),
        change(merged, dtype="F64"),
    ]
    described = [json.dumps(expression.describe(), sort_keys=True) for expression in expressions]
    assert len(set(described)) == len(described)
