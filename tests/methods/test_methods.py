"""What every merge method keeps to; methods that are added to the folder are covered by themselves."""

import dataclasses
from collections.abc import Sequence
from math import prod, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from methods.entry import as_arrays, make_deltas, make_masks
from methods.harness import Mill, Settings, Task, bits_of, fill_settings, make_values
from methods.suite import ENTRIES, find_entry, make_task
from torch import Tensor

from mergemill.engine.methods.catalogue import find_methods, get_method
from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.slabs import BLOCK, Span
from mergemill.engine.tensors.workspace import Workspace

METHODS = tuple(find_methods())
RANDOM = [name for name in METHODS if name in ENTRIES and ENTRIES[name].random]
SYMMETRIC = [name for name in METHODS if name in ENTRIES and ENTRIES[name].symmetric]
EQUAL = [name for name in METHODS if name in ENTRIES and ENTRIES[name].equal is not None]
VARIANTS = [
    pytest.param(name, variant, id=f"{name}-{i}")
    for name in METHODS
    if name in ENTRIES
    for i, variant in enumerate(ENTRIES[name].variants)
]
LONG = (8 * BLOCK + 5,)
ROUNDING = 2e-6  # of the largest value: float32's, over some additions
SIGMAS = 4.5


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Mill:
    return Mill(tmp_path_factory.mktemp("mill"))


def check_close(result: Tensor, task: Task, *, relative: float | None = None, steps: float = 0.0) -> None:
    """Check against the oracle, to `relative` of the largest value and `steps` half units in the last place."""
    entry = find_entry(task.method)
    expected = entry.oracle(task)
    relative = entry.rounding if relative is None else relative
    assert tuple(result.shape) == expected.values.shape
    assert np.mean(expected.doubtful) < 1e-2
    largest, given = (float(np.max(np.abs(x), initial=0)) for x in (expected.values, np.array(as_arrays(task))))
    # What is given may cancel in the oracle, too, but for its own rounding.
    allowed = max(relative * largest, 1e-15 * given) + steps * half_ulp(expected.values, result.dtype)
    wrong = np.abs(result.double().numpy() - expected.values) - allowed
    wrong = np.where(expected.doubtful, -1.0, wrong)
    assert not (wrong > 0).any(), f"{np.sum(wrong > 0)} elements wrong, by {wrong.max():g} more than allowed"


def half_ulp(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return half the distance from each value to the next one of `dtype`."""
    info = torch.finfo(dtype)
    exponents = np.floor(np.log2(np.maximum(np.abs(values), info.smallest_normal)))
    return 0.5 * info.eps * 2.0**exponents


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_an_entry_in_the_suite(name: str) -> None:
    find_entry(name)


def test_a_method_without_an_entry_is_asked_for_one() -> None:
    with pytest.raises(AssertionError, match=r"'newest' is not in ENTRIES of tests/methods/entries; add an entry"):
        find_entry("newest")


# ----------------------------------------------------------------------------------------- what must come out
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_agrees_with_the_oracle(mill: Mill, name: str, variant: Settings) -> None:
    task = make_task(name, make_values((257, 513)), variant)
    check_close(mill.merge(task), task)


@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (BLOCK,), (BLOCK + 1,), (3 * BLOCK + 5,)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_agrees_with_the_oracle_for_any_shape(mill: Mill, name: str, shape: Sequence[int]) -> None:
    task = make_task(name, make_values(shape))
    result = mill.merge(task)
    assert (result.shape, result.dtype) == (torch.Size(shape), torch.float32)
    check_close(result, task)


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_tensor_stays_empty(mill: Mill, name: str) -> None:
    assert mill.merge(make_task(name, make_values((0, 4)))).shape == (0, 4)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_float64_is_accumulated_in_float64(mill: Mill, name: str, variant: Settings) -> None:
    task = make_task(name, make_values((300, 300), dtype=torch.float64), variant)
    result = mill.merge(task)
    assert result.dtype == torch.float64
    check_close(result, task, relative=find_entry(name).rounding * 5e-9)


@pytest.mark.parametrize("name", METHODS)
def test_one_float64_input_makes_the_accumulation_float64(mill: Mill, name: str) -> None:
    *others, last = make_values((100, 100))
    task = make_task(name, [last.double(), *others])
    result = mill.merge(task)
    assert result.dtype == torch.float64
    check_close(result, task, relative=find_entry(name).rounding * 5e-9)


@pytest.mark.parametrize("out", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_rounded_once(mill: Mill, name: str, stored: torch.dtype, out: str) -> None:
    task = make_task(name, make_values((257, 257), dtype=stored))
    result = mill.merge(task, out=out)
    assert result.dtype == TORCH_DTYPES[out]
    check_close(result, task, steps=0.0 if out == "F32" else 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_inputs_of_different_dtypes_merge(mill: Mill, name: str) -> None:
    values = make_values((100, 300))
    kinds = (torch.bfloat16, torch.float32, torch.float16, torch.float32)
    task = make_task(name, [tensor.to(kind) for tensor, kind in zip(values, kinds, strict=True)])
    check_close(mill.merge(task), task)


HUGE = 1e30
EXTREMES = {
    "zeros": [torch.zeros(1)],
    "constants": [torch.tensor([0.75])],
    "other constants": [torch.tensor([x]) for x in (0.5, -2.0, 1.0, 3.0)],
    "denormals": [torch.tensor([1e-45, -3e-45, 0.0, 1e-39])],
    "huge": [torch.tensor([HUGE, -HUGE, 0.5 * HUGE]), torch.tensor([-HUGE, HUGE])],
    "huge and tiny": [torch.tensor([HUGE, 1e-45, 0.0]), torch.tensor([-1e-45, HUGE])],
    "float16": [
        torch.tensor([65504, -65504, 6e-8, 0, -6e-8]).half(),
        torch.tensor([-65504, 65504, 0]).half(),
    ],
    "one input zero": [torch.zeros(1), torch.tensor([1.0, -1.0])],
    "float64": [
        torch.tensor([1e200, -1e200, 5e-324], dtype=torch.float64),
        torch.tensor([-1e200, 0.0], dtype=torch.float64),
    ],
}


def spread(patterns: Sequence[Tensor], size: int = 3001) -> list[Tensor]:
    """Return four tensors of `size` elements that repeat the patterns."""
    longer = [pattern.repeat(-(-size // len(pattern)))[:size] for pattern in patterns]
    return [longer[i % len(longer)] for i in range(4)]


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_finite_from_finite(mill: Mill, name: str, variant: Settings, extreme: str) -> None:
    task = make_task(name, spread(EXTREMES[extreme]), variant)
    assert torch.isfinite(mill.merge(task)).all()


@pytest.mark.parametrize("extreme", ["zeros", "constants", "other constants", "huge", "float16", "one input zero"])
@pytest.mark.parametrize("name", METHODS)
def test_agrees_with_the_oracle_on_extremes(mill: Mill, name: str, extreme: str) -> None:
    task = make_task(name, spread(EXTREMES[extreme]))
    check_close(mill.merge(task), task)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", EQUAL)
def test_equal_models_give_that_model(mill: Mill, name: str, kind: torch.dtype) -> None:
    base, model, *_ = make_values((200, 300), dtype=kind)
    method, entry = get_method(name), find_entry(name)
    inputs = ((base,) if method.base == "required" else ()) + (model,) * entry.models
    result = mill.merge(Task(name, inputs, fill_settings(method, entry.equal or {}, entry.models)))
    rounding = 1e-15 if kind == torch.float64 else 4e-7
    assert (result.double() - model.double()).abs().max() <= rounding * model.double().abs().max()


@pytest.mark.parametrize("name", SYMMETRIC)
def test_permuting_the_models_changes_nothing(mill: Mill, name: str) -> None:
    task = make_task(name, make_values((200, 400)))
    base, models = task.inputs[: task.has_base], task.inputs[task.has_base :]
    turned = (*models[1:], models[0])
    parameters = {parameter.name: parameter for parameter in get_method(name).parameters}
    settings = {
        key: (*value[1:], value[0]) if parameters[key].per_model else value for key, value in task.settings.items()
    }
    permuted = dataclasses.replace(task, inputs=(*base, *turned), settings=settings)
    left, right = mill.merge(task).double(), mill.merge(permuted).double()
    doubtful = torch.from_numpy(find_entry(name).oracle(task).doubtful)
    assert ((left - right).abs() <= ROUNDING * left.abs().max()).logical_or(doubtful).all()


# --------------------------------------------------------------------------- the same bits, however it is run
@pytest.mark.parametrize("name", METHODS)
def test_inputs_are_not_changed(mill: Mill, name: str) -> None:
    expression = mill.express(make_task(name, make_values((2 * BLOCK,))))
    file = Path(expression.inputs[0].pin.url)  # type: ignore[attr-defined]
    stored, span = file.read_bytes(), Span(0, 2 * BLOCK)
    work = Workspace(torch.empty(16 << 20, dtype=torch.uint8), keep=True)
    totals: list[tuple[object, ...]] = []
    gather, statistics = expression.advance(totals)
    while gather is not None:
        work.next_slab()
        totals.append(expression.gather(gather, span, work))
        gather, statistics = expression.advance(totals)
    work.next_slab()
    expression.combine(statistics, span, work)
    for read in expression.reads(span):
        kept = bytes(work.read(read.pin, read.offset_bytes, read.size_bytes).numpy())
        assert kept == stored[read.offset_bytes : read.offset_bytes + read.size_bytes]
    assert work.read_bytes == sum(read.size_bytes for read in expression.reads(span)), "read once and kept"
    assert file.read_bytes() == stored


@pytest.mark.parametrize("name", METHODS)
def test_the_same_task_gives_the_same_bits(mill: Mill, name: str) -> None:
    task = make_task(name, make_values((300, 300)))
    assert bits_of(mill.merge(task)) == bits_of(mill.merge(task))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_any_slab_gives_the_same_bits(mill: Mill, name: str, dtype: torch.dtype) -> None:
    expression = mill.express(make_task(name, make_values(LONG, dtype=dtype)))
    results = {bits_of(mill.run(expression, slab=blocks * BLOCK)) for blocks in (1, 2, 3, 7)}
    assert len(results) == 1


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_any_cut_into_parts_gives_the_same_bits(mill: Mill, name: str, variant: Settings) -> None:
    expression = mill.express(make_task(name, make_values((4 * BLOCK + 5,), dtype=torch.bfloat16), variant))
    whole = bits_of(mill.run(expression, out="BF16"))
    assert bits_of(mill.run(expression, out="BF16", parts=2)) == whole
    assert bits_of(mill.run(expression, out="BF16", parts=5, slab=BLOCK)) == whole


@pytest.mark.parametrize("name", METHODS)
def test_keeping_the_inputs_between_passes_gives_the_same_bits(mill: Mill, name: str) -> None:
    expression = mill.express(make_task(name, make_values((3 * BLOCK + 5,))))
    assert bits_of(mill.run(expression, keep=True)) == bits_of(mill.run(expression, keep=False))


@pytest.mark.parametrize("name", METHODS)
def test_threads_of_torch_change_nothing(mill: Mill, name: str) -> None:
    expression = mill.express(make_task(name, make_values((3 * BLOCK + 5,))))
    before = torch.get_num_threads()
    try:
        results = set()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.add(bits_of(mill.run(expression)))
    finally:
        torch.set_num_threads(before)
    assert len(results) == 1


# --------------------------------------------------------------------------------------------- random methods
@pytest.mark.parametrize("name", METHODS)
def test_seed_tensor_and_place_matter_to_random_methods_alone(mill: Mill, name: str) -> None:
    task = make_task(name, make_values((100, 100)))
    others = [
        dataclasses.replace(task, seed=task.seed + 1),
        dataclasses.replace(task, tensor=task.tensor + "_"),
        dataclasses.replace(task, models=tuple(place + 1 for place in task.places)),
    ]
    same = [bits_of(mill.merge(other)) == bits_of(mill.merge(task)) for other in others]
    assert same == [not find_entry(name).random] * 3


def evenly(name: str) -> Settings:
    """Return the settings with which a random method keeps every element with the density itself."""
    return find_entry(name).even or {}


def find_mask(
    mill: Mill, name: str, density: float, *, size: int = 3 * BLOCK + 5, place: int = 1, **other: object
) -> Tensor:
    """Return, as 0 and 1, what a random method keeps of a task vector of ones."""
    given = {"weight": (1.0,), "density": (density,), "rescale": False, "normalize": False, **evenly(name)}
    settings = fill_settings(get_method(name), given, 1)
    return mill.merge(Task(name, (torch.zeros(size), torch.ones(size)), settings, models=(place,), **other))


@pytest.mark.parametrize("density", [0.003, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", RANDOM)
def test_as_many_stay_as_the_density_says(mill: Mill, name: str, density: float) -> None:
    mask = find_mask(mill, name, density)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    spread = sqrt(len(mask) * density * (1 - density))
    assert abs(float(mask.double().sum()) - len(mask) * density) < SIGMAS * spread
    for block in mask.split(BLOCK)[:3]:
        assert abs(float(block.double().sum()) - BLOCK * density) < SIGMAS * sqrt(BLOCK * density * (1 - density))


@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize("name", RANDOM)
def test_masks_are_independent(mill: Mill, name: str, density: float) -> None:
    def score(left: Tensor, right: Tensor) -> float:
        """Return how far the count of elements in both masks is from chance, in standard deviations."""
        both = float((left * right).double().sum())
        chance = float(left.double().sum() * right.double().sum()) / len(left)
        return (both - chance) / (sqrt(len(left)) * density * (1 - density))

    mask = find_mask(mill, name, density)
    pairs = {
        "another model": (mask, find_mask(mill, name, density, place=2)),
        "another tensor": (mask, find_mask(mill, name, density, tensor="model.layers.4.mlp.up_proj.weight")),
        "another seed": (mask, find_mask(mill, name, density, seed=8)),
        "the block before": (mask[:BLOCK], mask[BLOCK : 2 * BLOCK]),
        "the element before": (mask[:-1], mask[1:]),
        "a row before": (mask[:-1024], mask[1024:]),
    }
    scores = {pair: score(*masks) for pair, masks in pairs.items()}
    assert all(abs(value) < SIGMAS for value in scores.values()), scores


@pytest.mark.parametrize("name", RANDOM)
def test_two_models_of_one_merge_have_masks_of_their_own(mill: Mill, name: str) -> None:
    size = 2 * BLOCK
    given = {"weight": (1.0, 2.0), "density": (0.5, 0.5), "rescale": False, "normalize": False, **evenly(name)}
    inputs = (torch.zeros(size), torch.ones(size), torch.ones(size))
    result = mill.merge(Task(name, inputs, fill_settings(get_method(name), given, 2)))
    counts = np.bincount(result.int().numpy(), minlength=4)
    assert float(((counts - size / 4) ** 2 / (size / 4)).sum()) < 21.1, counts  # chi-square, 3 degrees, p = 1e-4


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", RANDOM)
def test_what_is_kept_is_scaled_by_the_ratio_of_l1_norms(mill: Mill, name: str, density: float) -> None:
    size = 2 * BLOCK + 5
    base, model = torch.zeros(size), make_values((size,), count=2)[1]
    given = {"weight": (1.0,), "density": (density,), "rescale": True, "normalize": False, **evenly(name)}
    task = Task(name, (base, model), fill_settings(get_method(name), given, 1))
    result, (delta,), (mask,) = mill.merge(task).double().numpy(), make_deltas(task), make_masks(task)
    factor = np.abs(delta).sum() / np.abs(delta[mask]).sum()
    assert factor == pytest.approx(1 / density, rel=0.05)
    assert np.array_equal(result != 0, mask & (delta != 0))
    assert np.allclose(result[mask], factor * delta[mask], rtol=3e-7, atol=0)
    assert np.abs(result).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-6)
    error = SIGMAS * np.sqrt((1 / density - 1) * np.mean(delta**2) / size)
    assert abs(result.mean() - delta.mean()) < error, "the mean is preserved"


# ---------------------------------------------------------------------------------------------- sign election
@pytest.mark.parametrize("name", [name for name in ("ties", "dare_ties") if name in METHODS])
def test_an_elected_sign_of_zero_counts_as_plus(mill: Mill, name: str) -> None:
    inputs = (torch.tensor([10.0, 10.0]), torch.tensor([12.0, 8.0]), torch.tensor([8.0, 12.0]))
    given = {"weight": (1.0, 1.0), "density": (1.0, 1.0), "normalize": True}
    result = mill.merge(Task(name, inputs, fill_settings(get_method(name), given, 2)))
    assert result.tolist() == [12.0, 12.0]


def test_ties_keeps_exactly_as_many_as_asked_where_all_are_equal(mill: Mill) -> None:
    size = 2 * BLOCK + 100
    given = {"weight": (1.0,), "density": (0.7,), "normalize": False}
    task = Task("ties", (torch.zeros(size), torch.ones(size)), fill_settings(get_method("ties"), given, 1))
    kept = int(0.7 * size)
    for slab in (BLOCK, 3 * BLOCK):
        result = mill.merge(task, slab=slab)
        assert (result[:kept] == 1).all()
        assert (result[kept:] == 0).all()


def test_the_oracle_of_every_method_reads_every_input() -> None:
    """The suite's table is not a sham: changing any input changes what it expects."""
    for name in METHODS:
        task = make_task(name, make_values((20, 20)))
        expected = find_entry(name).oracle(task).values
        assert np.isfinite(expected).all()
        assert len(as_arrays(task)) == len(task.inputs)
        for i, tensor in enumerate(task.inputs):
            inputs = (*task.inputs[:i], tensor * 1.5 + 1, *task.inputs[i + 1 :])
            assert not np.allclose(find_entry(name).oracle(dataclasses.replace(task, inputs=inputs)).values, expected)
        assert prod(expected.shape) == 400
