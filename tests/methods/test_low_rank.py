"""Iso-CTS, STAR, CART and Subspace Boosting: closed forms, and the errors of all that decompose."""

import pytest
import torch
from methods.made_matrices import SHAPES, apply_svc, check_close, make_deltas, make_orthogonal, merge_deltas
from oracles import matrices
from torch import Tensor

from mergemill.engine.methods import leading
from mergemill.engine.methods.catalogue import get_step
from mergemill.engine.tensors.place import Place

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


# ---------------------------------------------------------------------------------------------------- Iso-CTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_iso_cts_with_common_directions_alone_is_iso_c(shape: tuple[int, int]) -> None:
    deltas = make_deltas(shape, 3)
    check_close(merge_deltas("iso_cts", *deltas, common=1.0), merge_deltas("iso_c", *deltas))
    check_close(merge_deltas("iso_cts", deltas[0], common=0.3), merge_deltas("iso_c", deltas[0]), 1e-11)


@FLOATS
def test_iso_cts_of_models_that_do_not_interfere_gives_every_direction_the_mean(dtype: torch.dtype) -> None:
    deltas = [delta.to(dtype) for delta in make_orthogonal((60, 80), 3, 20)]
    spectrum = torch.linalg.svdvals(merge_deltas("iso_cts", *deltas, common=0.0).double())
    mean = sum(torch.linalg.svdvals(delta.double()).sum() for delta in deltas) / 60
    check_close(spectrum, mean.expand(60), 1e-11 if dtype == torch.float64 else 1e-6)


@FLOATS
def test_iso_cts_takes_no_direction_out_of_rounding(dtype: torch.dtype) -> None:
    """Of equal models of low rank nothing is left beside the common space but rounding."""
    (delta,) = (delta.to(dtype) for delta in make_orthogonal((40, 60), 1, 10))
    result = merge_deltas("iso_cts", delta, delta, delta, common=0.5)
    check_close(result, merge_deltas("iso_c", delta, delta, delta), 1e-12 if dtype == torch.float64 else 1e-6)


# ------------------------------------------------------------------------------------------------------- STAR
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_star_keeps_the_nuclear_norm(shape: tuple[int, int]) -> None:
    (delta,) = make_deltas(shape, 1)
    for eta in (0.0, 0.4, 0.9):
        spectrum = torch.linalg.svdvals(merge_deltas("star", delta, eta=eta))
        rank = int((torch.linalg.svdvals(delta).cumsum(0) < eta * torch.linalg.svdvals(delta).sum()).sum()) + 1
        check_close(spectrum.sum(), torch.linalg.svdvals(delta).sum())
        assert int((spectrum > 1e-9 * spectrum[0]).sum()) == rank
    check_close(merge_deltas("star", delta, eta=1.0), delta)


def test_a_model_of_zeros_counts_in_stars_mean() -> None:
    (delta,) = make_deltas((40, 60), 1)
    check_close(merge_deltas("star", delta, torch.zeros_like(delta), eta=1.0), delta / 2)
    assert not merge_deltas("star", torch.zeros_like(delta)).any()


# ------------------------------------------------------------------------------------------------------- CART
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cart_of_full_rank_is_the_mean(shape: tuple[int, int]) -> None:
    models = make_deltas(shape, 3)
    check_close(merge_deltas("cart", *models, rank=1.0, lambda_=3.0), sum(models) / 3)
    check_close(merge_deltas("cart", *models, rank=0.3, lambda_=0.0), sum(models) / 3)


def test_cart_of_two_models_moves_the_mean_nowhere() -> None:
    """The two differ from their mean by opposite matrices."""
    models = make_deltas((40, 60), 2)
    check_close(merge_deltas("cart", *models, rank=0.1, lambda_=2.0), sum(models) / 2)


def test_cart_keeps_models_of_low_rank_around_a_mean_that_they_share() -> None:
    """Three that differ from M by A, B and -A - B: the sum of their best approximations of rank k."""
    mean, first, second = make_deltas((40, 60), 3)
    parts = (first, second, -first - second)
    kept = []
    for part in parts:
        left, values, right = torch.linalg.svd(part, full_matrices=False)
        kept.append(left[:, :4] * values[:4] @ right[:4])
    wanted = mean + 0.5 * sum(kept)
    check_close(merge_deltas("cart", *(mean + part for part in parts), rank=0.1, lambda_=0.5), wanted)


# --------------------------------------------------------------------------------------------------- DC-Merge
@FLOATS
def test_dc_merge_keeps_models_that_do_not_interfere(dtype: torch.dtype) -> None:
    deltas = [delta.to(dtype) for delta in make_orthogonal((40, 60), 3, 10)]
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    check_close(merge_deltas("dc_merge", *deltas, density=1.0), sum(deltas), rounding)
    few = merge_deltas("dc_merge", *deltas, density=10.5 / 39**2)  # of each model its ten singular values
    check_close(few, sum(deltas), rounding)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dc_merge_of_one_model_keeps_its_largest_singular_values(shape: tuple[int, int]) -> None:
    (delta,) = make_deltas(shape, 1)
    check_close(merge_deltas("dc_merge", delta, density=1.0), delta)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    check_close(merge_deltas("dc_merge", delta, density=3.5 / min(shape) ** 2), left[:, :3] * values[:3] @ right[:3])


# ------------------------------------------------------------------------------------------- Subspace Boosting
def boost(merged: Tensor, beta: float = 0.01) -> Tensor:
    """Return what the step makes of a merged task vector."""
    place = Place("model.layers.3.mlp.up_proj.weight", tuple(merged.shape), 7, (1,))
    return get_step("subspace_boost").apply(merged.clone().reshape(-1), [], place, {"beta": beta}).view(merged.shape)


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.3, 0.99])
@FLOATS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subspace_boosting_agrees_with_the_oracle(shape: tuple[int, int], dtype: torch.dtype, beta: float) -> None:
    (merged,) = make_deltas(shape, 1, dtype)
    wanted = matrices.subspace_boost(merged.double().numpy(), eps=torch.finfo(dtype).eps, beta=beta)
    check_close(boost(merged, beta), wanted, 2e-6 if dtype == torch.float32 else 1e-12)


def test_subspace_boosting_leaves_a_flat_spectrum_and_what_has_no_vectors() -> None:
    flat = torch.linalg.qr(make_deltas((60, 40), 1)[0])[0].mul(3)
    check_close(boost(flat, 0.5), flat)
    (low,) = make_orthogonal((40, 60), 1, 10)
    spectrum = torch.linalg.svdvals(boost(low, 0.0))
    check_close(spectrum[:10], torch.linalg.svdvals(low)[0].expand(10))
    assert (spectrum[10:] < 1e-12).all()
    assert not boost(torch.zeros(30, 40)).any()


@pytest.mark.parametrize("shape", [(60,), (3, 4, 5)], ids=str)
def test_subspace_boosting_changes_matrices_alone(shape: tuple[int, ...]) -> None:
    (merged,) = make_deltas(shape, 1)
    assert torch.equal(boost(merged), merged)
    assert not get_step("subspace_boost").suits(shape)
    assert boost(torch.full((3, 4), float("nan"))).isnan().all()


# ----------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("name", ["cart", "dc_merge", "iso_cts", "star", "tsv", "iso_c"])
def test_float32_is_exact_to_its_rounding(name: str) -> None:
    """Against the same inputs in float64: half a unit in the last place of the largest value, and a little."""
    for shape in ((120, 200), (200, 120), (150, 150)):
        deltas = make_deltas(shape, 3, torch.float32)
        result, wanted = merge_deltas(name, *deltas), merge_deltas(name, *(delta.double() for delta in deltas))
        check_close(result.double(), wanted, 7e-8)


@pytest.mark.parametrize("name", ["cart", "dc_merge", "iso_c", "iso_cts", "star", "tsv", "svc"])
def test_large_matrices_are_exact_to_two_millionths_of_the_largest_value(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where decompositions begin and products are taken in float32, against what float64 alone gives."""
    deltas = make_deltas((520, 600), 4, torch.float32)
    join = (lambda: apply_svc(sum(deltas), *deltas)) if name == "svc" else (lambda: merge_deltas(name, *deltas))
    result = join()
    monkeypatch.setattr(leading, "SMALLEST", 10_000)
    check_close(result, join(), 2e-6)


def test_svc_is_exact_in_directions_that_a_large_task_vector_hardly_has(monkeypatch: pytest.MonkeyPatch) -> None:
    full, first, second = make_deltas((520, 530), 3, torch.float32)
    deltas = [full, 1e-3 * first + second[:, :40] @ first[:40], torch.zeros_like(full)]
    result = apply_svc(sum(deltas), *deltas)
    monkeypatch.setattr(leading, "SMALLEST", 10_000)
    check_close(result, apply_svc(sum(deltas), *deltas), 2e-6)


# ---------------------------------------------------------------------------- the largest of a spectrum, and no others
SIDE = leading.SMALLEST


def make_gram(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a symmetric matrix of these eigenvalues, and its vectors."""
    vectors = torch.linalg.qr(make_deltas((len(values),) * 2, 1)[0])[0]
    return (vectors * values) @ vectors.T, vectors


@pytest.mark.parametrize("most", [1, SIDE // 20, SIDE // 4])
def test_the_largest_eigenvectors_are_right_though_float32_finds_them(most: int) -> None:
    values = torch.arange(1, SIDE + 1, dtype=torch.float64).pow(-1)
    gram, vectors = make_gram(values)
    rough = leading.find_rough(1e60 * gram.tril())
    assert rough is not None
    found = leading.refine(1e60 * gram.tril(), rough, most)
    assert found is not None
    check_close(found[0], 1e60 * values[:most], 1e-9)
    check_close(found[1] @ found[1].T, vectors[:, :most] @ vectors[:, :most].T, 1e-6)
    inexact = rough.vectors[:, :most].double()
    check_close(found[1].T @ found[1], torch.eye(most), 1e-12)
    assert (inexact.T @ inexact - torch.eye(most)).abs().max() > 1e-8


@pytest.mark.parametrize("most", [1, SIDE // 20, SIDE // 4])
def test_the_space_of_the_largest_is_right_though_float32_finds_it(most: int) -> None:
    gram, vectors = make_gram(torch.arange(1, SIDE + 1, dtype=torch.float64).pow(-1))
    rough = leading.find_rough(gram)
    assert rough is not None
    given = rough.vectors[:, : most + leading.count_near_cut(SIDE)].double()
    found = leading.find_space(rough, given, gram @ given, most)
    assert found is not None
    wanted, inexact = vectors[:, :most] @ vectors[:, :most].T, rough.vectors[:, :most].double()
    check_close(found @ found.T, wanted, 1e-6)
    assert (inexact @ inexact.T - wanted).abs().max() > 2 * (found @ found.T - wanted).abs().max()


def test_what_float32_does_not_tell_apart_has_no_answer() -> None:
    """Of a spectrum that falls by 20 orders of magnitude; one with a gap has an answer at the gap."""
    steep = torch.logspace(0, -20, SIDE, dtype=torch.float64)
    flat = torch.ones(SIDE, dtype=torch.float64)
    flat[: SIDE // 8] = 2.0
    for values, most, found in ((steep, SIDE // 4, False), (flat, SIDE // 8, True)):
        gram, _ = make_gram(values)
        rough = leading.find_rough(gram)
        assert rough is not None
        assert (leading.refine(gram, rough, most) is not None) == found, (float(values[-1]), most)
        given = rough.vectors.double()
        assert (leading.find_space(rough, given, gram @ given, most) is not None) == found
    assert leading.find_rough(torch.zeros(SIDE, SIDE)) is None


@pytest.mark.parametrize("shape", [(SIDE, SIDE + 8), (SIDE + 8, SIDE)], ids=str)
def test_what_has_no_answer_in_float32_is_decomposed_in_float64(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = (torch.linalg.qr(each)[0] for each in (make_deltas((side, SIDE), 1)[0] for side in shape))
    steep = ((left * torch.logspace(0, -6, SIDE)) @ right.T).float()
    result = merge_deltas("cart", steep, -steep.flip(0), rank=0.25)
    monkeypatch.setattr(leading, "SMALLEST", 10_000)
    check_close(result, merge_deltas("cart", steep, -steep.flip(0), rank=0.25), 1e-6)
