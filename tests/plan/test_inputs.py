"""Inputs that are no whole models of numbers are refused by the plan, with the tensor and what would work."""

from pathlib import Path
from typing import Any

import pytest
from plan.sketches import EMBEDDING, HEAD, Sketch, config, llama, plan_of, write_sketch

from mergemill.engine.errors import PlanError

WEIGHT = {"parameters": {"weight": 1}}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sketch(tmp_path / "b", llama(), config=config())


def linear(*models: str) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": model} for model in models], **WEIGHT}


def write(name: str, tensors: Sketch, **more: Any) -> None:
    write_sketch(Path(name), tensors, config=config(**more))


def without(*names: str) -> dict[str, Any]:
    return {name: of for name, of in llama().items() if name not in names}


@pytest.mark.parametrize(
    "factor",
    [
        f"{Q}.lora_A.default.weight",
        f"{Q}.lora_magnitude_vector.weight",
        "model.embed_tokens.lora_embedding_B",
        f"{Q}.hada_w1_a",
        f"{Q}.lora_down.weight",
        f"{Q}.oft_r.default",
    ],
)
def test_factors_left_in_a_model_are_refused_as_what_they_are(factor: str) -> None:
    for name in ("a", "c"):
        write(name, llama() | {factor: ("BF16", (4, 8))})
    with pytest.raises(
        PlanError, match=r"a: holds factors of an adapter .*merge_and_unload.*<model>\+<adapter>"
    ) as caught:
        plan_of(linear("a", "c"))
    assert factor in str(caught.value)


def test_an_adapter_given_as_a_model_is_refused_as_what_it_is() -> None:
    write_sketch(Path("a"), {f"base_model.model.{Q}.lora_{each}.weight": ("F32", (4, 8)) for each in "AB"})
    with pytest.raises(PlanError, match=r"a/model.safetensors: is an adapter \(LoRA\), no model: model"):
        plan_of({"merge_method": "passthrough", "models": [{"model": "a/model.safetensors"}]})


@pytest.mark.parametrize(
    ("name", "shape"), [(EMBEDDING, (0,)), (HEAD, (0, 8)), (f"{Q}.weight", (0,)), ("model.norm.weight", (0,))]
)
@pytest.mark.parametrize("other", ["b", "a"])
def test_a_weight_without_data_is_refused_with_where_it_comes_from(name: str, shape: Any, other: str) -> None:
    write("a", llama() | {name: ("BF16", shape)})
    with pytest.raises(PlanError, match=rf"a: tensor {name} holds no data .*ZeRO-3"):
        plan_of(linear("a", other))


def test_a_scale_beside_passthrough_calculates_and_needs_numbers() -> None:
    write("a", llama(), quantization_config={"quant_method": "fp8"})
    slices = [{"sources": [{"model": "a", "layer_range": [0, 3], "parameters": {"scale": 0.5}}]}]
    with pytest.raises(PlanError, match="quantized"):
        plan_of({"merge_method": "passthrough", "slices": slices})


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_an_untied_model_without_a_head_is_an_error_in_any_order(order: tuple[str, str]) -> None:
    write("a", without(HEAD), tied=False)
    with pytest.raises(PlanError, match=rf"a stores no {HEAD}, and its config says that {EMBEDDING} does not stand"):
        plan_of(linear(*order))


def test_a_tied_model_is_merged_by_its_embedding_as_before() -> None:
    write("a", without(HEAD), tied=True)
    assert plan_of(linear("a", "b")).warnings == ()


def test_a_model_that_gives_no_head_may_lack_it() -> None:
    write("a", without(HEAD), tied=False)
    ranges = [("b", 0, 1), ("a", 1, 2), ("b", 2, 3)]
    slices = [{"sources": [{"model": model, "layer_range": [first, last]}]} for model, first, last in ranges]
    assert plan_of({"merge_method": "passthrough", "slices": slices}).tensors == len(llama())


def test_an_output_that_lacks_the_head_that_its_config_promises_is_told() -> None:
    for name in ("a", "c"):
        write(name, without(HEAD), tied=False)
    (warning,) = plan_of(linear("a", "c")).warnings
    assert "a has no head" in warning


def test_a_model_that_is_no_generator_needs_no_head() -> None:
    for name in ("a", "c"):
        write(name, without(HEAD), tied=False, architectures=["LlamaForSequenceClassification"])
    assert plan_of(linear("a", "c")).warnings == ()
