"""Tensors that one computation gives are computed once by the task that writes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors
from runs.merging import SMALL_PART, hash_output, parts_of
from safetensors.torch import save_file
from torch import Tensor

from mergemill.engine import run
from mergemill.engine.checkpoint.checkpoint import open_checkpoint
from mergemill.engine.offers.formats import offer_stored
from mergemill.engine.plan.draft import Draft, finish
from mergemill.engine.plan.values import Origin, OutputTensor, Plan
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.together import Component

SHAPE = (300, 500)
CALLS: list[int] = []


@dataclass(frozen=True, slots=True)
class SumAndHalf:
    """The sum of two tensors, and the upper half of their difference."""

    inputs: tuple[Expression, ...]
    dtype: str = "F32"
    extra_bytes: int = 2 * 4 * SHAPE[0] * SHAPE[1]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        rows, columns = self.inputs[0].shape
        return (rows, columns), (rows // 2, columns)

    def compute(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        CALLS.append(1)
        a, b = inputs
        return a + b, (a - b)[: len(a) // 2]

    def describe(self) -> Mapping[str, Any]:
        return {"sum and half": 1}


@pytest.fixture
def models(tmp_path: Path) -> list[dict[str, Tensor]]:
    CALLS.clear()
    stream = torch.Generator().manual_seed(1)
    made = [{f"x{i}": torch.randn(SHAPE, generator=stream) for i in range(3)} for _ in "ab"]
    for name, tensors in zip("ab", made, strict=True):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return made


def plan(folder: Path, part_bytes: int) -> Plan:
    offers = [offer_stored(open_checkpoint(str(folder / name))) for name in "ab"]
    tensors = []
    for name in offers[0]:
        both = SumAndHalf(tuple(of[name].expression for of in offers))
        tensors += [OutputTensor(f"{name}.{part}", "F32", Component(both, i)) for i, part in enumerate(("sum", "up"))]
    with parts_of(part_bytes):
        return finish(Draft(Origin("toy", "sums", {}), tensors, [], [], donor=""), 1 << 30)


@pytest.mark.parametrize("part_bytes", [SMALL_PART, 1 << 30])
def test_what_is_computed_together_is_computed_once(
    part_bytes: int, models: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    asked = plan(tmp_path, part_bytes)
    assert len(asked.parts) == (3 if part_bytes == SMALL_PART else 1)
    run(asked, tmp_path / "out", workers=0)
    assert len(CALLS) == 3
    found = read_tensors(tmp_path / "out")
    for name in models[0]:
        a, b = (model[name] for model in models)
        assert torch.equal(found[f"{name}.sum"], a + b)
        assert torch.equal(found[f"{name}.up"], (a - b)[: SHAPE[0] // 2])


def test_it_has_the_same_bytes_in_any_parts(models: list[dict[str, Tensor]], tmp_path: Path) -> None:
    run(plan(tmp_path, SMALL_PART), tmp_path / "here", workers=0)
    run(plan(tmp_path, 1 << 30), tmp_path / "whole", workers=0)
    assert hash_output(tmp_path / "here") == hash_output(tmp_path / "whole")
