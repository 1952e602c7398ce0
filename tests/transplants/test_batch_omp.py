"""Pursuits by the products of all shared rows: they choose what the formula chooses, whatever rounding says."""

import errno
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from oracles import transplants as oracles

from mergemill.engine.errors import RunError
from mergemill.engine.tensors import native
from mergemill.engine.tensors.pursuit import count_room_bytes
from mergemill.engine.transplants import batch_omp, gram_file
from mergemill.engine.transplants.batch_omp import hold_atoms, pursue_by_gram
from mergemill.engine.transplants.gram_file import ONE, GramFile, count_gram_bytes
from mergemill.engine.transplants.methods import BATCH_OMP, METHODS, Manner, find_method
from mergemill.engine.transplants.omp import pursue
from mergemill.engine.transplants.streams import NONE, Combination, combine_rows, pass_over

SHARED, NEW, WIDTH = 2300, 70, 48  # more than a tile and a panel of rows, more than are correlated at once


def make(rows: int = SHARED, stored: str = "BF16") -> tuple[torch.Tensor, torch.Tensor]:
    """Return shared rows of very different lengths, some of them alike, as they are stored, and new ones."""
    rng = np.random.default_rng(rows)
    common = rng.standard_normal((rows + NEW, 8)) @ rng.standard_normal((8, WIDTH))
    found = (common + rng.standard_normal(common.shape)) * rng.uniform(0.1, 3, (rows + NEW, 1))
    every = torch.from_numpy(found).to(torch.bfloat16 if stored == "BF16" else torch.float32)
    return every[:rows], every[rows:].float()


def chase(rows: torch.Tensor, targets: torch.Tensor, k: int) -> Combination:
    stored = {torch.bfloat16: "BF16", torch.float32: "F32"}[rows.dtype]
    atoms = hold_atoms(pass_over(rows.float(), 700), rows.shape[1], stored, GramFile(len(rows)))
    return pursue_by_gram(targets, atoms, k)


@pytest.fixture(params=["native", "numpy"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(batch_omp.native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip("not built")
    return str(request.param)


@pytest.mark.parametrize(("k", "stored"), [(1, "F32"), (20, "BF16")])
def test_it_is_the_formula(k: int, stored: str, loops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_file, "SLICE", 20)
    rows, targets = make(stored=stored)
    found = chase(rows, targets, k)
    x, w = rows.double().numpy(), np.random.default_rng(1).standard_normal((SHARED, 5))
    got = combine_rows(pass_over(torch.from_numpy(w)), found, 5).numpy()
    few = slice(60, None)
    expected = np.array([oracles.omp(each.double().numpy(), x, w, k) for each in targets[few]])
    np.testing.assert_allclose(got[few], expected, atol=1e-9 * np.abs(expected).max())
    plain = pursue(targets, pass_over(rows.float()), k)
    assert torch.equal(found.numbers, plain.numbers)
    torch.testing.assert_close(found.weights, plain.weights, atol=1e-9, rtol=0)


def test_a_target_has_the_same_sum_in_any_batch(loops: str) -> None:
    rows, targets = make()
    whole = chase(rows, targets, 12)
    for part in (slice(3, 4), slice(5, 70)):
        found = chase(rows, targets[part], 12)
        assert torch.equal(found.numbers, whole.numbers[part])
        assert torch.equal(found.weights, whole.weights[part])


def test_it_ends_where_nothing_is_left_or_added(loops: str) -> None:
    rows, targets = make(150, "F32")
    rows[2:4] = 50 * targets[0]  # of equals the first, and one is enough
    rows[4, 7] = torch.nan
    rows[5] = 0.0
    rows[6, 1] = torch.inf
    rows[7] = 2e38  # its products are no numbers, and its length is none
    found = chase(rows, torch.cat([targets, targets[:1] * 0]), 60)
    assert found.numbers[0].tolist() == [2] + 59 * [NONE]
    assert found.weights[0, 0].item() == pytest.approx(0.02)
    assert ((found.numbers[1:-1] != NONE).sum(1) == WIDTH).all(), "k may be more than the width"
    assert not set(found.numbers.flatten().tolist()) & {3, 4, 5, 6, 7}
    assert (found.numbers[-1] == NONE).all()
    assert torch.isfinite(found.weights).all()


def test_many_equals_are_all_looked_at(loops: str) -> None:
    rows, targets = make(1500, "F32")
    rows[9:] = targets[0]
    assert chase(rows, targets[:1], 3).numbers.tolist() == [[9, NONE, NONE]]


@pytest.mark.skipif(native.load() is None, reason="not built")
@pytest.mark.parametrize(("width", "k", "stored"), [(41, 30, "BF16"), (9, 12, "F32")])
def test_both_loops_have_the_same_bits(width: int, k: int, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, targets = make(600, stored)
    rows, targets = rows[:, :width].contiguous(), targets[:30, :width].contiguous()
    found = chase(rows, targets, k)
    monkeypatch.setattr(batch_omp.native, "load", lambda: None)
    again = chase(rows, targets, k)
    assert torch.equal(found.numbers, again.numbers)
    assert torch.equal(found.weights, again.weights)


def test_a_row_that_was_not_looked_at_ahead_is_chosen(loops: str) -> None:
    """It comes after a hundred that are nearer to the target at first, and before them once one of these is taken."""
    rng = np.random.default_rng(3)
    one, other, third, *rest = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    near = [one + 0.01 * rest[i % 60] + 0.001 * rng.standard_normal(64) for i in range(100)]
    few = [0.05 * each for each in rest[:30]]
    rows = torch.from_numpy(np.array([other, third, *near, *few])).float()
    targets = torch.from_numpy(np.array([one + 0.2 * other, 2 * one + 0.3 * other - 0.2 * third])).float()
    found, plain = chase(rows, targets, 20), pursue(targets, pass_over(rows), 20)
    assert torch.equal(found.numbers, plain.numbers)
    assert found.numbers[0, 1].item() == 0
    assert found.numbers[1, 1:3].tolist() == [0, 1]
    torch.testing.assert_close(found.weights, plain.weights, atol=1e-9, rtol=0)


def test_what_a_pursuit_works_in_is_counted() -> None:
    if native.load() is None:
        pytest.skip("not built")
    for rows, width, terms in ((30_000, 2048, 64), (1, 1, 1), (300, 16, 300), (30_000, 2048, 2048)):
        took = native.call("pursuit_bytes", rows, width, terms)
        assert took <= count_room_bytes(rows, width, terms) < took + (rows << 4) + (terms << 11) + (1 << 14)


def test_a_file_that_ends_early_is_told(loops: str) -> None:
    rows, targets = make(90)
    gram = GramFile(90)
    atoms = hold_atoms(pass_over(rows.float()), WIDTH, "BF16", gram)
    os.ftruncate(gram.descriptor, 0)
    with pytest.raises(OSError, match="Input/output"):
        pursue_by_gram(targets, atoms, 3)


def test_a_file_without_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space")

    for write in (refuse, lambda *_: 1):
        monkeypatch.setattr(os, "pwrite", write)
        with pytest.raises(RunError, match=r"no room for the 200 bytes that matching pursuit keeps.*TMPDIR"):
            GramFile(10).fill(torch.eye(10), torch.ones(10))


def test_no_folder_for_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(errno.EROFS, "read-only", "/tmp")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(RunError, match=r"no file can be made for the 200 bytes.*read-only.*TMPDIR names another"):
        GramFile(10)


def test_cosines_are_read_by_row() -> None:
    gram = GramFile(2)
    gram.fill(torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.tensor([0.5, 0.2]))
    row = np.empty(2, np.int16)
    gram.read(1, row)
    assert row.tolist() == [round(0.6 * ONE), ONE]


def test_tasks_fill_a_file_together_and_go_on_where_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_file, "_SIDE", 4)
    rows = torch.nn.functional.normalize(torch.randn(50, 8))
    gram, alone = GramFile(50), GramFile(50)
    alone.fill(rows, torch.ones(50))
    real, fails, made = GramFile._fill_from, threading.Event(), list[int]()

    def fill(self: GramFile, top: int, *rest: Any) -> None:
        made.append(top)
        if top == 12 and not fails.is_set():
            fails.set()
            raise OSError
        real(self, top, *rest)

    monkeypatch.setattr(GramFile, "_fill_from", fill)
    with ThreadPoolExecutor(3) as pool:
        ends = [pool.submit(gram.fill, rows, torch.ones(50)).exception()]
        ends += [each.exception() for each in [pool.submit(gram.fill, rows, torch.ones(50)) for _ in range(3)]]
    assert [type(each) for each in ends] == [OSError, type(None), type(None), type(None)]
    assert sorted(made) == sorted([*range(0, 50, 4), 12])
    for number in (0, 13, 49):
        found, expected = np.empty(50, np.int16), np.empty(50, np.int16)
        gram.read(number, found)
        alone.read(number, expected)
        assert found.tolist() == expected.tolist()


def test_products_are_made_where_they_fit_and_pay() -> None:
    assert find_method("omp", (2048, 64, 30_000), 20_000, "BF16") is BATCH_OMP
    assert count_gram_bytes(30_000) == 1_800_000_000
    wide = (2048, 2048, 30_000)
    assert BATCH_OMP.count_rows(wide, Manner("omp", "any")) == 4096
    assert BATCH_OMP.count_bytes(4096, wide, Manner("omp", "any")) < 800 << 20
    for sizes, new, stored in (
        ((2048, 64, 30_000), 200, "BF16"),
        ((2048, 64, 60_000), 20_000, "BF16"),
        ((4096, 64, 30_000), 20_000, "F32"),
        ((2048, 64, 30_000), 20_000, "F64"),
    ):
        assert find_method("omp", sizes, new, stored) is METHODS["omp"]
