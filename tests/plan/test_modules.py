"""Models of several stacks: which module of a recipe each tensor is of, and slices within one stack."""

from pathlib import Path
from typing import Any

import pytest
from plan.sketches import config, find_settings, llama, name_inputs, plan_of, read_json, write_sketch

from mergemill.engine.checkpoint import choose_family
from mergemill.engine.errors import PlanError
from mergemill.engine.plan.modules import choose_module

W = {"parameters": {"weight": 1}}
TEXT = [{"sources": [{"model": "a", "layer_range": each}]} for each in ([0, 2], [1, 3])]


def vlm() -> dict[str, Any]:
    """Return the tensors of a language model with a vision tower of two layers and a Sequential between them."""
    tower = {f"visual.blocks.{i}.w": ("F32", (4,)) for i in range(2)} | {"visual.patch_embed.w": ("F32", (4,))}
    return llama() | tower | {f"visual.merger.mlp.{i}.w": ("F32", (4,)) for i in (0, 2)}


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_sketch(tmp_path / name, vlm(), config=config(vision_config={"depth": 2}))


TOWER = ["visual.blocks.0.w", "visual.blocks.1.w", "visual.patch_embed.w"]
MERGER = ["visual.merger.mlp.0.w", "visual.merger.mlp.2.w"]
PAIR, A = {"models": [{"model": "a"}, {"model": "b"}]}, {"models": [{"model": "a"}]}


@pytest.mark.parametrize(
    ("modules", "kept"),
    [
        ({"text_decoder": PAIR, "vision_tower": A, "multi_modal_projector": PAIR}, TOWER),
        ({"text_decoder": PAIR, "vision_tower": PAIR, "multi_modal_projector": A}, MERGER),
        ({"model.layers": PAIR, "visual": A}, TOWER + MERGER),
        ({"default": PAIR, "visual.blocks": A, "visual.merger": PAIR}, TOWER),
    ],
)
def test_each_tensor_is_of_the_module_that_names_it(modules: dict[str, Any], kept: list[str]) -> None:
    found = name_inputs(plan_of({"merge_method": "linear", "modules": modules, **W}))
    assert sorted(name for name, inputs in found.items() if len(inputs) == 1) == sorted(kept)
    assert found.keys() == vlm().keys()


def test_a_module_of_one_model_is_copied_by_a_method_of_two() -> None:
    recipe = {"merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.5}}
    plan = plan_of(recipe | {"modules": {"text_decoder": PAIR, "vision_tower": A, "multi_modal_projector": A}})
    assert {name for name, inputs in name_inputs(plan).items() if len(inputs) == 1} == {*TOWER, *MERGER}


def test_slices_of_one_stack_leave_the_other_whole() -> None:
    modules = {"text_decoder": {"slices": TEXT}, "visual": A}
    plan = plan_of({"merge_method": "passthrough", "modules": modules})
    found, made = name_inputs(plan), read_json(plan, "config.json")
    assert (made["num_hidden_layers"], made["vision_config"]) == (4, {"depth": 2})
    assert found["model.layers.3.mlp.up_proj.weight"] == ("a:model.layers.2.mlp.up_proj.weight",)
    assert {f"{name}" for name in found if "visual" in name} == {*TOWER, *MERGER}


def test_steps_of_a_sequential_are_no_layers() -> None:
    plan = plan_of({"merge_method": "slerp", "base_model": "a", **PAIR, "parameters": {"t": [0.25, 1]}})
    assert [find_settings(plan, name)["t"] for name in MERGER] == [0.25, 0.25]
    assert [find_settings(plan, f"visual.blocks.{i}.w")["t"] for i in range(2)] == [0.25, 1]


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"text_decoder": PAIR}, r"no module is that of visual.blocks; the modules are text_decoder, .*model.layers"),
        ({"default": PAIR, "audio_tower": A}, r"module 'audio_tower' is none of these models'; .*visual.blocks"),
        ({"default": {"slices": TEXT}}, r"module 'default' has slices, and the stacks of layers model.layers, visual"),
    ],
)
def test_modules_that_do_not_fit_are_refused_with_the_stacks(modules: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan_of({"merge_method": "linear", "modules": modules, **W})


def test_slices_without_modules_tell_of_them() -> None:
    with pytest.raises(PlanError, match=r"these have model.layers, visual.blocks; say by 'modules' what each becomes"):
        plan_of({"merge_method": "passthrough", "slices": TEXT})


def test_stacks_that_one_key_counts_are_sliced_together_or_not_at_all(tmp_path: Path) -> None:
    pair = {f"{stack}.{i}.w": ("F32", (4,)) for stack in ("attentions", "ffns") for i in range(3)}
    write_sketch(tmp_path / "a", pair, config=config())
    plan = plan_of({"merge_method": "passthrough", "slices": TEXT})
    assert name_inputs(plan)["ffns.3.w"] == ("a:ffns.2.w",)
    assert plan.tensors == 8
    with pytest.raises(PlanError, match="num_hidden_layers in the config of a counts the layers of both"):
        plan_of({"merge_method": "passthrough", "modules": {"ffns": {"slices": TEXT}, "attentions": A}})


def test_the_module_whose_words_stand_last_is_meant() -> None:
    family = choose_family({})
    assert choose_module("model.encoder.vision_tower.layers", ["encoder", "vision_tower"], family) == "vision_tower"
    assert choose_module("model.encoder.layers", ["encoder", "vision_tower"], family) == "encoder"
    assert choose_module("lm_head.weight", ["encoder", "decoder"], family) is None


def test_a_module_that_is_the_name_of_a_stack_is_no_stack_of_a_tower(tmp_path: Path) -> None:
    towers = {f"{stack}layers.{i}.w": ("F32", (4,)) for stack in ("", "vision.", "audio.") for i in range(2)}
    for name in ("a", "b"):
        write_sketch(tmp_path / name, towers, config=config(num_hidden_layers=2))
    for rest in ({"default": A}, {"vision": A, "audio": A}):
        found = name_inputs(plan_of({"merge_method": "linear", "modules": {"layers": PAIR, **rest}, **W}))
        assert sorted(name for name, inputs in found.items() if len(inputs) == 2) == ["layers.0.w", "layers.1.w"]
    family, stacks = choose_family({}), ["layers", "vision.layers"]
    assert choose_module("vision.layers", ["layers"], family, stacks) is None
    assert choose_module("vision.layers", ["layers"], family, ["model.layers", "vision.layers"]) == "layers"


def test_a_list_of_the_encoders_layers_does_not_follow_the_decoders(tmp_path: Path) -> None:
    both = {f"{stack}.layers.{i}.w": ("F32", (4,)) for stack in ("led.encoder", "led.decoder") for i in range(8)}
    counts = {"encoder_layers": 8, "decoder_layers": 8, "attention_window": [*range(8)]}
    write_sketch(tmp_path / "a", both, config={"model_type": "led", **counts})
    for part, other in (("encoder", "decoder"), ("decoder", "encoder")):
        plan = plan_of({"merge_method": "passthrough", "modules": {part: {"slices": TEXT}, other: A}})
        made = read_json(plan, "config.json")
        assert (made[f"{part}_layers"], made[f"{other}_layers"]) == (4, 8)
        assert made["attention_window"] == ([0, 1, 1, 2] if part == "encoder" else [*range(8)])
