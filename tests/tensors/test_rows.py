"""Rows of matrices by a map: against plain indexing, in the memory that they say, reading what they say."""

import functools
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.storage.ranges import pin_file
from mergemill.engine.tensors.dtypes import NAMES, TORCH_DTYPES
from mergemill.engine.tensors.expressions import Expression, Read, Stored
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.rounds import Ready, Round, finish_rounds
from mergemill.engine.tensors.row_maps import MEAN, SEVERAL, ZERO, RowMap, count_most, make_row_map
from mergemill.engine.tensors.rows import Rows, map_rows
from mergemill.engine.tensors.slabs import BLOCK, SLAB, Span, iter_slabs
from mergemill.engine.tensors.workspace import Workspace


@functools.cache
def make_matrix(seed: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def store(folder: Path, tensor: Tensor, name: str) -> Stored:
    path = folder / name
    path.write_bytes(b"\xff" * 40 + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() + b"\xff" * 40)
    return Stored(pin_file(path), 40, NAMES[tensor.dtype], tuple(tensor.shape))


def settle(expression: Expression, pieces: int = 1) -> Ready:
    """Return an expression after its rounds, each taken over as many pieces, last piece first."""

    def gather(asked: Round) -> Partial:
        total: Partial = ()
        step = -(-expression.size // pieces // BLOCK) * BLOCK
        for start in reversed(range(0, expression.size, step)):
            work = Workspace(np.full(1 << 26, 0xFF, np.uint8))
            total = asked.take(Span(start, min(start + step, expression.size)), work, total)
        return total

    return finish_rounds(expression.rounds(), (), gather)


def take_rows(inputs: Sequence[Tensor], map_: RowMap) -> Tensor:
    """The rule, row by row."""
    rows = torch.cat([each.reshape(len(each), -1).double() for each in inputs])
    found = torch.zeros(len(map_.rows), rows.shape[1], dtype=torch.float64)
    for place, row in enumerate(map_.rows.tolist()):
        if row >= 0:
            found[place] = rows[row]
        elif row <= SEVERAL:
            members = map_.members[map_.starts[SEVERAL - row] : map_.starts[SEVERAL - row + 1]].tolist()
            found[place] = torch.stack([rows[member].float() for member in members]).sum(0).div(len(members))
    mean = found[map_.rows != MEAN].mean(0)
    found[map_.rows == MEAN] = mean
    return found.reshape(-1)


def check(rows: Rows, expected: Tensor, spans: Sequence[Span], pieces: int = 1) -> None:
    """Compare slabs, bytes and what native loops take, each in as much memory as the expression says."""
    ready = settle(rows, pieces)
    for span in spans:
        for dtype in ("F32", rows.dtype):
            wanted = expected[span.start : span.stop].to(TORCH_DTYPES[dtype])
            room = np.full(rows.slab_bytes(span.size, dtype), 0xFF, np.uint8)
            assert torch.equal(ready.slab(span, Workspace(room), dtype), wanted)
            encoded = ready.encode(span, Workspace(room), dtype)
            assert encoded.tobytes() == wanted.view(torch.uint8).numpy().tobytes()
        data, lowered = ready.lower(span, Workspace(np.full(rows.slab_bytes(span.size, "F32"), 0xFF, np.uint8)))
        found = torch.from_numpy(data.copy()).view(TORCH_DTYPES[lowered]).float()
        assert torch.equal(found, expected[span.start : span.stop].float())


def list_spans(size: int) -> list[Span]:
    return [*iter_slabs(Span(0, size), SLAB), Span(0, min(7, size)), Span(size // 3, size // 2), Span(size - 1, size)]


MAPS = {
    "identity and new rows": [*range(100), 300, 105, ZERO, MEAN, MEAN],
    "permuted": np.random.default_rng(1).permutation(400).tolist(),
    "far apart": [0, 399, 7, 7, 390, 8, 9],
    "means": [SEVERAL, 3, SEVERAL - 1, SEVERAL - 2, ZERO, MEAN, 250],
    "only zeros": [ZERO] * 5,
}
SEVERALS = [[0, 200], [1, 201, 320], [5, 6]]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 3, 4000])
def test_rows_are_where_the_map_puts_them(tmp_path: Path, name: str, dtype: torch.dtype, columns: int) -> None:
    tensors = [make_matrix(seed, rows, columns, dtype) for seed, rows in ((1, 200), (2, 100), (3, 100))]
    map_ = make_row_map(MAPS[name], SEVERALS if name == "means" else ())
    inputs = [store(tmp_path, each, str(i)) for i, each in enumerate(tensors)]
    rows = Rows(tuple(inputs), map_, inputs[0].dtype)
    assert rows.shape == (len(map_.rows), columns)
    expected = take_rows(tensors, map_)
    if rows.map.has_mean:
        assert rows.count_rounds() == (1, 1)
        exact = settle(rows, 3).slab(Span(0, rows.size), Workspace(np.full(1 << 25, 0xFF, np.uint8)), "F64")
        assert torch.allclose(exact, expected, rtol=0, atol=1e-6)
        expected = expected.float().double()
    check(rows, expected, list_spans(rows.size))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_slab_reads_part_of_what_a_larger_span_reads(data: st.DataObject) -> None:
    columns = data.draw(st.sampled_from([3, 700, 70_000]))
    wanted = data.draw(st.lists(st.integers(ZERO, 1999), min_size=1, max_size=60))
    stored = [Stored(pin_file(Path(__file__)), 40, "BF16", (1000, columns))] * 2
    rows = Rows(tuple(stored), make_row_map(wanted), "BF16")
    start = data.draw(st.integers(0, rows.size - 1))
    stop = data.draw(st.integers(start + 1, rows.size))
    larger = list(rows.reads(Span(0, rows.size)))
    for read in rows.reads(Span(start, stop)):
        assert any(is_within(read, each) for each in larger)


def is_within(read: Read, other: Read) -> bool:
    return other.offset_bytes <= read.offset_bytes and (
        read.offset_bytes + read.size_bytes <= other.offset_bytes + other.size_bytes
    )


def test_neighbours_are_one_read_and_small_holes_are_read_over() -> None:
    stored = Stored(pin_file(Path(__file__)), 0, "BF16", (100_000, 4096))  # 8 KiB a row
    rows = Rows((stored,), make_row_map([10, 11, 12, 19, 40, 39]), "BF16")
    runs = [(read.offset_bytes >> 13, read.size_bytes >> 13) for read in rows.reads(Span(0, rows.size))]
    assert runs == [(10, 10), (39, 2)]


def test_a_disk_is_asked_ahead_for_long_runs_alone() -> None:
    """Rows that are read one by one are asked for where they are read, a slab's together."""
    stored = Stored(pin_file(Path(__file__)), 0, "BF16", (100_000, 4096))
    rows = Rows((stored,), make_row_map([*range(100, 120), *range(890, 0, -20)]), "BF16")
    runs = [(read.offset_bytes >> 13, read.size_bytes >> 13) for read in rows.reads_ahead(Span(0, rows.size))]
    assert runs == [(100, 20)]
    assert (rows.is_lowered, Rows((stored,), rows.map, "F32").is_lowered) == (True, False)


def test_the_same_rows_are_the_input_itself() -> None:
    stored = Stored(pin_file(Path(__file__)), 0, "BF16", (5, 4096))
    assert map_rows([stored], make_row_map(range(5)), "BF16") is stored
    assert isinstance(map_rows([stored], make_row_map(range(4)), "BF16"), Rows)


def merge(inputs: Sequence[Expression], method: str) -> Merged:
    kernel, count = get_method(method), len(inputs) - 1
    values = {"weight": (0.5,) * count, "normalize": False, "lambda": 1.0, "rescale": False, "density": (0.5,) * count}
    place = Place("x", inputs[0].shape, 5, tuple(range(count)), block=kernel.block(inputs[0].shape, values))
    return Merged(kernel, tuple(inputs), True, values, place, "F32")


def test_rows_of_a_merge_that_needs_statistics(tmp_path: Path) -> None:
    """An input's rounds pass over all of it, however the rows are cut."""
    tensors = [make_matrix(seed, 100, 1000) for seed in (4, 5, 6)]
    inner = merge([store(tmp_path, each, str(i)) for i, each in enumerate(tensors)], "ties")
    whole = settle(inner).slab(Span(0, inner.size), Workspace(np.empty(1 << 26, np.uint8)), "F32").clone()
    for order in (np.random.default_rng(2).permutation(100)[:70], np.repeat(np.arange(100), 3)):
        rows = Rows((inner,), make_row_map(order), "F32")
        assert rows.count_rounds() == inner.count_rounds()
        for pieces in (1, 4):
            ready = settle(rows, pieces)
            for span in (Span(0, rows.size), Span(rows.size // 2, rows.size // 2 + 9)):
                room = np.full(rows.slab_bytes(span.size, "F32"), 0xFF, np.uint8)
                found = ready.slab(span, Workspace(room), "F32")
                assert torch.equal(found, whole.view(100, -1)[order.copy()].reshape(-1)[span.start : span.stop])


def test_methods_take_rows_as_they_take_what_is_stored(tmp_path: Path) -> None:
    tensors = [make_matrix(seed, 300, 1000, torch.bfloat16) for seed in (7, 8, 9)]
    order = np.random.default_rng(3).permutation(300)
    plain = [store(tmp_path, each, str(i)) for i, each in enumerate(tensors)]
    back = [store(tmp_path, each[np.argsort(order)], f"moved{i}") for i, each in enumerate(tensors)]
    moved = [plain[0], *(Rows((each,), make_row_map(order), "BF16") for each in back[1:])]
    for method in ("task_arithmetic", "ties"):
        found = []
        for inputs in (plain, moved):
            made = merge(inputs, method)
            assert made.block == BLOCK
            ready = settle(made, 2)
            slabs = iter_slabs(Span(0, made.size), SLAB)
            room = np.empty(1 << 25, np.uint8)
            found.append([ready.encode(span, Workspace(room), "BF16").tobytes() for span in slabs])
        assert found[0] == found[1]


@pytest.mark.parametrize("apart", [True, False], ids=["of this machine", "from afar"])
def test_native_loops_take_several_slabs_of_rows_in_the_memory_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    columns, stream = 4096, np.random.default_rng(4)
    stored = [store(tmp_path, make_matrix(seed, 600, columns, torch.bfloat16), str(seed)) for seed in (1, 2)]
    wanted = [stream.permutation(1200)[:580], np.concatenate([np.arange(290), stream.permutation(1200)[:290]])]
    moved = [Rows(tuple(stored), make_row_map(each), "BF16") for each in wanted]
    kernel = get_method("linear")
    values = {"weight": (0.25, 0.75), "normalize": False}
    place = Place("x", moved[0].shape, 5, (0, 1), block=kernel.block(moved[0].shape, values))
    made = Merged(kernel, tuple(moved), False, values, place, "F32")
    assert made.steps == 4
    if not apart:
        monkeypatch.setattr(Workspace, "reads_apart", lambda self, pin: False)
    whole = torch.cat([make_matrix(seed, 600, columns, torch.bfloat16) for seed in (1, 2)]).float()
    expected = (0.25 * whole[wanted[0]] + 0.75 * whole[wanted[1]]).bfloat16().view(-1)
    ready, room = settle(made), np.full(made.step_bytes(made.size, "BF16"), 0xFF, np.uint8)
    for span in iter_slabs(Span(0, made.size), made.steps * SLAB):
        found = torch.from_numpy(ready.encode(span, Workspace(room), "BF16").copy()).view(torch.bfloat16)
        assert torch.equal(found, expected[span.start : span.stop])


def test_equal_maps_have_equal_digests_and_a_pickle_keeps_them() -> None:
    first, second = make_row_map([0, 1, SEVERAL], [[1, 2]]), make_row_map([0, 1, SEVERAL], [[1, 2]])
    assert first.digest == second.digest == pickle.loads(pickle.dumps(first)).digest
    assert first.digest != make_row_map([0, 1, SEVERAL], [[1, 3]]).digest
    assert count_most(make_row_map([*range(1000), ZERO, 5]), 64) == (64, 2)
