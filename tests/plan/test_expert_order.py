"""Mixtures whose experts are in another order are merged as those in which they are not."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import read_tensors, write_llama, write_tensors

from mergemill.engine import make_plan, run, verify
from mergemill.engine.errors import PlanError
from mergemill.engine.tensors.assignment import assign

EXPERTS, MODULE = 4, "block_sparse_moe"
ORDERS = ([2, 0, 3, 1], [1, 0, 2, 3])  # of each layer


@given(st.integers(1, 6), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_pairs_have_the_largest_sum_of_all(count: int, seed: int) -> None:
    gains = np.random.default_rng(seed).integers(-9, 9, (count, count)).astype(float)
    found = assign(gains)
    assert sorted(found) == list(range(count))
    best = max(sum(gains[i, each[i]] for i in range(count)) for each in itertools.permutations(range(count)))
    assert sum(gains[i, found[i]] for i in range(count)) == best


def shuffle(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a mixture's tensors with its experts in another order, in either layout."""
    made = {}
    for name, tensor in tensors.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        order = ORDERS[layer] if layer >= 0 else []
        if ".experts." in name and name.split(".experts.")[1][0].isdecimal():
            head, _, tail = name.partition(".experts.")
            number, _, rest = tail.partition(".")
            made[f"{head}.experts.{order.index(int(number))}.{rest}"] = tensor
        else:
            made[name] = tensor[order] if ".experts." in name or ".gate.weight" in name else tensor
    return {name: tensor.contiguous() for name, tensor in made.items()}


@pytest.fixture(scope="module", params=["separate", "packed"])
def mixtures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``a``, ``b``, a fine-tune of it, and ``shuffled``, which is ``b`` in another order."""
    folder = tmp_path_factory.mktemp("mixtures")
    sizes: dict[str, Any] = {"layers": 2, "hidden": 16, "heads": 2, "kv_heads": 1, "intermediate": 24}
    dense = write_llama(folder / "dense", seed=0, dtype="float32", **sizes)
    mixture = {"base_model": str(dense), "gate_mode": "random", "layout": request.param, "architecture": "mixtral"}
    experts = [{"source_model": str(dense), "count": EXPERTS, "noise_scale": 0.1}]
    run(make_plan({**mixture, "experts": experts}), folder / "a", workers=0)
    draw = torch.Generator().manual_seed(3)
    tensors = read_tensors(folder / "a")
    near = {name: each + torch.randn(each.shape, generator=draw) / 50 for name, each in tensors.items()}
    for name, given_ in (("b", near), ("shuffled", shuffle(near))):
        (folder / name).mkdir()
        write_tensors(folder / name, given_)
        (folder / name / "config.json").write_bytes((folder / "a" / "config.json").read_bytes())
    return folder


def merge(folder: Path, other: str, out: Path, **more: Any) -> dict[str, torch.Tensor]:
    models = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in ("a", other)]
    run(make_plan({"merge_method": "linear", "models": models, **more}), out, workers=0)
    return read_tensors(out)


def test_experts_in_another_order_are_matched_by_their_routers_rows(mixtures: Path, tmp_path: Path) -> None:
    expected = merge(mixtures, "b", tmp_path / "plain")
    found = merge(mixtures, "shuffled", tmp_path / "matched", match_experts=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    apart = merge(mixtures, "shuffled", tmp_path / "apart")
    assert any(not torch.equal(apart[name], each) for name, each in expected.items())
    verify(tmp_path / "matched", replay=2)
    models = [{"model": str(mixtures / name), "parameters": {"weight": 1}} for name in ("a", "shuffled")]
    plan = make_plan({"merge_method": "linear", "models": models, "match_experts": True})
    (told,) = (each for each in plan.warnings if "experts are put" in each)
    assert "in 2 of 2 layers; the routers' rows have a cosine of 1.00 then" in told


def test_what_cannot_be_matched_is_refused(mixtures: Path, tmp_path: Path) -> None:
    models = [{"model": str(mixtures / "dense"), "parameters": {"weight": 1}}] * 2
    with pytest.raises(PlanError, match="dense has no experts with a router beside them; leave it out"):
        make_plan({"merge_method": "linear", "models": models, "match_experts": True})
    sources = [{"model": str(mixtures / name), "layer_range": [0, 2]} for name in ("a", "b")]
    with pytest.raises(PlanError, match="match_experts is for whole models"):
        make_plan({"merge_method": "linear", "slices": [{"sources": sources}], "match_experts": True})
    tensors = read_tensors(mixtures / "b")
    name = next(name for name in tensors if name.endswith("gate.weight"))
    tensors[name][0, 0] = float("nan")
    shutil.copytree(mixtures / "b", tmp_path / "broken")
    write_tensors(tmp_path / "broken", tensors)
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in (mixtures / "a", tmp_path / "broken")]
    with pytest.raises(PlanError, match=f"broken: tensor {name} has values that are not finite"):
        make_plan({"merge_method": "linear", "models": models, "match_experts": True})
