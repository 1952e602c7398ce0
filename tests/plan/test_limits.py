"""What the language has and the engine cannot do yet: one clear line at planning, before a weight is read."""

import re
from pathlib import Path
from typing import Any

import pytest
from plan.sketches import config, llama, plan_of, write_sketch

from mergemill.engine.errors import CheckpointError, PlanError

WEIGHT = {"parameters": {"weight": 1}}
PAIR = [{"model": "a"}, {"model": "b"}]


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_sketch(tmp_path / name, llama(), config=config(), tokenizer=True)


def test_the_recipe_that_the_others_differ_from_can_be_planned() -> None:
    assert plan_of({"merge_method": "linear", "models": PAIR, **WEIGHT}).tensors == len(llama())


LIMITS: dict[str, tuple[dict[str, Any], str]] = {
    "stranger method": ({"models": PAIR, "merge_method": "karchr"}, "unknown merge_method 'karchr'"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_cannot_run_yet_is_one_line(name: str) -> None:
    recipe, words = LIMITS[name]
    with pytest.raises(PlanError, match=re.escape(words)) as caught:
        plan_of({"merge_method": "linear", **WEIGHT, **recipe})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["union", "base", "a"])
def test_a_tokenizer_source_that_needs_no_work_is_no_limit(source: str) -> None:
    recipe = {"merge_method": "linear", "models": PAIR, "tokenizer_source": source, **WEIGHT}
    assert plan_of(recipe).tensors == len(llama())


PLACES = {
    "nope://bucket/model": "no such kind of storage; known are ",
    "a@main": "a folder has no revisions; only models on the Hub have",
    "s3://": "a URL is s3://bucket/key",
    "./nowhere": "no such file or folder",
    "~nobody-at-all/model": "no such file or folder",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_model_that_cannot_be_read_is_one_line(place: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(PLACES[place])) as caught:
        plan_of({"merge_method": "linear", "models": [{"model": "a"}, {"model": place}], **WEIGHT})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(place.partition("://")[0])


def test_quantized_weights_are_copied_but_not_calculated_with(tmp_path: Path) -> None:
    """Apart from their scales, which are tensors of their own, they mean nothing."""
    write_sketch(tmp_path / "b", llama(), config=config(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(PlanError, match=r"b: its weights are quantized \(fp8\) and cannot be merged yet"):
        plan_of({"merge_method": "linear", "models": PAIR, **WEIGHT})
    copied = {"merge_method": "passthrough", "models": [{"model": "b"}]}
    assert plan_of(copied).tensors == len(llama())
    with pytest.raises(PlanError, match="quantized"):
        plan_of({**copied, "dtype": "bfloat16"})
