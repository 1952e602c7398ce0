"""Codes and scales are the nearest that the format has: against float64, every code, and llama.cpp's own quantiser."""

import gguf
import numpy as np
import pytest
import torch

from mergemill.engine.tensors.codes_made import CODINGS
from mergemill.engine.tensors.numbers import E2M1, find_table


def make_rows(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Return heavy-tailed rows whose blocks differ in size by many powers of 2, one of them of zeros."""
    stream = np.random.default_rng(seed)
    sizes = np.exp2(stream.integers(-30, 20, (rows, columns // 32)).repeat(32, 1))
    values = stream.standard_t(3, (rows, columns)) * sizes
    values[: rows // 4, :32] = 0
    return torch.from_numpy(values.astype(np.float32))


def find_nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the smallest distance to any value of a table, in float64."""
    ordered = np.unique(table)
    at = np.searchsorted(ordered, values).clip(1, len(ordered) - 1)
    return np.minimum(np.abs(values - ordered[at - 1]), np.abs(values - ordered[at]))


def test_fp8_scales_are_the_largest_over_448_and_codes_the_nearest() -> None:
    rows = make_rows(256, 384)
    codes, scales = CODINGS["fp8_block"].make(rows.clone())
    blocks = rows.double().numpy().reshape(2, 128, 3, 128)
    made = scales.view(torch.float32).numpy().reshape(2, 3)
    np.testing.assert_array_equal(made, np.abs(blocks).max((1, 3)).astype(np.float32) / np.float32(448))
    scaled = blocks / made.astype(np.float64)[:, None, :, None]
    found = find_table("F8_E4M3")[codes.numpy()].astype(np.float64).reshape(blocks.shape)
    table = find_table("F8_E4M3").astype(np.float64)
    best = find_nearest(scaled, table[np.isfinite(table)])
    assert (np.abs(found - scaled) <= best + 2.0**-22 * np.abs(scaled)).all()  # scaled in float32 before it is rounded
    assert (np.abs(found - scaled) <= np.maximum(np.abs(scaled) * 2.0**-4, 2.0**-10) * (1 + 2.0**-20)).all()
    assert np.abs(found).max((1, 3)).tolist() == [[448.0] * 3] * 2


def test_fp8_of_zeros_and_of_what_is_too_small_to_scale_is_zero() -> None:
    rows = torch.full((128, 128), 1e-44)
    rows[0, 0] = -0.0
    codes, scales = CODINGS["fp8_block"].make(rows)
    assert scales.view(torch.float32).tolist() == [1.0]
    assert codes[0] == 128
    assert not codes[1:].any()


def test_fp8_says_what_is_not_finite() -> None:
    rows = torch.ones(256, 128)
    rows[3, 5] = torch.nan
    codes, _ = CODINGS["fp8_block"].make(rows)
    found = find_table("F8_E4M3")[codes.numpy()]
    assert np.isnan(found[: 128 * 128]).all()
    assert (found[128 * 128 :] == 448).all()


def test_mxfp4_has_the_exponent_of_the_largest_and_the_nearest_code() -> None:
    rows = make_rows(64, 96, seed=1)
    codes, scales = CODINGS["mxfp4"].make(rows.clone())
    blocks = rows.double().numpy().reshape(-1, 32)
    most = np.abs(blocks).max(1)
    exponents = scales.numpy().astype(int) - 127
    some = most > 0
    np.testing.assert_array_equal(exponents[some], np.floor(np.log2(most[some])).astype(int) - 2)
    scaled = blocks * np.exp2(-exponents.astype(np.float64))[:, None]
    low, high = codes.numpy() & 15, codes.numpy() >> 4
    found = find_table("E2M1").astype(np.float64)[np.stack([low, high], 1)].reshape(blocks.shape)
    clipped = scaled.clip(-6, 6)
    np.testing.assert_array_equal(np.abs(found - clipped), find_nearest(clipped, find_table("E2M1").astype(np.float64)))


@pytest.mark.parametrize(("value", "code"), [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5, 6)])
def test_halfway_between_two_codes_of_mxfp4_is_the_even_one(value: float, code: int) -> None:
    rows = torch.full((1, 32), float(value))
    rows[0, 0] = 4.0  # which makes the scale 1
    codes, scales = CODINGS["mxfp4"].make(rows)
    assert scales.tolist() == [127]
    assert (codes[1] & 15, codes[1] >> 4) == (code, code)
    assert E2M1[code] in (0.0, 1.0, 2.0, 4.0)


def test_mxfp4_reaches_both_ends_of_its_scales() -> None:
    rows = torch.tensor([[torch.finfo(torch.float32).max] * 32, [1e-45] * 32, [torch.inf] * 32])
    _, scales = CODINGS["mxfp4"].make(rows)
    assert scales.tolist() == [252, 0, 255]


def test_q8_0_is_what_llama_cpp_makes() -> None:
    rows = make_rows(64, 96, seed=2)[:, 32:]
    rows = rows.clamp(-60000, 60000)  # whose scales a float16 holds
    made, _ = CODINGS["q8_0"].make(rows.clone())
    expected = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(made.numpy(), expected.reshape(-1))
