"""The plan says which dtype it writes and why, whose config it takes, and how it read a size."""

from pathlib import Path
from typing import Any

import pytest
from plan.sketches import config, llama, plan_of, write_sketch

from mergemill.cli.plan import plan_lines
from mergemill.engine import describe_plan
from mergemill.engine.errors import InputError
from mergemill.engine.plan.sizes import read_shard_size


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, dtype in (("a", "BF16"), ("b", "BF16"), ("half", "F16")):
        write_sketch(tmp_path / name, llama(dtype=dtype), config=config())


def linear(*models: str, **more: Any) -> dict[str, Any]:
    listed = [{"model": model} for model in models]
    return {"merge_method": "linear", "models": listed, "parameters": {"weight": 1}, **more}


@pytest.mark.parametrize(
    ("recipe", "dtype", "donor"),
    [
        (linear("a", "b"), "BF16, as the models are stored", "a, the first model"),
        (linear("b", "a", dtype="float16"), "F16, as dtype says", "b, the first model"),
        (
            linear("a", base_model="b", dtype="float32", out_dtype="float16"),
            "F16, as out_dtype says",
            "b, the base model",
        ),
        (linear("a", "half"), "F32, which holds BF16 and F16", "a, the first model"),
    ],
)
def test_the_first_lines_say_the_dtype_and_why_and_whose_config_and_tokenizer(
    recipe: dict[str, Any], dtype: str, donor: str
) -> None:
    lines = list(plan_lines(describe_plan(plan_of(recipe))))
    assert lines[1:3] == [f"  dtype   {dtype}", f"  config  and tokenizer of {donor}"]


def test_models_of_several_dtypes_are_told_where_the_recipe_chooses_none() -> None:
    (warning,) = plan_of(linear("a", "half")).warnings
    assert "several dtypes (a in BF16, half in F16); most is written in F32" in warning
    assert plan_of(linear("a", "half", dtype="bfloat16")).warnings == ()


@pytest.mark.parametrize(("given", "size"), [("1B", "1GB"), ("5B", "5GB"), (" 0.5 B", "0.5GB")])
def test_a_b_is_a_billion_bytes_as_in_mergekit_and_told(given: str, size: str) -> None:
    plan = plan_of(linear("a", "b"), shard_size=given)
    assert (plan.shard_size, len(plan.shards)) == (size, 1)
    assert plan.warnings == (f"--shard-size {given} is read as {size}, as in mergekit: a B is a billion bytes",)


@pytest.mark.parametrize("given", ["5", "500", "999999"])
def test_a_few_bytes_are_refused_with_what_was_probably_meant(given: str) -> None:
    with pytest.raises(InputError, match=f"did you mean {given}GB or {given}MB"):
        plan_of(linear("a", "b"), shard_size=given)


@pytest.mark.parametrize("given", ["5GB", "700KB", "1000000", "tensor", 20_000, "2GiB"])
def test_other_sizes_are_taken_as_they_are(given: str | int) -> None:
    assert read_shard_size(given) == (given, "")


def test_a_residual_weight_is_told_to_do_nothing() -> None:
    sources = [{"model": "a", "layer_range": [0, 3]}]
    recipe = {"merge_method": "passthrough", "slices": [{"sources": sources, "residual_weight": 0.5}]}
    assert plan_of(recipe).warnings == ("recipe.yml: residual_weight of a slice does nothing, here as in mergekit",)
