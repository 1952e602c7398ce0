"""Families whose code is on the Hub alone: what their headers say is merged and stacked, and their configs follow."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families.remote import FAMILIES, L, RemoteFamily, V
from models import read_tensors
from safetensors.torch import save_file

from mergemill.engine import make_plan, run
from mergemill.engine.checkpoint.family import choose_family, find_tie, is_vocabulary
from mergemill.engine.errors import InputError
from mergemill.engine.plan.values import Plan

RANGES = ((0, 2), (1, L))
GIVERS = [layer for first, last in RANGES for layer in range(first, last)]


def write(name: str, family: RemoteFamily, folder: Path, seed: int) -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    shapes = {f"{family.stem}.{i}.{rest}": shape for i in range(L) for rest, shape in family.layer(i).items()}
    tensors = {key: torch.randn(shape, generator=stream) for key, shape in {**shapes, **family.outside}.items()}
    buffers = [key for key in tensors if key.endswith("inv_freq")]
    tensors |= {key: torch.ones_like(tensors[key]) for key in buffers}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}, "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({"model_type": name, **code, **family.config}))
    (folder / "modeling_own.py").write_text("raise RuntimeError('never executed')\n")
    return tensors


def plan_of(**recipe: Any) -> Plan:
    return make_plan(recipe)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_the_hubs_own_code_is_merged_and_stacked(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    a, b = (write(name, family, tmp_path / each, seed) for seed, each in enumerate("ab"))
    models = [{"model": str(tmp_path / each)} for each in "ab"]
    run(plan_of(merge_method="linear", models=models, parameters={"weight": 1}), tmp_path / "whole", workers=0)
    whole = read_tensors(tmp_path / "whole")
    assert whole.keys() == a.keys()
    assert all(torch.allclose(value, (a[key] + b[key]) / 2, atol=1e-6) for key, value in whole.items())
    assert json.loads((tmp_path / "whole" / "config.json").read_text())[family.count] == L
    assert (tmp_path / "whole" / "modeling_own.py").exists()
    slices = [{"sources": [{"model": str(tmp_path / "a"), "layer_range": list(each)}]} for each in RANGES]
    if family.verdict == "refused":
        with pytest.raises(InputError, match=family.why):
            plan_of(merge_method="passthrough", slices=slices)
        return
    plan = plan_of(merge_method="passthrough", slices=slices)
    assert any("calculates" in warning for warning in plan.warnings) == (family.verdict == "told")
    run(plan, tmp_path / "stack", workers=0)
    found = read_tensors(tmp_path / "stack")
    expected = {key: a[key] for key in family.outside}
    for new, old in enumerate(GIVERS):
        expected |= {f"{family.stem}.{new}.{rest}": a[f"{family.stem}.{old}.{rest}"] for rest in family.layer(old)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    config = json.loads((tmp_path / "stack" / "config.json").read_text())
    assert config[family.count] == len(GIVERS)
    followed = (family.count, *family.lists)
    for key in family.lists:
        given = family.config[key]
        by_index = [new for new, old in enumerate(GIVERS) if old in given]
        assert config[key] == (by_index if key.endswith("idxs") else [given[old] for old in GIVERS])
    before = json.loads((tmp_path / "a" / "config.json").read_text())
    assert all(config[key] == value for key, value in before.items() if key not in followed)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.head])
def test_a_head_and_its_embedding_are_known_by_what_the_family_calls_them(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    known = choose_family({"model_type": name})
    tokens = [key for key, shape in family.outside.items() if shape[0] == V]
    assert len(tokens) == 2
    assert all(is_vocabulary(key, known) for key in tokens)
    assert find_tie(family.head, [key for key in family.outside if key != family.head], known) in tokens
    for seed, each in enumerate("ab"):
        tensors = write(name, family, tmp_path / each, seed)
    del tensors[family.head]
    save_file(tensors, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    models = [{"model": str(tmp_path / each)} for each in "ab"]
    if family.config.get("tie_word_embeddings") is False:
        with pytest.raises(InputError, match=re.escape(family.head)):
            plan_of(merge_method="linear", models=models, parameters={"weight": 1})
