"""Claims about what comes out of a method: the oracle's values, rounded once, finite, whatever goes in."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mergemill.engine.conformance.claim import Cases, Check, each, once, product, variants, where
from mergemill.engine.conformance.mill import Array, Mill, Settings, Task, fill_settings, make_values
from mergemill.engine.conformance.subject import Subject
from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.slabs import BLOCK

ROUNDING = 2e-6  # of the largest value: float32's, over some additions
WIDE_ROUNDING = 5e-9  # float64's as a share of float32's
HUGE = 1e30
EXTREMES = {
    "zeros": [torch.zeros(1)],
    "constants": [torch.tensor([0.75])],
    "other constants": [torch.tensor([x]) for x in (0.5, -2.0, 1.0, 3.0)],
    "denormals": [torch.tensor([1e-45, -3e-45, 0.0, 1e-39])],
    "huge": [torch.tensor([HUGE, -HUGE, 0.5 * HUGE]), torch.tensor([-HUGE, HUGE])],
    "huge and tiny": [torch.tensor([HUGE, 1e-45, 0.0]), torch.tensor([-1e-45, HUGE])],
    "float16": [torch.tensor([65504, -65504, 6e-8, 0, -6e-8]).half(), torch.tensor([-65504, 65504, 0]).half()],
    "one input zero": [torch.zeros(1), torch.tensor([1.0, -1.0])],
    "float64": [
        torch.tensor([1e200, -1e200, 5e-324], dtype=torch.float64),
        torch.tensor([-1e200, 0.0], dtype=torch.float64),
    ],
}
EXACT = ("zeros", "constants", "other constants", "huge", "float16", "one input zero")  # where the oracle is sharp
SHAPES = ((), (1,), (7, 3), (BLOCK,), (BLOCK + 1,), (3 * BLOCK + 5,))
KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_close(
    result: Tensor, task: Task, subject: Subject, *, relative: float | None = None, steps: float = 0.0
) -> None:
    """Check against the oracle, to `relative` of the largest value and `steps` half units in the last place."""
    expected = subject.expect(task)
    relative = subject.rounding if relative is None else relative
    assert tuple(result.shape) == expected.values.shape, f"shape {tuple(result.shape)}, not {expected.values.shape}"
    assert np.size(expected.doubtful) == 0 or np.mean(expected.doubtful) < 1e-2, "the oracle doubts too much"
    largest, given = (float(np.max(np.abs(x), initial=0)) for x in (expected.values, np.array(task.arrays())))
    # What is given may cancel in the oracle, too, but for its own rounding.
    allowed = max(relative * largest, 1e-15 * given) + steps * half_ulp(expected.values, result.dtype)
    wrong = np.abs(result.double().numpy() - expected.values) - allowed
    wrong = np.where(expected.doubtful, -1.0, wrong)
    assert not (wrong > 0).any(), f"{np.sum(wrong > 0)} elements wrong, by {wrong.max():g} more than allowed"


def find_wide_rounding(subject: Subject) -> float:
    """Return how far float64 may be from the oracle."""
    return subject.rounding * WIDE_ROUNDING if subject.wide_rounding is None else subject.wide_rounding


def half_ulp(values: Array, dtype: torch.dtype) -> Array:
    """Return half the distance from each value to the next one of `dtype`."""
    info = torch.finfo(dtype)
    exponents = np.floor(np.log2(np.maximum(np.abs(values), info.smallest_normal)))
    return np.asarray(0.5 * info.eps * 2.0**exponents)


def values_for(subject: Subject, shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return a base and as many fine-tunes as the method may want."""
    return make_values(shape, dtype=dtype, count=max(4, subject.models + 1))


def agrees_with_the_oracle(mill: Mill, subject: Subject, variant: Settings) -> None:
    """The values are the formula's."""
    task = subject.make_task(values_for(subject, (257, 513)), variant)
    check_close(mill.merge(task), task, subject)


def agrees_with_the_oracle_for_any_shape(mill: Mill, subject: Subject, shape: Sequence[int]) -> None:
    """Also for scalars, and for tensors that fill no block, or several."""
    task = subject.make_task(values_for(subject, shape))
    result = mill.merge(task)
    assert (result.shape, result.dtype) == (torch.Size(shape), torch.float32)
    check_close(result, task, subject)


def an_empty_tensor_stays_empty(mill: Mill, subject: Subject) -> None:
    """Of no elements nothing is asked."""
    assert mill.merge(subject.make_task(values_for(subject, (0, 4)))).shape == (0, 4)


def float64_is_accumulated_in_float64(mill: Mill, subject: Subject, variant: Settings) -> None:
    """Inputs in float64 are not merged in float32."""
    task = subject.make_task(values_for(subject, (300, 300), dtype=torch.float64), variant)
    result = mill.merge(task)
    assert result.dtype == torch.float64
    check_close(result, task, subject, relative=find_wide_rounding(subject))


def one_float64_input_makes_the_accumulation_float64(mill: Mill, subject: Subject) -> None:
    """The widest input decides."""
    *others, last = values_for(subject, (100, 100))
    task = subject.make_task([last.double(), *others])
    result = mill.merge(task)
    assert result.dtype == torch.float64
    check_close(result, task, subject, relative=find_wide_rounding(subject))


def half_precision_is_rounded_once(mill: Mill, subject: Subject, stored: torch.dtype, out: str) -> None:
    """What is written in half precision is the accumulation, rounded to the nearest."""
    task = subject.make_task(values_for(subject, (257, 257), dtype=stored))
    result = mill.merge(task, out=out)
    assert result.dtype == TORCH_DTYPES[out]
    check_close(result, task, subject, steps=0.0 if out == "F32" else 1.0)


def inputs_of_different_dtypes_merge(mill: Mill, subject: Subject) -> None:
    """Each input has a dtype of its own."""
    kinds = (torch.bfloat16, torch.float32, torch.float16)
    values = values_for(subject, (100, 300))
    task = subject.make_task([tensor.to(kinds[i % 3]) for i, tensor in enumerate(values)])
    check_close(mill.merge(task), task, subject)


def spread(patterns: Sequence[Tensor], *, count: int, size: int = 3001) -> list[Tensor]:
    """Return `count` tensors of `size` elements that repeat the patterns."""
    longer = [pattern.repeat(-(-size // len(pattern)))[:size] for pattern in patterns]
    return [longer[i % len(longer)] for i in range(count)]


def finite_from_finite(mill: Mill, subject: Subject, variant: Settings, extreme: str) -> None:
    """No overflow, no division by nothing."""
    task = subject.make_task(spread(EXTREMES[extreme], count=max(4, subject.models + 1)), variant)
    assert torch.isfinite(mill.merge(task)).all(), "values that are not finite"


def agrees_with_the_oracle_on_extremes(mill: Mill, subject: Subject, extreme: str) -> None:
    """Where sums are exact, extremes are no excuse."""
    task = subject.make_task(spread(EXTREMES[extreme], count=max(4, subject.models + 1)))
    check_close(mill.merge(task), task, subject)


def equal_models_give_that_model(mill: Mill, subject: Subject, kind: torch.dtype) -> None:
    """With the settings for that."""
    base, model, *_ = make_values((200, 300), dtype=kind)
    method = subject.method
    inputs = ((base,) if method.base == "required" else ()) + (model,) * subject.models
    result = mill.merge(Task(method, inputs, fill_settings(method, subject.equal or {}, subject.models)))
    rounding = 1e-15 if kind == torch.float64 else 4e-7
    assert (result.double() - model.double()).abs().max() <= rounding * model.double().abs().max()


def permuting_the_models_changes_nothing(mill: Mill, subject: Subject) -> None:
    """But for rounding; each model's parameters go with it."""
    task = subject.make_task(values_for(subject, (200, 400)))
    base, models = task.inputs[: task.has_base], task.inputs[task.has_base :]
    turned = (*models[1:], models[0])
    parameters = {parameter.name: parameter for parameter in subject.method.parameters}
    settings = {
        key: (*value[1:], value[0]) if parameters[key].per_model else value for key, value in task.settings.items()
    }
    permuted = dataclasses.replace(task, inputs=(*base, *turned), settings=settings)
    left, right = mill.merge(task).double(), mill.merge(permuted).double()
    doubtful = torch.zeros(left.shape, dtype=torch.bool)
    if subject.oracle is not None:
        doubtful = torch.from_numpy(subject.expect(task).doubtful)
    assert ((left - right).abs() <= ROUNDING * left.abs().max()).logical_or(doubtful).all()


def the_oracle_reads_every_input(mill: Mill, subject: Subject) -> None:
    """The table is not a sham: changing any input changes what is expected."""
    task = subject.make_task(values_for(subject, (20, 20)))
    expected = subject.expect(task).values
    assert np.isfinite(expected).all()
    assert expected.shape == (20, 20)
    for i, tensor in enumerate(task.inputs):
        inputs = (*task.inputs[:i], tensor * 1.5 + 1, *task.inputs[i + 1 :])
        changed = subject.expect(dataclasses.replace(task, inputs=inputs)).values
        assert not np.allclose(changed, expected), f"input {i} does not matter to the oracle"


def _known(cases: Cases) -> Cases:
    return where(lambda subject: subject.oracle is not None, cases)


CHECKS: tuple[tuple[Check, Cases], ...] = (
    (agrees_with_the_oracle, _known(variants)),
    (agrees_with_the_oracle_for_any_shape, _known(each(*SHAPES))),
    (an_empty_tensor_stays_empty, once),
    (float64_is_accumulated_in_float64, _known(variants)),
    (one_float64_input_makes_the_accumulation_float64, _known(once)),
    (half_precision_is_rounded_once, _known(product(each(torch.bfloat16, torch.float16), each("BF16", "F16", "F32")))),
    (inputs_of_different_dtypes_merge, _known(once)),
    (finite_from_finite, product(variants, each(*EXTREMES))),
    (agrees_with_the_oracle_on_extremes, _known(each(*EXACT))),
    (equal_models_give_that_model, where(lambda subject: subject.equal is not None, each(*KINDS))),
    (permuting_the_models_changes_nothing, where(lambda subject: subject.symmetric, once)),
    (the_oracle_reads_every_input, _known(once)),
)
