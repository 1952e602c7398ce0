"""Small tensors of one kind are merged in one go, with the bytes and drifts of each merged alone."""

from pathlib import Path

import pytest
import torch
from models import write_json, write_tensors

from mergemill.engine import load_recipe, make_plan
from mergemill.engine.plan.values import Part
from mergemill.engine.runs.outputs.receipts import Receipt
from mergemill.engine.runs.tasks import task
from mergemill.engine.runs.tasks.together import iter_groups
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.tensors.slabs import SLAB

SHAPES = {f"model.layers.0.experts.{i:02}.weight": (40 + i // 8, 25) for i in range(16)} | {"model.norm.weight": (25,)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for number in range(3):
        torch.manual_seed(number)
        tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in SHAPES.items()}
        (folder / f"{number}").mkdir()
        write_tensors(folder / f"{number}", tensors)
        write_json(folder / f"{number}" / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    return folder


def plan_part(method: str, models: Path) -> Part:
    given = {"weight": 0.5} | ({"density": 0.5} if method != "linear" else {})
    recipe = {
        "merge_method": method,
        "models": [{"model": str(models / number), "parameters": given} for number in "12"],
        "dtype": "bfloat16",
    }
    (part,) = make_plan(load_recipe(recipe | ({"base_model": str(models / "0")} if method != "linear" else {}))).parts
    return part


def merge(part: Part) -> tuple[Receipt, bytes]:
    written = bytearray()
    receipt = task.merge_part(part, "shard", lambda _, data: written.extend(data), {}, Workplace(1 << 30, threads=1))
    return receipt, bytes(written)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_tensors_merged_together_have_the_bytes_of_each_alone(
    method: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = plan_part(method, models)
    together, data = merge(part)
    monkeypatch.setattr(task, "iter_groups", lambda pieces, *_, **__: ([piece] for piece in pieces))
    alone, expected = merge(part)
    assert data == expected
    assert (together.checksum, together.drifts, together.read_bytes) == (alone.checksum, alone.drifts, alone.read_bytes)


def test_those_of_one_shape_go_together_as_far_as_memory_allows(models: Path) -> None:
    part = plan_part("ties", models)

    def count(memory_bytes: int, *, alone: bool) -> list[int]:
        return [len(group) for group in iter_groups(part.pieces, memory_bytes, SLAB, alone=alone)]

    assert count(1 << 30, alone=False) == [8, 8, 1]
    assert count(1 << 30, alone=True) == [1] * 17
    assert count(part.pieces[0].projected.slab_bytes, alone=False) == [1] * 17
