"""A config that counts layers or tokens by what counts nothing is refused, wherever a model comes in."""

import json
from pathlib import Path
from typing import Any

import pytest
from plan.sketches import config, llama, plan_of, write_sketch

from mergemill.engine.checkpoint.config import check_counts
from mergemill.engine.checkpoint.family import choose_family
from mergemill.engine.errors import CheckpointError

NO_COUNTS = {
    "NaN": float("nan"),
    "-3": -3,
    '"4"': "4",
    "1000.0": 1e3,
    "Infinity": float("inf"),
    "true": True,
    "a list": [3],
    "an object": {"layers": 3},
}
STACKS = {
    ("num_hidden_layers",): "model.layers",
    ("n_layer",): "h",
    ("text_config", "num_hidden_layers"): "model.layers",
    ("vision_config", "depth"): "visual.blocks",
    ("vision_config", "num_global_layers"): "vision_model.global_transformer.layers",
    ("audio_config", "encoder_layers"): "audio_tower.layers",
    ("vocab_size",): "model.layers",
    ("text_config", "vocab_size"): "model.layers",
}


def nest(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: value} if len(path) == 1 else {path[0]: nest(path[1:], value)}


@pytest.mark.parametrize("said", NO_COUNTS)
@pytest.mark.parametrize("path", STACKS, ids=".".join)
def test_no_value_but_a_whole_number_counts(path: tuple[str, ...], said: str) -> None:
    found, family = nest(path, NO_COUNTS[said]), choose_family({})
    with pytest.raises(CheckpointError, match="counts nothing; write a whole number") as error:
        check_counts(found, family, [STACKS[path]], where="model")
    assert f"model: config.json says {'.'.join(path)}: {said}," in str(error.value)


@pytest.mark.parametrize("said", NO_COUNTS)
@pytest.mark.parametrize("model", ["A", "B"])
def test_a_merge_of_such_a_model_is_refused_by_the_plan(model: str, said: str, tmp_path: Path) -> None:
    for name in "AB":
        write_sketch(tmp_path / name, llama(), config=config())
    (tmp_path / model / "config.json").write_text(json.dumps(config() | {"num_hidden_layers": NO_COUNTS[said]}))
    with pytest.raises(CheckpointError, match=f"{model}: config.json says num_hidden_layers: ") as error:
        plan_of(linear(tmp_path))
    assert error.value.exit_code == 2


def test_a_key_that_counts_no_stack_of_the_model_may_hold_anything() -> None:
    said = {"num_hidden_layers": 2, "vision_config": {"depth": [2, 2, 6, 2]}, "vocab_size": None}
    check_counts(said, choose_family({}), ["model.layers"], where="model")


def test_a_config_that_counts_by_null_is_told(tmp_path: Path) -> None:
    for name in "AB":
        write_sketch(tmp_path / name, llama(), config=config() | {"num_hidden_layers": None})
    (warning,) = plan_of(linear(tmp_path)).warnings
    assert "says num_hidden_layers: null, and nowhere how many layers 'model.layers' has" in warning
    for name in "AB":
        write_sketch(tmp_path / name, llama(), config=config() | {"n_layer": None})
    assert plan_of(linear(tmp_path)).warnings == ()


def linear(folder: Path) -> dict[str, Any]:
    models = [{"model": str(folder / name), "parameters": {"weight": 1}} for name in "AB"]
    return {"merge_method": "linear", "models": models}
