"""The loops over slabs as they are stored: the bits of torch and numpy, for every dtype and every kind of value."""

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from methods.harness import Mill, Task, fill_settings, make_values
from tensors.made import KINDS, assert_same_bits, make_slab
from torch import Tensor

from mergemill.engine.methods.catalogue import find_methods, get_method
from mergemill.engine.tensors import native, structures
from mergemill.engine.tensors.fusion import SPREAD, Fusion, Join, Keep
from mergemill.engine.tensors.random import random_bits
from mergemill.engine.tensors.stored import StoredSlab

pytestmark = pytest.mark.skipif(native.load() is None, reason="the native loops are not built here")

SETTINGS: list[tuple[str, Mapping[str, Any]]] = [
    ("linear", {"weight": (0.3, 0.9)}),
    ("linear", {"weight": (0.3, 0.9), "normalize": False}),
    ("slerp", {"t": 0.3}),
    ("nuslerp", {"weight": (0.3, 0.9)}),
    ("multislerp", {"weight": (0.3, 0.9)}),
    ("karcher", {}),
    ("task_arithmetic", {"weight": (0.3, -0.7), "normalize": True, "lambda": 1.3}),
    ("expo", {"weight": (1.4, 0.2)}),
    ("ties", {"weight": (1.0, 0.5), "density": (0.5, 0.2), "rescale": True}),
    ("ties", {"weight": (1.0, 0.5), "density": (0.0, 1.0), "normalize": False}),
    ("dare_linear", {"weight": (1.0, 0.5), "density": (0.5, 0.3)}),
    ("dare_ties", {"weight": (1.0, 0.5), "density": (0.0, 0.4), "normalize": True}),
    ("dare_ties", {"weight": (1.0, 0.5), "density": (1.0, 0.4), "rescale": False}),
    ("breadcrumbs", {"weight": (1.0, 0.5), "density": (0.5, 0.9), "gamma": (0.1, 0.05), "rescale": True}),
    ("breadcrumbs_ties", {"weight": (1.0, 0.5), "density": (0.5, 0.9), "gamma": (0.1, 0.05)}),
    ("della", {"weight": (1.0, 0.5), "density": (0.5, 0.6), "epsilon": (0.3, -0.2)}),
    ("della_linear", {"weight": (1.0, 0.5), "density": (0.5, 1.0)}),
    ("sce", {"select_topk": 0.3}),
    ("sce", {"select_topk": 1.0}),
    ("sce", {"select_topk": 0.0}),
    ("consensus_ta", {"weight": (1.0, 0.5)}),
    ("consensus_ta", {"weight": (-0.4, 0.0), "lambda_mask": (0.2, 1.5), "k": 1, "lambda": 0.7}),
    ("consensus_ties", {"weight": (1.0, 0.5), "density": (0.5, 0.2), "rescale": True, "lambda": 1.3}),
    ("consensus_ties", {"weight": (1.0, 0.5), "lambda_mask": (0.2, 1.5), "k": 1, "normalize": False}),
    ("geometric_median", {"weight": (1.0, 0.3), "lambda": 0.8}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("ram", {"epsilon": 0.05}),
    ("ram", {"epsilon": -1.0}),
    ("ramplus_tl", {"epsilon": 0.05, "r": 0.7, "alpha": 2.0}),
    ("pcb", {}),
    ("pcb", {"ratio": 1.0, "lambda": 0.9}),
    ("pcb", {"ratio": 0.0}),
    ("arcee_fusion", {}),
    ("emr", {}),
    ("emr", {"lambda": -0.7}),
    ("negmerge", {"lambda": 0.7}),
    ("magmax", {"lambda": -0.7}),
    ("cabs", {}),
    ("cabs", {"n": 20, "m": 64, "weight": (1.0, -0.5), "lambda": 1.3}),
    ("cabs", {"n": 0, "m": 32}),
    ("cabs", {"n": 3, "m": 4}),
    ("cabs", {"n": 3, "m": 7}),
    ("nearswap", {"t": 0.2}),
    ("widen", {}),
    ("widen", {"ratio": 0.5, "calibration": 0.7}),
    ("localize_stitch", {}),
    ("localize_stitch", {"density": (0.6, 1.0), "lambda": 0.7}),
    ("localize_stitch", {"density": (0.0, 0.4)}),
]


def merge_both_ways(
    folder: Path, name: str, inputs: Sequence[Tensor], given: Mapping[str, Any], called: str = "", **how: Any
) -> tuple[Tensor, Tensor]:
    """Merge natively, and with torch alone."""
    method = get_method(name)
    based = method.base == "optional"
    task = Task(name, tuple(inputs), fill_settings(method, given, 2), optional_base=based)
    task = replace(task, tensor=called) if called else task
    natively = Mill(folder).merge(task, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load", lambda: None)
        return natively, Mill(folder).merge(task, **how)


def count_inputs(name: str) -> int:
    method = get_method(name)
    return 1 + min(2, method.most_inputs or 2) if method.takes_deltas else 2


def test_all_methods_that_loops_know_are_tested() -> None:
    assert {name for name, _ in SETTINGS} == {name for name, method in find_methods().items() if method.fused}


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("name", "given"), SETTINGS, ids=str)
def test_loops_give_the_bits_of_torch(name: str, given: Mapping[str, Any], dtype: str, tmp_path: Path) -> None:
    inputs = make_values((300, 701), dtype=KINDS[dtype], count=count_inputs(name))
    for slab, out in ((None, dtype), (65536, "F32")):
        how = {"out": out} if slab is None else {"out": out, "slab": slab, "parts": 3}
        assert_same_bits(*merge_both_ways(tmp_path, name, inputs, given, **how))


@pytest.mark.parametrize(("name", "given"), SETTINGS, ids=str)
def test_inputs_of_several_dtypes(name: str, given: Mapping[str, Any], tmp_path: Path) -> None:
    values = make_values((97, 1031), dtype=torch.float32, count=count_inputs(name))
    inputs = [value.to(kind) for value, kind in zip(values, KINDS.values(), strict=False)]
    assert_same_bits(*merge_both_ways(tmp_path, name, inputs, given, out="BF16"))


def test_rows_of_embeddings_are_judged_by_loops_as_by_torch(tmp_path: Path) -> None:
    inputs = make_values((301, 700), dtype=torch.bfloat16, count=3)
    for how in ({}, {"slab": 65536, "parts": 3, "out": "F32"}):
        assert_same_bits(*merge_both_ways(tmp_path, "widen", inputs, {}, "model.embed_tokens.weight", **how))


@pytest.mark.parametrize(("name", "given"), SETTINGS, ids=str)
def test_ties_zeros_and_small_numbers(name: str, given: Mapping[str, Any], tmp_path: Path) -> None:
    """Few distinct values, rows without any change, denormals: where ranks are decided by index."""
    values = [(value * 8).round() / 8 for value in make_values((200, 1500), dtype=torch.float32, count=3)]
    values[1][50:90] = values[0][50:90]
    values[2][120:] *= 1e-40
    assert_same_bits(*merge_both_ways(tmp_path, name, values[: count_inputs(name)], given))


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "dare_ties", "slerp"])
def test_what_is_not_finite(name: str, tmp_path: Path) -> None:
    given = next(given for known, given in SETTINGS if known == name)
    inputs = make_values((64, 1024), dtype=torch.bfloat16, count=count_inputs(name))
    inputs[1].view(-1)[[5, 2000, 40_000]] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.bfloat16)
    assert_same_bits(*merge_both_ways(tmp_path, name, inputs, given))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("name", "given"), SETTINGS, ids=str)
def test_more_that_is_no_number_than_stays(name: str, given: Mapping[str, Any], dtype: str, tmp_path: Path) -> None:
    """A threshold is then no number itself, and nothing is above it."""
    inputs = make_values((97, 701), dtype=KINDS[dtype], count=count_inputs(name))
    stream = np.random.default_rng(8)
    for x in inputs[1:]:
        odd = stream.choice([0.0, np.nan, -np.nan, np.inf], p=[0.1, 0.3, 0.3, 0.3], size=(97, 701))
        x += torch.from_numpy(odd).to(x.dtype)
    inputs[0][1::3] = -torch.inf  # infinity less infinity
    assert_same_bits(*merge_both_ways(tmp_path, name, inputs, given))


@pytest.mark.parametrize(("stored", "out"), list(itertools.product(KINDS, KINDS)))
def test_every_pattern_is_decoded_and_encoded_as_torch_does(stored: str, out: str) -> None:
    if stored == "F32":
        stream = np.random.default_rng(3)
        bits = torch.from_numpy(stream.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.int32))
        edges = torch.arange(-70_000, 70_000, dtype=torch.int32)
        near = torch.cat([edges + start for start in (0x33000000, 0x38800000, 0x477FF000, 0x7F7F0000)])
        values = torch.cat([bits, near]).view(torch.float32)
    else:
        values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(KINDS[stored])
    slab = make_slab([values], (len(values),))
    merged, broken = slab.merge(Fusion(Join("sum", (1.0,))), out, None)
    expected = values.to(torch.float32).mul(1.0).to(KINDS[out])
    assert_same_bits(torch.from_numpy(merged.copy()).view(KINDS[out]), expected)
    assert broken == int((~expected.isfinite()).sum())


def test_ranks_in_rows_are_those_of_a_stable_sort() -> None:
    """Rows of distinct values, of ties, of one value only, with more in one bin than are counted one by one, and with a
    value far larger than all others."""
    stream = np.random.default_rng(11)
    rows = np.stack(
        [
            stream.standard_normal(3000),
            stream.integers(-4, 5, 3000) / 4,
            np.full(3000, -0.5),
            1 + 1e-6 * stream.integers(0, 50, 3000),
            np.where(stream.random(3000) < 0.5, 0, stream.standard_normal(3000)),
            np.round(64 * stream.standard_normal(3000)) / 64,
            np.where(stream.random(3000) < 0.97, 0, 1e-40 * stream.standard_normal(3000)),
            stream.standard_normal(3000),
        ]
    ).astype(np.float32)
    rows[-2:, 17] = 1e30
    rank = np.argsort(np.argsort(np.abs(rows), axis=1, kind="stable"), axis=1, kind="stable")
    for limits in (np.linspace(-(2**31), 2**31 - 1, 3000), np.linspace(2**30, -(2**30), 3000)):
        limits = limits.astype(np.int32)
        slab = make_slab([torch.from_numpy(rows)], rows.shape, block=21 * 3000)
        bits = slab_bits(slab)
        kept = slab.sum_absolute(0, Keep(limits=limits))[1]
        expected = np.abs(rows.astype(np.float64))[bits < limits[rank]].sum()
        assert float(kept) == pytest.approx(expected, rel=1e-12)
        again, _ = slab.merge(Fusion(Join("sum", (1.0,)), (Keep(limits=limits),)), "F32", None)
        assert np.array_equal(again.view(np.float32).reshape(rows.shape) != 0, (bits < limits[rank]) & (rows != 0))


def slab_bits(slab: StoredSlab) -> np.ndarray[Any, Any]:
    """The random numbers of the slab's elements, from the functions that torch's path takes them from."""
    blocks = range(-(-slab.size // 65536))
    bits = torch.cat([random_bits(slab.place, slab.place.models[0], block) for block in blocks])
    return bits.numpy()[: slab.size].reshape(slab.place.shape)


def test_counts_are_those_of_numpy() -> None:
    stream = np.random.default_rng(5)
    base, *models = (torch.from_numpy(stream.standard_normal(150_001)).to(torch.bfloat16) for _ in range(4))
    slab = make_slab([base, *models], (150_001,), has_base=True)
    deltas = [(x.float() - base.float()).numpy() for x in models]
    stacked = np.stack(deltas).astype(np.float64)
    spread = np.sqrt(np.mean((stacked - stacked[0] - (stacked - stacked[0]).mean(0)) ** 2, axis=0)).astype(np.float32)
    for which, values in ((0, np.abs(deltas[0])), (2, np.abs(deltas[2])), (SPREAD, spread)):
        bits = values.view(np.uint32)
        upper, lower, equal = np.zeros(1 << 15, np.int64), np.zeros(1 << 16, np.int64), np.zeros(3, np.int64)
        slab.count_upper([which], [upper])
        assert np.array_equal(upper, np.bincount(bits >> 16, minlength=1 << 15))
        prefix = int(np.argmax(upper))
        slab.count_lower(which, prefix, lower)
        assert np.array_equal(lower, np.bincount(bits[bits >> 16 == prefix] & 0xFFFF, minlength=1 << 16))
        slab.count_equal(which, float(values[7]), equal)
        blocks = np.split(values == values[7], [65536, 131072])
        assert equal.tolist() == [int(block.sum()) for block in blocks]
        sample = slab.sample(which, 100, 1000, 64)
        assert np.array_equal(sample, bits[np.arange(100, len(bits) - 63, 1000)[:, None] + np.arange(64)])
        low, high = (int(bits[at]) for at in np.argsort(bits)[[70_000, 72_000]])
        ends = np.zeros((2, 3), np.int64)
        ((above, inside, near),) = slab.count_windows([(which, low, high)], [ends])
        assert above == np.count_nonzero(bits > high)
        assert near is not None
        assert inside == near.counts.sum() == len(near.keys)
        assert np.array_equal(near.keys, bits[(bits > low) & (bits < high)])
        for numbers, key in zip(ends, (low, high), strict=True):
            assert numbers.tolist() == [int(block.sum()) for block in np.split(bits == key, [65536, 131072])]
        order = np.argsort(~bits, kind="stable")  # the largest first, of equal ones the first by index
        ranks = (1, 2, 100, 70_000, 149_000, 150_001)
        share = int(0.3 * np.count_nonzero(bits))
        for m, found in zip(
            (*ranks, share), slab.find_ranks([*((which, m, 0.0) for m in ranks), (which, 0, 0.3)]), strict=True
        ):
            equal = np.flatnonzero(bits[order[:m]] == bits[order[m - 1]])
            assert found is not None
            assert (found.key, found.above, found.ties) == (bits[order[m - 1]], m - len(equal), len(equal))
            assert found.block == order[m - 1] // 65536
            assert found.block_ties == np.count_nonzero(order[equal] // 65536 == found.block)


@pytest.mark.parametrize("size", [1, 1023, 9_000, 70_001])
def test_ranks_of_values_of_which_many_are_equal(size: int) -> None:
    values = torch.from_numpy(np.random.default_rng(6).integers(-2, 2, size)).to(torch.bfloat16)
    slab = make_slab([values], (size,))
    bits = values.abs().float().numpy().view(np.uint32)
    order = np.argsort(~bits, kind="stable")
    ranks = sorted({1, max(1, size // 3), max(1, size // 2), size})
    for m, found in zip(ranks, slab.find_ranks([(0, m, 0.0) for m in ranks]), strict=True):
        assert found is not None
        assert (found.key, found.block) == (bits[order[m - 1]], order[m - 1] // 65536)
        assert found.above + found.ties == m
    assert make_slab([torch.zeros(size)], (size,)).find_ranks([(0, 0, 0.9)]) == [None]


def test_a_scale_of_minus_zero_stays_one_whatever_ran_before() -> None:
    for scale in (0.0, -0.0, 0.0):
        slab = replace(make_slab([torch.ones(5)], (5,)), scales=(scale,))
        merged, _ = slab.merge(Fusion(Join("sum", (1.0,))), "F32", None)
        assert np.signbit(merged.view(np.float32)).tolist() == [np.signbit(scale)] * 5


def test_a_weight_of_zero_of_either_sign_makes_nothing_of_anything() -> None:
    odd = torch.tensor([1.0, -1.0, -0.0, float("inf"), float("nan")])
    for weight in (0.0, -0.0):
        merged, _ = make_slab([odd], (5,)).merge(Fusion(Join("sum", (weight,))), "F32", None)
        assert merged.view(np.uint32).tolist() == [0] * 5


# ------------------------------------------------------------------------------------------------------- refusals
REFUSED = -2
SIZE = 3000


class Given:
    """What `merge_stored` and the rest are given: a base and two tensors, each of its own memory, all of it sound."""

    def __init__(self) -> None:
        self.arrays = [np.zeros(SIZE + 1, np.float32) for _ in range(3)]
        self.data = (ctypes.c_void_p * 3)(*(array.ctypes.data for array in self.arrays))
        self.dtypes, self.vectors = (ctypes.c_int32 * 3)(), (ctypes.c_int32 * 2)()
        self.floats = (ctypes.c_float * 2)(1.0, 1.0)
        pointers = [ctypes.addressof(each) for each in (self.data, self.dtypes, self.vectors, self.floats)]
        self.slab = structures.NativeSlab(*pointers, 2, 1, SIZE, 0, SIZE)
        self.join = structures.NativeJoin(kind=JOINS["add"], weight=ctypes.addressof(self.floats), lambda_=1.0)
        self.keeps = (structures.NativeKeep * 2)(structures.NativeKeep(factor=1.0), structures.NativeKeep(factor=1.0))
        self.out_dtype = 0

    def merge(self) -> int:
        out = np.zeros(SIZE, np.float32)
        join, slab, broken = ctypes.byref(self.join), ctypes.byref(self.slab), ctypes.c_int64()
        given = (slab, 1, self.keeps, join, out.ctypes.data, self.out_dtype, None, 0, ctypes.byref(broken))
        return int(native.call("merge_stored", *given))

    def count(self, which: int) -> dict[str, int]:
        """Return what each loop says that is given a tensor's number; where it is sound, 0."""
        slab, numbers, window = (
            ctypes.byref(self.slab),
            (ctypes.c_int64 * 1)(which),
            structures.NativeWindow(which=which),
        )
        counts, bits, sums = np.zeros(1 << 16, np.int64), np.zeros((2, SIZE), np.uint8), np.zeros((2, 32))
        windows = [np.zeros(2, np.int64) for _ in range(3)]
        window.low_counts, window.high_counts, window.counts = (each.ctypes.data for each in windows)
        at, keys, limits = counts.ctypes.data, np.zeros(4, np.uint32), np.zeros(SIZE, np.int32)
        marks, cut = (bits[0].ctypes.data, bits[1].ctypes.data), ctypes.byref(structures.NativeCut())
        return {
            "upper": native.call("stored_upper", slab, numbers, (ctypes.c_void_p * 1)(at), 1),
            "lower": native.call("stored_lower", slab, which, 0, at),
            "equal": native.call("stored_equal", slab, which, 1.0, at),
            "sample": native.call("stored_sample", slab, which, 0, SIZE, 8, at),
            "windows": native.call("stored_windows", slab, ctypes.byref(window), 1),
            "marks": native.call("stored_marks", slab, which, cut, *marks),
            "rows": native.call(
                "stored_rows", slab, which, SIZE, limits.ctypes.data, keys.ctypes.data, marks[0], None, None
            ),
            "norms": native.call("stored_norms", slab, which, self.keeps, sums[0].ctypes.data, sums[1].ctypes.data),
        }


JOINS = {"sum": 0, "add": 1, "agree": 2, "share": 3}
KEEPS = {"all": 0, "cut": 2, "random": 3, "mask": 4}


def cut_with_outliers(keep: structures.NativeKeep, cut: structures.NativeCut, outliers: structures.NativeCut) -> None:
    keep.kind, keep.has_outliers, keep.cut, keep.outliers = KEEPS["cut"], 1, cut, outliers


@pytest.mark.parametrize("kind", JOINS)
def test_a_base_is_needed_by_every_join_but_the_sum(kind: str) -> None:
    given = Given()
    given.join.kind = JOINS[kind]
    assert given.merge() == 0
    given.slab.has_base = 0
    assert given.merge() == (0 if kind == "sum" else REFUSED)


@pytest.mark.parametrize(
    ("cut", "outliers", "sound"),
    [
        ((1.0, 2, 3), (2.0, 9, 9), True),
        ((1.0, 2, 3), (1.0, 2, 3), True),
        ((1.0, 2, 3), (0.5, 0, 0), False),
        ((1.0, 2, 3), (1.0, 3, 0), False),
        ((1.0, 2, 3), (1.0, 2, 4), False),
        ((1.0, 2, 3), (1.0, 1, 9), True),
    ],
)
def test_outliers_lie_within_their_cut(cut: tuple[Any, ...], outliers: tuple[Any, ...], sound: bool) -> None:
    given = Given()
    cut_with_outliers(given.keeps[1], structures.NativeCut(*cut), structures.NativeCut(*outliers))
    assert given.merge() == (0 if sound else REFUSED)
    slab, keep, sums = ctypes.byref(given.slab), ctypes.byref(given.keeps[1]), np.zeros(32)
    done = native.call("stored_norms", slab, 1, keep, sums.ctypes.data, sums.ctypes.data)
    assert done == (0 if sound else REFUSED)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["base", "first", "second"])
@pytest.mark.parametrize(("dtype", "step"), [(0, 4), (1, 2), (2, 2)], ids=["F32", "BF16", "F16"])
def test_stored_tensors_are_aligned_to_their_elements(which: int, dtype: int, step: int) -> None:
    for shift in range(5):
        given = Given()
        given.dtypes[which] = dtype
        given.data[which] += shift
        assert given.merge() == (REFUSED if shift % step else 0)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["base", "first", "second"])
def test_unknown_dtypes_and_tensors_without_data_are_refused(which: int) -> None:
    for dtype in (-1, 3, 2**31 - 1):
        given = Given()
        given.dtypes[which] = dtype
        assert given.merge() == REFUSED
        given.dtypes[which], given.out_dtype = 0, dtype
        assert given.merge() == REFUSED
    given = Given()
    given.data[which] = None
    assert given.merge() == REFUSED


@pytest.mark.parametrize(
    ("least", "names"), [(-1, ["upper", "lower", "equal", "sample", "windows", "marks"]), (0, ["rows", "norms"])]
)
def test_a_number_of_no_tensor_is_refused(least: int, names: list[str]) -> None:
    """-1 is the spread over all, which most loops know."""
    for which, sound in ((least - 1, False), (least, True), (1, True), (2, False), (2**40, False)):
        found = Given().count(which)
        assert [name for name in names if (found[name] != REFUSED) != sound] == [], which


@pytest.mark.parametrize(
    ("field", "value"),
    [("count", 0), ("count", -1), ("has_base", 2), ("has_base", -1), ("size", -1), ("block", 0), ("start", 7)],
)
def test_a_slab_that_does_not_hold_together_is_refused(field: str, value: int) -> None:
    given = Given()
    setattr(given.slab, field, value)
    assert given.merge() == REFUSED
    assert set(given.count(0).values()) == {REFUSED}


@pytest.mark.parametrize("kind", [-1, 5, KEEPS["random"], KEEPS["mask"]])
def test_what_is_kept_is_of_a_known_kind_and_has_what_it_points_to(kind: int) -> None:
    given = Given()
    given.keeps[1].kind = kind
    assert given.merge() == REFUSED


@pytest.mark.parametrize("columns", [0, -1, 7, 2**31])
def test_rows_have_columns_that_can_be_ranked(columns: int) -> None:
    given, zeros = Given(), np.zeros(SIZE, np.int32)
    some = zeros.ctypes.data
    assert SIZE % 7
    done = native.call("stored_rows", ctypes.byref(given.slab), 0, columns, some, some, some, None, None)
    assert done == REFUSED


def test_a_refusal_is_told_as_a_fault_of_mergemill() -> None:
    slab = make_slab([torch.ones(5), torch.ones(5)], (5,))
    with pytest.raises(ValueError, match=r"merge_stored: .* points out of its slab \(a fault of mergemill\)"):
        slab.merge(Fusion(Join("add", (1.0, 1.0))), "F32", None)
