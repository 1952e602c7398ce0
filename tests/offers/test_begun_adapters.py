"""Adapters that were begun inside their base (PiSSA, OLoRA): what they were begun as is taken out of it first.

peft decomposes in float32, and what it makes of the base anew is off by a few 1e-6 of weights of about 1; the same
formula in float64 is met to the rounding of the result.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_gpt2, make_llama, make_qwen, merge_by_peft, write_adapter, write_model
from models import read_tensors
from safetensors.torch import load_file

from mergemill.engine import make_adapter_plan, make_plan, run
from mergemill.engine.checkpoint.adapter_config import parse_adapter_config
from mergemill.engine.errors import InputError, PlanError

TARGETS = ["q_proj", "k_proj", "down_proj", "lm_head"]
PATTERNS = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 7}}
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "pissa": (make_llama, {"init_lora_weights": "pissa", "use_rslora": True, **PATTERNS}),
    "pissa with dora": (make_llama, {"init_lora_weights": "pissa", "use_dora": True}),
    "pissa of conv1d": (
        make_gpt2,
        {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "olora": (make_llama, {"init_lora_weights": "olora", **PATTERNS}),
}


def copying(folder: Path) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": f"{folder / 'base'}+{folder / 'lora'}"}]}


def take_out(weight: np.ndarray, config: Any, module: str, product: np.ndarray) -> np.ndarray:
    """Return W − top_r(W) + s·BA, or W − s·Q_rR_r + s·BA, from the papers' formulas in float64."""
    rank, scale = config.find_rank(module), config.find_scale(module)
    if config.beginning == "pissa":
        left, values, right = np.linalg.svd(weight)
        return weight - (left[:, :rank] * values[:rank]) @ right[:rank] + scale * product
    q, r = np.linalg.qr(weight)
    return weight - scale * q[:, :rank] @ r[:rank] + scale * product


@pytest.mark.parametrize("case", CASES)
def test_what_an_adapter_was_begun_as_is_taken_out_of_its_base(case: str, tmp_path: Path) -> None:
    make, config = CASES[case]
    base = make()
    write_model(base, tmp_path / "base")
    write_adapter(base, tmp_path / "lora", **{"target_modules": TARGETS, **config})
    expected = merge_by_peft(base, tmp_path / "lora")
    run(make_plan(copying(tmp_path)), tmp_path / "out", workers=0)
    found, before = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "base")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    adapter = parse_adapter_config((tmp_path / "lora" / "adapter_config.json").read_bytes(), where="")
    changed = [key.split(".lora_A")[0] for key in factors if ".lora_A" in key]
    stored = [key for key in changed if f"{key}.base_layer.weight" in factors]  # as of a head: what was left of it
    assert len(changed) == sum(not torch.equal(found[name], before[name]) for name in found)
    if adapter.has_magnitudes:
        return
    for key in (key for key in changed if key not in stored):
        module = key.removeprefix("base_model.model.")
        a, b = (factors[f"{key}.lora_{side}.weight"].double().numpy() for side in "AB")
        weight, merged = (each[f"{module}.weight"].double().numpy() for each in (before, found))
        if adapter.transposed:
            weight, merged = weight.T, merged.T
        np.testing.assert_allclose(merged, take_out(weight, adapter, module, b @ a), rtol=2e-7, atol=2e-7)


def test_a_merge_of_several_passes_takes_it_out_as_a_copy_does(tmp_path: Path) -> None:
    base = make_llama()
    write_model(base, tmp_path / "base")
    write_adapter(base, tmp_path / "lora", init_lora_weights="pissa")
    run(make_plan(copying(tmp_path)), tmp_path / "copy", workers=0)
    made = []
    for number, model in enumerate((f"{tmp_path / 'base'}+{tmp_path / 'lora'}", str(tmp_path / "copy"))):
        models = [{"model": model, "parameters": {"weight": 0.7, "density": 0.4}}]
        recipe = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": models, "dtype": "float32"}
        run(make_plan(recipe), tmp_path / f"out{number}", workers=0)
        made.append((tmp_path / f"out{number}" / "model-00001-of-00001.safetensors").read_bytes())
    assert made[0] == made[1]


def test_a_matrix_that_does_not_fit_is_refused_with_what_would_do(tmp_path: Path) -> None:
    base = make_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=1)
    write_model(base, tmp_path / "base")
    write_adapter(base, tmp_path / "lora", init_lora_weights="pissa", target_modules=["down_proj"])
    with pytest.raises(PlanError, match=r"too little: tensor .*down_proj.weight needs \d+ bytes a worker: --memory 3"):
        run(make_plan(copying(tmp_path)), tmp_path / "out", workers=1, memory="8MiB")
    assert not (tmp_path / "out").exists()


REFUSED: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any], str]] = {
    "fast svd": (make_llama, {}, {"init_lora_weights": "pissa_niter_4"}, "is 'pissa_niter_4': it belongs to a base"),
    "corda": (make_llama, {}, {"init_lora_weights": "corda"}, "not the same twice or needs what is in no file; save"),
    "an embedding": (
        make_llama,
        {"target_modules": ["embed_tokens"]},
        {"init_lora_weights": "pissa"},
        "of an embedding or a kernel, of which peft loads none; save it",
    ),
    "olora of conv1d": (
        make_gpt2,
        {"target_modules": ["c_fc"], "fan_in_fan_out": True},
        {"init_lora_weights": "OLoRA"},
        "stored transposed: peft takes its factors from the wrong side",
    ),
    "a tied head, of which what was left is stored": (
        make_qwen,
        {"target_modules": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        "of lm_head.weight, which is tied: peft would take it out of the embedding too; save it",
    ),
    "no way to begin": (make_llama, {}, {"init_lora_weights": ["pissa"]}, 'must be true, false or a text, not ."pissa'),
    "a rank that is too large": (
        make_qwen,
        {"r": 17, "target_modules": ["k_proj"]},
        {"init_lora_weights": "pissa"},
        r"of rank 17, and model.layers.\d.self_attn.k_proj.weight \[16, 32\] has no more than 16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_makes_otherwise_each_time_or_not_at_all_is_refused(case: str, tmp_path: Path) -> None:
    make, config, said, message = REFUSED[case]
    base = make()
    write_model(base, tmp_path / "base")
    write_adapter(base, tmp_path / "lora", **config)
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    with pytest.raises(InputError, match=message):
        make_plan(copying(tmp_path))


def test_what_was_begun_in_a_base_does_not_add_up(tmp_path: Path) -> None:
    base = make_llama()
    write_model(base, tmp_path / "base")
    write_adapter(base, tmp_path / "lora", init_lora_weights="pissa")
    write_adapter(base, tmp_path / "other")
    weighted = {"model": str(tmp_path / "base"), "adapters": [{"adapter": str(tmp_path / "lora"), "weight": 0.5}]}
    both = {"adapters": [{"adapter": str(tmp_path / name)} for name in ("lora", "other")], "merge_method": "linear"}
    with pytest.raises(InputError, match=r"'pissa', and such does not add up: .* each must be plain LoRA"):
        make_plan({"merge_method": "passthrough", "models": [{"model": weighted}]})
    with pytest.raises(PlanError, match="'pissa': it belongs to a base that peft changes on loading, and none is read"):
        make_adapter_plan(both)
