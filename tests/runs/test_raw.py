"""Dictionaries of tensors of any kind are merged by name: vision, diffusion, whatever the container."""

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.torch_files import write_torch
from models import read_tensors
from reference.mergekit import PYTHON_VARIABLE, find_skip_reason
from runs.merging import Killed, hash_output
from safetensors.torch import save_file

from mergemill.cli.main import execute
from mergemill.cli.status import say_resume
from mergemill.engine import describe_plan, load_recipe, make_raw_plan, run, status, verify
from mergemill.engine.errors import InputError, PlanError, RunError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Event, PartFinished

Tensors = dict[str, torch.Tensor]


def make_vision(seed: int) -> torch.nn.Module:
    """Return a small network with a norm over batches, whose counters and buffers are in its dictionary."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 5)
    )
    for _ in range(seed + 1):
        network(torch.randn(2, 3, 4, 4))
    return network


def make_unet(seed: int) -> Tensors:
    """Return tensors called as those of a UNet in one file are, some with their channels last."""
    torch.manual_seed(seed)
    prefix = "model.diffusion_model"
    shapes = {f"{prefix}.input_blocks.{i}.0.in_layers.2.weight": (8, 4, 3, 3) for i in range(12)} | {
        f"{prefix}.time_embed.0.weight": (16, 4),
        "first_stage_model.encoder.conv_in.bias": (4,),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (20, 8),
        "logit_scale": (),
        "empty": (0, 3),
    }
    tensors = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    return {
        name: each.to(memory_format=torch.channels_last) if each.dim() == 4 else each for name, each in tensors.items()
    }


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    return path


def make_recipe(*paths: Path, method: str = "linear", base: Path | None = None, **more: Any) -> str:
    models = [{"model": str(path), "parameters": {"weight": 1 / (i + 2)}} for i, path in enumerate(paths)]
    recipe = {"merge_method": method, "models": models} | ({"base_model": str(base)} if base else {})
    return json.dumps(recipe | more)


def plan_raw(text: str, **options: Any) -> Plan:
    return make_raw_plan(load_recipe(text), **options)


def merge_raw(text: str, out: Path, **options: Any) -> Tensors:
    run(plan_raw(text, **options), out, workers=0, threads=2)
    return read_tensors(out)


def average(*models: Tensors) -> Tensors:
    """Return the weighted mean of `make_recipe`, in float64."""
    weights = [1 / (i + 2) for i in range(len(models))]
    return {
        name: sum(weight * model[name].double() for weight, model in zip(weights, models, strict=True)) / sum(weights)
        for name in models[0]
    }


def test_a_vision_model_is_merged_and_loads(tmp_path: Path) -> None:
    states = [make_vision(seed).state_dict() for seed in range(2)]
    a = write_torch(tmp_path / "a.pth", {"model": states[0], "epoch": 1})
    b = write_safetensors(tmp_path / "b.safetensors", states[1])
    merged = merge_raw(make_recipe(a, b), tmp_path / "out")
    assert list(merged) == sorted(states[0])
    make_vision(2).load_state_dict(merged)  # strictly
    for name, expected in average(*states).items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(merged[name], expected.float())
    assert merged["1.num_batches_tracked"] == states[0]["1.num_batches_tracked"] != states[1]["1.num_batches_tracked"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_file()) == [
        "README.md", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "recipe.yml",
    ]  # fmt: skip


RECIPES: Mapping[str, Callable[[Path, Path, Path], str]] = {
    "linear": lambda base, a, b: make_recipe(a, b, dtype="float32"),
    "slerp": lambda base, a, b: make_recipe(base, a, method="slerp", base=base, parameters={"t": 0.3}),
    "task_arithmetic": lambda base, a, b: make_recipe(a, b, method="task_arithmetic", base=base, dtype="float32"),
    "ties": lambda base, a, b: make_recipe(
        a, b, method="ties", base=base, parameters={"density": 0.5}, dtype="float32"
    ),
}


@pytest.mark.parametrize("method", RECIPES)
def test_a_diffusion_checkpoint_in_one_file_is_merged_whatever_its_container(method: str, tmp_path: Path) -> None:
    models = [make_unet(seed) for seed in range(3)]
    kinds: dict[str, Callable[[Path, Tensors], Path]] = {
        "st": lambda path, tensors: write_safetensors(path.with_suffix(".safetensors"), tensors),
        "zip": lambda path, tensors: write_torch(path.with_suffix(".ckpt"), {"state_dict": tensors, "global_step": 1}),
        "old": lambda path, tensors: write_torch(path.with_suffix(".pt"), tensors, zipped=False),
    }
    hashes = []
    for kind, write in kinds.items():
        (tmp_path / kind).mkdir()
        base, a, b = (write(tmp_path / kind / name, each) for name, each in zip("0ab", models, strict=True))
        text = RECIPES[method](base, a, b)
        merge_raw(text, tmp_path / f"out-{kind}")
        hashes.append(
            {name: h for name, h in hash_output(tmp_path / f"out-{kind}").items() if name.startswith("model")}
        )
        assert verify(tmp_path / f"out-{kind}", replay=1).replayed == 1
    assert hashes[0] == hashes[1] == hashes[2]


A = {"x": torch.ones(2), "y": torch.ones(2), "only_a": torch.ones(3)}
B = {"x": torch.zeros(2), "y": torch.ones(2), "only_b": torch.ones(3)}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write_safetensors(tmp_path / "a.safetensors", A), write_torch(tmp_path / "b.pt", B)


def test_names_that_differ_are_an_error_that_lists_them_and_both_options(two: tuple[Path, Path]) -> None:
    with pytest.raises(PlanError) as refusal:
        plan_raw(make_recipe(*two))
    assert str(refusal.value) == (
        f"recipe: the models have different tensors: only_a is not in {two[1]}; only_b is not in {two[0]}. --union "
        f"merges each over the models that have it, --intersection drops those that one lacks"
    )


def test_a_long_list_of_names_is_cut_short(tmp_path: Path) -> None:
    a = write_safetensors(tmp_path / "a.safetensors", {f"w{i}": torch.ones(1) for i in range(30)})
    b = write_safetensors(tmp_path / "b.safetensors", {"w0": torch.ones(1)})
    with pytest.raises(PlanError, match=r"w18 is not in .*; and 19 more\. --union"):
        plan_raw(make_recipe(a, b))


def test_a_union_merges_over_the_models_that_have_a_tensor(two: tuple[Path, Path], tmp_path: Path) -> None:
    merged = merge_raw(make_recipe(*two), tmp_path / "out", names="union")
    assert list(merged) == ["only_a", "only_b", "x", "y"]
    assert torch.equal(merged["only_a"], A["only_a"])
    torch.testing.assert_close(merged["x"], torch.full((2,), 0.6))
    assert verify(tmp_path / "out", replay=1).replayed == 1


def test_an_intersection_drops_the_others_and_says_so(two: tuple[Path, Path], tmp_path: Path) -> None:
    plan = plan_raw(make_recipe(*two), names="intersection")
    assert [dict(source.dropped) for source in plan.sources] == [{"not in all models": 1}] * 2
    run(plan, tmp_path / "out", workers=0)
    assert list(read_tensors(tmp_path / "out")) == ["x", "y"]
    assert verify(tmp_path / "out", replay=1).replayed == 1


def test_under_a_union_what_the_base_alone_has_is_copied_and_what_it_lacks_too(tmp_path: Path) -> None:
    base = write_safetensors(tmp_path / "base.safetensors", {"x": torch.zeros(2), "base": torch.ones(1)})
    a = write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2), "a": torch.full((1,), 2.0)})
    merged = merge_raw(make_recipe(a, method="task_arithmetic", base=base), tmp_path / "out", names="union")
    assert {name: tensor.tolist() for name, tensor in merged.items()} == {"a": [2.0], "base": [1.0], "x": [0.5, 0.5]}


def test_under_a_union_what_two_models_have_and_the_base_lacks_is_refused(tmp_path: Path) -> None:
    base = write_safetensors(tmp_path / "base.safetensors", {"x": torch.zeros(2)})
    a, b = (write_safetensors(tmp_path / f"{n}.safetensors", {"x": torch.ones(2), "w": torch.ones(1)}) for n in "ab")
    with pytest.raises(PlanError, match=r"tensor w is in .*a\.safetensors, .*b\.safetensors and not in the base model"):
        plan_raw(make_recipe(a, b, method="ties", base=base), names="union")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_prefix_before_all_names_of_one_model_is_taken_off(prefix: str, tmp_path: Path) -> None:
    a = write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2), "y.z": torch.ones(2)})
    b = write_torch(tmp_path / "b.pt", {f"{prefix}x": torch.ones(2), f"{prefix}y.z": torch.ones(2)})
    for paths in ((a, b), (b, a)):
        plan = plan_raw(make_recipe(*paths))
        assert [tensor for shard in plan.shards for tensor in shard.tensors] == ["x", "y.z"]
        assert f"recipe: {b}: '{prefix}' before all names is taken off" in describe_plan(plan)["warnings"]


def test_a_prefix_that_all_models_have_stays(tmp_path: Path) -> None:
    paths = [write_safetensors(tmp_path / f"{n}.safetensors", {"model.x": torch.ones(2)}) for n in "ab"]
    assert plan_raw(make_recipe(*paths)).shards[0].tensors == ("model.x",)


def test_a_gradient_is_its_first_value_and_a_warning(two: tuple[Path, Path], tmp_path: Path) -> None:
    models = [{"model": str(path), "parameters": {"weight": [1.0, 0.0]}} for path in two]
    plan = plan_raw(json.dumps({"merge_method": "linear", "models": models}), names="intersection")
    told = "recipe: 'weight' is a gradient over layers, of which a raw merge knows none; its first value is taken"
    assert told in describe_plan(plan)["warnings"]
    run(plan, tmp_path / "out", workers=0)
    assert read_tensors(tmp_path / "out")["x"].tolist() == [0.5, 0.5]


def test_whole_numbers_are_copied_where_equal_and_refused_where_not(tmp_path: Path) -> None:
    paths = []
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        tensors = {"position_ids": torch.tensor([value]), "w": torch.ones(1)}
        paths.append(write_safetensors(tmp_path / f"{name}.safetensors", tensors))
    assert merge_raw(make_recipe(*paths[:2]), tmp_path / "out")["position_ids"].tolist() == [1]
    with pytest.raises(RunError, match=r"position_ids: .* hold different values"):
        merge_raw(make_recipe(*paths), tmp_path / "other")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"tokenizer_source": "base"}, "leave tokenizer out"),
        ({"chat_template": "auto"}, "leave chat_template out"),
        ({"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]}, "leave slices out"),
    ],
)
def test_layers_and_tokenizers_are_refused(more: dict[str, Any], why: str, two: tuple[Path, Path]) -> None:
    recipe = {key: value for key, value in (json.loads(make_recipe(*two)) | more).items() if value is not None}
    with pytest.raises(InputError, match=why):
        plan_raw(json.dumps(recipe))


def test_shapes_must_be_equal(tmp_path: Path) -> None:
    a = write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    b = write_safetensors(tmp_path / "b.safetensors", {"x": torch.ones(2, 1)})
    with pytest.raises(PlanError, match=r"tensor x: .*a\.safetensors has shape \[2\], .*b\.safetensors \[2, 1\]"):
        plan_raw(make_recipe(a, b))


def test_tied_tensors_of_a_pickle_are_written_once_a_name(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    paths = [write_torch(tmp_path / f"{n}.pt", {"a": shared, "b": shared}) for n in "xy"]
    merged = merge_raw(make_recipe(*paths), tmp_path / "out")
    torch.testing.assert_close(merged["a"], shared)
    assert torch.equal(merged["a"], merged["b"])


def test_stages_are_raw_too(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    stages = f"""
name: mean
merge_method: linear
models: [{{model: {a}, parameters: {{weight: 1}}}}, {{model: {b}, parameters: {{weight: 1}}}}]
---
merge_method: task_arithmetic
base_model: {a}
models: [{{model: mean, parameters: {{weight: 2}}}}]
"""
    merged = merge_raw(stages, tmp_path / "out", names="intersection")
    assert {name: tensor.tolist() for name, tensor in merged.items()} == {"x": [0.0, 0.0], "y": [1.0, 1.0]}
    assert verify(tmp_path / "out", replay=1).replayed == 1


def test_a_hundred_gigabytes_are_planned_in_seconds(tmp_path: Path) -> None:
    header = json.dumps(
        {
            f"w{i}": {"dtype": "F16", "shape": [1 << 20, 512], "data_offsets": [i << 30, (i + 1) << 30]}
            for i in range(100)
        }
    ).encode()
    for name in "ab":
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + (100 << 30))
    plan = plan_raw(make_recipe(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    assert plan.write_bytes > 100 << 30
    assert len(plan.shards) > 20


def test_the_command_line_merges_and_plans(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(make_recipe(*two))
    assert execute(["plan", str(recipe), "--raw"]) == 2
    assert "--union merges each" in capsys.readouterr().err
    assert execute(["plan", str(recipe), "--raw", "--intersection"]) == 0
    assert execute(["merge", str(recipe), str(tmp_path / "out"), "--raw", "-u", "--quiet", "--workers", "0"]) == 0
    assert len(read_tensors(tmp_path / "out")) == 4
    assert execute(["merge", str(recipe), str(tmp_path / "out"), "--raw", "-i", "--quiet", "--workers", "0"]) == 2
    assert execute(["plan", str(recipe), "--raw", "-u", "-i"]) == 2
    assert execute(["plan", str(recipe), "-u"]) == 2


@pytest.mark.parametrize(
    ("names", "words"),
    [("same", ["--raw"]), ("union", ["--raw", "--union"]), ("intersection", ["--raw", "--intersection"])],
)
def test_a_raw_merge_that_a_program_began_is_told_how_to_resume(names: str, words: list[str], tmp_path: Path) -> None:
    paths = [write_safetensors(tmp_path / f"{n}.safetensors", {"x": torch.ones(2), "y": torch.ones(2)}) for n in "ab"]

    def stop(event: Event) -> None:
        if isinstance(event, PartFinished):
            raise Killed

    with pytest.raises(Killed):
        run(plan_raw(make_recipe(*paths), names=names), tmp_path / "out", workers=0, on_event=stop)
    said = shlex.split(say_resume(status(tmp_path / "out")))
    assert [word for word in said if word.startswith("--")][: len(words)] == words


@pytest.mark.parametrize("method", ["linear", "ties", "task_arithmetic"])
def test_it_agrees_with_mergekit(method: str, tmp_path: Path) -> None:
    if reason := find_skip_reason():
        pytest.skip(reason)
    models = [{name: each.float() for name, each in make_unet(seed).items() if each.numel()} for seed in range(3)]
    base, a, b = (write_safetensors(tmp_path / f"{i}.safetensors", each) for i, each in enumerate(models))
    text = RECIPES[method](base, a, b)
    (tmp_path / "recipe.yml").write_text(text)
    mergekit = Path(os.environ[PYTHON_VARIABLE]).with_name("mergekit-pytorch")
    subprocess.run([mergekit, "recipe.yml", "expected", "--quiet"], cwd=tmp_path, check=True, capture_output=True)
    expected = read_tensors(tmp_path / "expected")
    merged = merge_raw(text, tmp_path / "out")
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
