"""The methods on whole matrices: closed forms, degenerate cases, threads and memory."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from methods.harness import Mill, Task, bits_of, fill_settings, make_values
from methods.made_matrices import PLACE, SHAPES, apply_svc, check_close, make_deltas, make_orthogonal, merge_deltas
from oracles import matrices
from torch import Tensor

from mergemill.engine.errors import MergeError
from mergemill.engine.methods.catalogue import find_methods, get_method, get_step
from mergemill.engine.methods.leading import SMALLEST
from mergemill.engine.methods.steps import Stepped

MATRIX = [name for name, method in find_methods().items() if method.reads == "matrix" and not method.takes_importances]
MEANS = ("cart", "dc_merge", "iso_cts", "star")  # what is no matrix is averaged; the others add it up


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Mill:
    return Mill(tmp_path_factory.mktemp("mill"))


def test_the_parameters_of_the_specification() -> None:
    found = {name: {p.name: p.default for p in get_method(name).parameters} for name in MATRIX}
    assert found == {
        "cart": {"rank": 0.08, "lambda": 1.0},
        "dc_merge": {"density": 0.001, "lambda": 1.0},
        "iso_c": {"lambda": 1.0},
        "iso_cts": {"common": 0.8, "lambda": 1.0},
        "orthomerge": {"lambda": 0.2},
        "star": {"eta": 0.4, "lambda": 1.0},
        "tsv": {"lambda": 1.0},
        "wudi": {"ridge": 1e-6, "lambda": 1.0},
    }
    assert [(p.name, p.default) for p in get_step("svc").parameters] == [("alpha", 1.0)]


# -------------------------------------------------------------------------------------------------- TSV-Merge
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tsv_of_one_model_is_that_model(shape: tuple[int, int]) -> None:
    (delta,) = make_deltas(shape, 1)
    check_close(merge_deltas("tsv", delta), delta)
    check_close(merge_deltas("tsv", delta, lambda_=0.3), 0.3 * delta)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tsv_keeps_models_that_do_not_interfere(shape: tuple[int, int], dtype: torch.dtype) -> None:
    deltas = [delta.to(dtype) for delta in make_orthogonal(shape, 3, 10)]
    check_close(merge_deltas("tsv", *deltas), sum(deltas), 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tsv_of_equal_models_is_the_part_of_one_that_each_may_give(dtype: torch.dtype) -> None:
    (delta,) = make_deltas((40, 60), 1, dtype)
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    wanted = left[:, :13] * values[:13] @ right[:13]
    check_close(merge_deltas("tsv", delta, delta, delta).double(), wanted, 1e-12 if dtype == torch.float64 else 1e-6)


def test_tsv_takes_one_triple_of_each_of_more_models_than_the_matrix_has_rows() -> None:
    deltas = make_deltas((3, 30), 5)
    wanted = matrices.tsv(np.zeros((3, 30)), [delta.numpy() for delta in deltas], eps=2.2e-16)
    check_close(merge_deltas("tsv", *deltas), wanted)


def test_a_model_of_zeros_takes_no_part_in_tsv() -> None:
    deltas = [*make_orthogonal((40, 60), 2, 10), torch.zeros(40, 60, dtype=torch.float64)]
    check_close(merge_deltas("tsv", *deltas), deltas[0] + deltas[1])


# ------------------------------------------------------------------------------------------------------ Iso-C
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_iso_c_has_a_flat_spectrum_at_the_mean(shape: tuple[int, int]) -> None:
    deltas = make_deltas(shape, 3)
    mean = torch.linalg.svdvals(sum(deltas)).mean()
    check_close(torch.linalg.svdvals(merge_deltas("iso_c", *deltas)), mean.expand(min(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_iso_c_of_a_flat_spectrum_changes_nothing(dtype: torch.dtype) -> None:
    delta = torch.linalg.qr(make_deltas((60, 40), 1)[0])[0].mul(3).to(dtype)
    check_close(merge_deltas("iso_c", delta), delta, 1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_iso_c_leaves_zero_what_has_no_singular_vectors(dtype: torch.dtype) -> None:
    (delta,) = (delta.to(dtype) for delta in make_orthogonal((40, 60), 1, 10))
    spectrum = torch.linalg.svdvals(merge_deltas("iso_c", delta).double())
    mean = torch.linalg.svdvals(delta.double()).sum() / 40
    check_close(spectrum[:10], mean.expand(10), 1e-6)
    assert (spectrum[10:] < 1e-6).all()


# -------------------------------------------------------------------------------------------------- OrthoMerge
def turn(matrix: Tensor, angle: float, plane: tuple[int, int] = (0, 1)) -> Tensor:
    """Return the matrix with the columns of a plane turned by an angle."""
    rotation, (i, j) = torch.eye(matrix.shape[1], dtype=matrix.dtype), plane
    rotation[i, i] = rotation[j, j] = math.cos(angle)
    rotation[i, j], rotation[j, i] = -math.sin(angle), math.sin(angle)
    return matrix @ rotation


def ortho_merge(base: Tensor, *models: Tensor, lambda_: float = 1.0) -> Tensor:
    """Return what OrthoMerge makes of models and their base."""
    place = PLACE._replace(shape=tuple(base.shape))
    flat = [(model - base).reshape(-1) for model in models]
    return get_method("orthomerge").combine(flat, base.clone().view(-1), None, place, {"lambda": lambda_}).view_as(base)


@pytest.mark.parametrize("shape", [(50, 20), (20, 20)], ids=str)
def test_orthomerge_of_rotations_in_one_plane_has_the_mean_of_their_half_tangents(shape: tuple[int, int]) -> None:
    (base,) = make_deltas(shape, 1)
    mean = 2 * math.atan((math.tan(0.3) - math.tan(0.1) + math.tan(0.7)) / 3)
    models = [turn(base, angle) for angle in (0.6, -0.2, 1.4)]
    length = 2 * math.atan((math.tan(0.3) + math.tan(0.1) + math.tan(0.7)) / 3)
    check_close(ortho_merge(base, *models), turn(base, length), 1e-11)
    assert mean < length  # the strength of the rotations is kept where they oppose each other
    check_close(ortho_merge(base, turn(base, 0.4), turn(base, -0.4)), base, 1e-11)


def test_orthomerge_of_one_model_is_that_model_and_of_wide_matrices_turns_their_rows_alone() -> None:
    base, change = make_deltas((4, 30), 2)
    check_close(ortho_merge(base, base + 0.1 * change), base + 0.1 * change, 1e-11)
    merged = ortho_merge(base, base + 0.1 * change, lambda_=0.0)
    check_close(merged @ merged.T, base @ base.T, 1e-11)
    rows = torch.linalg.qr(torch.cat([base, change]).T)[0]
    check_close(merged @ rows @ rows.T, merged, 1e-11)


def test_what_has_no_cayley_transform_is_added_whole() -> None:
    (base,) = make_deltas((9, 6), 1)
    mirrored = base.clone()
    mirrored[:, 0].neg_()
    for model in (mirrored, -base):
        check_close(ortho_merge(base, model, lambda_=0.25), base + 0.25 * (model - base), 1e-12)


# ------------------------------------------------------------------------------------------------------- WUDI
def find_gradient(result: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """Return half the gradient of WUDI's objective, by autograd."""
    merged = result.clone().requires_grad_()
    objective = sum(((merged - delta) @ delta.T).square().sum() / delta.square().sum() for delta in deltas)
    (gradient,) = torch.autograd.grad(objective, merged)
    return gradient / 2


@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_of_wudis_objective_vanishes(shape: tuple[int, int], models: int) -> None:
    deltas = [delta * (i + 1) for i, delta in enumerate(make_deltas(shape, models))]
    at_start = find_gradient(torch.zeros(shape, dtype=torch.float64), deltas).abs().max()
    result = merge_deltas("wudi", *deltas, ridge=1e-8)
    assert find_gradient(result, deltas).abs().max() < 1e-7 * at_start
    result = merge_deltas("wudi", *deltas, ridge=0.1)
    check_close(find_gradient(result, deltas), -0.1 * models / shape[1] * result, 1e-11)  # but for the ridge's


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50), (20, 90)], ids=str)
def test_wudi_of_equal_models_is_that_model(shape: tuple[int, int], models: int) -> None:
    (delta,) = make_deltas(shape, 1)
    check_close(merge_deltas("wudi", *[delta] * models, ridge=1e-8), delta, 1e-4)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (31, 95)], ids=str)
def test_wudi_keeps_models_that_do_not_interfere(shape: tuple[int, int]) -> None:
    deltas = make_orthogonal(shape, 3, 10)
    check_close(merge_deltas("wudi", *deltas, ridge=1e-8), sum(deltas), 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_model_of_zeros_takes_no_part_in_wudi(shape: tuple[int, int]) -> None:
    first, second = make_deltas(shape, 2)
    with_zeros = merge_deltas("wudi", first, torch.zeros_like(first), second)
    assert bits_of(with_zeros) == bits_of(merge_deltas("wudi", first, second))


@pytest.mark.parametrize("models", [2, 4, 5])
def test_both_sides_of_wudi_agree_with_the_oracle(models: int) -> None:
    deltas = make_deltas((20, 90), models)
    arrays = [delta.numpy() for delta in deltas]
    check_close(merge_deltas("wudi", *deltas, ridge=0.01), matrices.wudi(np.zeros((20, 90)), arrays, ridge=0.01), 1e-11)


# -------------------------------------------------------------------------------------------------------- SVC
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (257, 513)], ids=str)
def test_svc_agrees_with_the_oracle(shape: tuple[int, int], dtype: torch.dtype, alpha: float) -> None:
    deltas = make_deltas(shape, 3, dtype)
    merged = sum(weight * delta for weight, delta in zip((1.0, 0.6, -0.3), deltas, strict=True))
    arrays = [delta.double().numpy() for delta in deltas]
    wanted = matrices.svc(merged.double().numpy(), arrays, eps=torch.finfo(dtype).eps, alpha=alpha)
    check_close(apply_svc(merged, *deltas, alpha=alpha), wanted, 2e-6 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svc_of_one_model_leaves_it(shape: tuple[int, int], alpha: float) -> None:
    (delta,) = make_deltas(shape, 1)
    check_close(apply_svc(delta, delta, alpha=alpha), delta)
    check_close(apply_svc(delta, delta, alpha=2.0), delta / 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svc_of_the_sum_of_equal_models_is_one_of_them(shape: tuple[int, int]) -> None:
    """Where all K agree, sᵢ = K for each, so that K·D is divided by K."""
    (delta,) = make_deltas(shape, 1)
    check_close(apply_svc(3 * delta, delta, delta, delta), delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_model_without_a_share_in_a_direction_counts_as_alpha(dtype: torch.dtype) -> None:
    deltas = [delta.to(dtype) for delta in make_orthogonal((40, 60), 2, 10)]
    merged, rounding = deltas[0] + deltas[1], 1e-12 if dtype == torch.float64 else 1e-5
    none = torch.zeros_like(merged)
    if dtype == torch.float64:  # s = 1 and alpha
        check_close(apply_svc(merged, *deltas, alpha=1.0), merged, 1e-9)
        check_close(apply_svc(merged, *deltas, alpha=0.5), merged * 2 / 1.5, 1e-9)
    check_close(apply_svc(deltas[0], deltas[0], none, alpha=0.5), deltas[0] * 2 / 1.5, rounding)
    check_close(apply_svc(deltas[0], none, none, alpha=0.5), deltas[0] * 2, rounding)
    check_close(apply_svc(deltas[0], none, none, alpha=0.0), deltas[0], 0.0)


def test_svc_after_task_arithmetic_of_equal_models_gives_that_model(mill: Mill) -> None:
    base, model = make_values((200, 300), count=2)
    method = get_method("task_arithmetic")
    expression = mill.express(
        Task("task_arithmetic", (base, model, model), fill_settings(method, {"weight": (1.0, 1.0)}, 2))
    )
    kernel = Stepped(method, ((get_step("svc"), {"alpha": 1.0}),))
    place = expression.place._replace(block=kernel.block((200, 300), expression.settings))
    result = mill.run(dataclasses.replace(expression, kernel=kernel, place=place))
    check_close(result, model, 4e-7)


# ------------------------------------------------------------------------------------------------ degenerate
def merge_any(name: str, *deltas: Tensor) -> Tensor:
    """Return what a method, or SVC after a sum, makes of task vectors."""
    return apply_svc(sum(deltas), *deltas) if name == "svc" else merge_deltas(name, *deltas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*MATRIX, "svc"])
def test_no_task_vector_gives_the_base(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    none = torch.zeros(shape, dtype=dtype)
    assert (merge_any(name, none, none, none) == 0).all()


EXTREMES = {
    "huge": (torch.float32, 1e30),
    "tiny": (torch.float32, 1e-30),
    "denormal": (torch.float32, 1e-43),
    "huge float64": (torch.float64, 1e200),
    "tiny float64": (torch.float64, 1e-200),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*MATRIX, "svc"])
def test_a_common_scale_is_only_a_scale(name: str, shape: tuple[int, int], extreme: str) -> None:
    dtype, scale = EXTREMES[extreme]
    deltas = [delta.double() * scale for delta in make_deltas(shape, 3, torch.float32)]
    stored = [delta.to(dtype) for delta in deltas]
    unscaled = [delta.double() / scale for delta in stored]
    if name == "svc":  # the same rounding of the sum
        result, wanted = apply_svc(sum(stored), *stored), apply_svc(sum(stored).double() / scale, *unscaled)
    else:
        result, wanted = merge_deltas(name, *stored), merge_deltas(name, *unscaled)
    check_close(result.double() / scale, wanted, {"denormal": 0.05}.get(extreme, 2e-6))


@pytest.mark.parametrize("name", [*MATRIX, "svc"])
def test_scales_that_differ_stay_finite(name: str) -> None:
    for dtype, scale in ((torch.float32, 1e30), (torch.float64, 1e150)):
        small, large, zero = (
            delta.to(dtype) for delta in (make_deltas((30, 40), 1)[0] / scale, make_deltas((30, 40), 1)[0] * scale,
                                          torch.zeros(30, 40))
        )  # fmt: skip
        for deltas in ((small, large, zero), (small, small, large), (large, -large, small), (large, -large, zero)):
            assert torch.isfinite(merge_any(name, *deltas)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [*MATRIX, "svc"])
def test_what_is_not_finite_has_no_decomposition_and_gives_nan(name: str, value: float) -> None:
    first, second = make_deltas((30, 40), 2)
    second[3, 5] = value
    assert merge_any(name, first, second).isnan().all()


@pytest.mark.parametrize("shape", [(60,), (3, 4, 5), (), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", MATRIX)
def test_what_is_no_matrix_is_merged_by_task_arithmetic(name: str, shape: tuple[int, ...]) -> None:
    deltas = make_deltas(shape, 3)
    factor = {"cart": 1 / 3}.get(name, 0.5 / 3 if name in MEANS else 0.5)
    check_close(merge_deltas(name, *deltas, lambda_=0.5), factor * sum(deltas))
    assert get_method(name).block(shape, {p.name: p.default for p in get_method(name).parameters}) == 65536


def test_a_decomposition_that_does_not_converge_names_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError("it failed")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(MergeError, match=r"^model.layers.3.mlp.up_proj.weight: .*does not converge.*it failed"):
        merge_deltas("iso_c", *make_deltas((30, 40), 2, torch.float32))


# ------------------------------------------------------------------------------------------ threads and memory
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((320, 480), torch.float32), ((320, 480), torch.float64), ((SMALLEST + 8, 600), torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("name", [*MATRIX, "svc"])
def test_neither_threads_nor_addresses_change_a_bit(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    deltas, before = make_deltas(shape, 2, dtype), torch.get_num_threads()
    results = set()
    try:
        for threads, offset in ((1, 0), (3, 16), (2, 80)):  # elements; slabs are aligned to 64 bytes
            torch.set_num_threads(threads)
            shifted = [torch.empty(delta.numel() + offset, dtype=dtype)[offset:].view(shape) for delta in deltas]
            moved = [there.copy_(delta) for there, delta in zip(shifted, deltas, strict=True)]
            results.add(bits_of(merge_any(name, *moved)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(results) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "models"),
    [
        ((800, 800), "float32", 2),
        ((600, 600), "float64", 6),
        ((500, 2000), "bfloat16", 3),
        ((220, 2600), "float32", 12),
    ],
    ids=str,
)
def test_no_more_memory_is_taken_than_promised(tmp_path: Path, shape: tuple[int, int], dtype: str, models: int) -> None:
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    script = Path(__file__).with_name("measure_matrix.py")
    command = [sys.executable, str(script), str(tmp_path), *map(str, shape), dtype, str(models)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {*MATRIX, "svc"}
    for name, sizes in found.items():
        assert 0 < sizes["took"] <= sizes["promised"], name
