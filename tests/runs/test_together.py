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


DENSITY = {"density": [{"filter": ".03.", "value": 1.0}, {"filter": ".04.", "value": 0.0}, {"value": 0.5}]}
OUTLIERS = {"density": 0.4, "gamma": 0.1}
CASES = {
    "linear": ("linear", {}),
    "ties": ("ties", {"density": 0.5}),
    "ties, densities of their own": ("ties", DENSITY),
    "ties, rescaled": ("ties", {"density": 0.5, "rescale": True}),
    "consensus_ties": ("consensus_ties", {"density": 0.5}),
    "localize_stitch": ("localize_stitch", {"density": 0.05}),
    "breadcrumbs": ("breadcrumbs", OUTLIERS),
    "breadcrumbs_ties": ("breadcrumbs_ties", OUTLIERS),
    "dare_ties": ("dare_ties", {"density": 0.5}),
}


def plan_part(case: str, models: Path) -> Part:
    method, given = CASES[case]
    given = given if method == "localize_stitch" else {"weight": 0.5, **given}
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


@pytest.mark.parametrize("case", CASES)
def test_tensors_merged_together_have_the_bytes_of_each_alone(
    case: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = plan_part(case, models)
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
    own = plan_part("ties, densities of their own", models).pieces
    assert [len(group) for group in iter_groups(own, 1 << 30, SLAB, alone=False)] == [3, 1, 1, 3, 8, 1]
