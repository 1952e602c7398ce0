"""What predicts later tokens (MTP): merged where all models have it, left out and told where only some do."""

from pathlib import Path
from typing import Any

import pytest
from plan.sketches import config, find_settings, llama, name_inputs, plan_of, read_json, write_sketch

PROJECTION = "model.layers.4.eh_proj.weight"
SEPARATE = {"mtp.layers.0.w": ("F32", (4,)), "mtp.norm.weight": ("F32", (4,))}


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sketch(tmp_path / "plain", llama(layers=4), config=config(layers=4))
    said = config(layers=4, num_nextn_predict_layers=1)
    for name in ("glm", "glm-too"):
        write_sketch(tmp_path / name, llama(layers=5) | {PROJECTION: ("BF16", (8, 16))}, config=said)
    for name in ("qwen", "qwen-too"):
        write_sketch(tmp_path / name, llama(layers=4) | SEPARATE, config=config(layers=4, mtp_num_layers=1))


def pair(a: str, b: str) -> dict[str, Any]:
    return {"models": [{"model": a}, {"model": b}], "merge_method": "slerp", "base_model": a}


@pytest.mark.parametrize(
    ("a", "b", "key"), [("glm", "plain", "num_nextn_predict_layers"), ("qwen", "plain", "mtp_num_layers")]
)
@pytest.mark.parametrize("turned", [False, True])
def test_what_only_some_models_have_of_it_is_left_out_and_told(a: str, b: str, key: str, turned: bool) -> None:
    plan = plan_of({**(pair(b, a) if turned else pair(a, b)), "parameters": {"t": 0.5}})
    assert name_inputs(plan).keys() == llama(layers=4).keys()
    assert not read_json(plan, "config.json").get(key)
    assert any(f"(MTP) is in {a}, and not in {b}" in warning for warning in plan.warnings)
    (dropped,) = [source.dropped for source in plan.sources if source.model == a]
    assert list(dropped) == ["predicts later tokens (MTP), which the output does not"]


@pytest.mark.parametrize("name", ["glm", "qwen"])
def test_what_all_models_have_of_it_is_merged_and_no_layer(name: str) -> None:
    plan = plan_of({**pair(name, f"{name}-too"), "parameters": {"t": [0.25, 1]}})
    later = "mtp.layers.0.w" if name == "qwen" else PROJECTION
    assert find_settings(plan, "model.layers.3.mlp.up_proj.weight")["t"] == 1
    assert find_settings(plan, later)["t"] == 0.25
    assert not plan.warnings
    made = read_json(plan, "config.json")
    assert made["mtp_num_layers" if name == "qwen" else "num_nextn_predict_layers"] == 1


def test_slices_leave_it_out() -> None:
    slices = [{"sources": [{"model": "qwen", "layer_range": each}]} for each in ([0, 3], [2, 4])]
    plan = plan_of({"merge_method": "passthrough", "slices": slices})
    assert name_inputs(plan).keys() == llama(layers=5).keys()
    assert read_json(plan, "config.json")["mtp_num_layers"] == 0
