"""Pipelines of diffusers are merged component by component, and come out as diffusers writes them."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkpoint.torch_files import write_torch
from hubs import use_hub
from models import read_tensors
from runs.buckets import new_place
from runs.merging import Killed, hash_output
from runs.test_raw import make_recipe, plan_raw
from safetensors.torch import save_file
from servers.hub import Hub
from servers.s3 import S3

from mergemill.engine import abort, inspect, load_recipe, make_plan, run, verify
from mergemill.engine.errors import CheckpointError, PlanError
from mergemill.engine.plan.values import SmallFile
from mergemill.engine.runs.events import Event, PartFinished
from mergemill.engine.runs.outputs.folder import FolderOutput

COMPONENTS: Mapping[str, list[str | None]] = {
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SHAPES = {
    "unet": {"conv_in.weight": (8, 4, 3, 3), "up_blocks.1.w": (64, 64)},
    "vae": {"w": (16,)},
    "text_encoder": {"text_model.w": (5, 4)},
}
FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


def write_pipeline(folder: Path, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Write a pipeline: the UNet in two shards, the autoencoder by torch; return the tensors by component."""
    torch.manual_seed(seed)
    tensors = {name: {key: torch.randn(shape) for key, shape in shapes.items()} for name, shapes in SHAPES.items()}
    for name, pair in COMPONENTS.items():
        if pair[0] is not None:
            (folder / name).mkdir(parents=True)
            config = {"scheduler": "scheduler_config.json", "tokenizer": "vocab.json"}.get(name, "config.json")
            (folder / name / config).write_text(json.dumps({"of": name}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **COMPONENTS}))
    shards = {}
    for i, (key, tensor) in enumerate(tensors["unet"].items()):
        shards[key] = f"diffusion_pytorch_model-{i + 1:05}-of-00002.safetensors"
        save_file({key: tensor}, folder / "unet" / shards[key])
    index = json.dumps({"metadata": {}, "weight_map": shards})
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    write_torch(folder / "vae" / "diffusion_pytorch_model.bin", tensors["vae"])
    save_file(tensors["text_encoder"], folder / "text_encoder" / "model.safetensors")
    return tensors


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe of two pipelines."""
    for seed, name in enumerate("ab"):
        write_pipeline(tmp_path / name, seed)
    return make_recipe(tmp_path / "a", tmp_path / "b")


def list_output(out: Path) -> list[str]:
    return sorted(name for name in hash_output(out) if name not in ("README.md", "recipe.yml"))


def test_each_component_is_merged_into_files_of_its_own(tmp_path: Path) -> None:
    a, b = (write_pipeline(tmp_path / name, seed) for seed, name in enumerate("ab"))
    run(plan_raw(make_recipe(tmp_path / "a", tmp_path / "b")), tmp_path / "out", workers=0)
    assert list_output(tmp_path / "out") == FILES
    for component, tensors in a.items():
        merged = read_tensors(tmp_path / "out" / component)
        assert merged.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(merged[name], 0.6 * tensor + 0.4 * b[component][name])
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "unet/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert verify(tmp_path / "out", replay=2).replayed == 2
    assert inspect(tmp_path / "out").state == "finished"
    assert not (tmp_path / "out" / ".mergemill").joinpath("unet").exists()


def test_a_component_of_several_shards_has_an_index_of_its_own(recipe: str, tmp_path: Path) -> None:
    run(plan_raw(recipe, shard_size="tensor"), tmp_path / "out", workers=0)
    index = json.loads((tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors",
        "up_blocks.1.w": "diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    assert (tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    run(plan_raw(make_recipe(tmp_path / "out", tmp_path / "a")), tmp_path / "again", workers=0)
    assert list_output(tmp_path / "again") == FILES


def stop(event: Event) -> None:
    if isinstance(event, PartFinished):
        raise Killed


def test_a_merge_of_pipelines_is_resumed_and_aborted(recipe: str, tmp_path: Path) -> None:
    run(plan_raw(recipe), tmp_path / "expected", workers=0)
    for out in (tmp_path / "out", tmp_path / "aborted"):
        with pytest.raises(Killed):
            run(plan_raw(recipe), out, workers=0, threads=1, on_event=stop)
        assert not (out / "model_index.json").exists()
        assert inspect(out).state.startswith("unfinished: 1 of")
    run(plan_raw(recipe), tmp_path / "out", workers=0)
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "expected")
    abort(tmp_path / "aborted")
    assert not (tmp_path / "aborted").exists()


@pytest.mark.parametrize("after", range(1, 9))
def test_a_commit_that_is_interrupted_is_resumed_or_aborted(
    after: int, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, left = FolderOutput._write_small, after

    def write(self: FolderOutput, file: SmallFile) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Killed
        plain(self, file)

    monkeypatch.setattr(FolderOutput, "_write_small", write)
    for out in (tmp_path / "out", tmp_path / "aborted"):
        left = after
        with pytest.raises(Killed):
            run(plan_raw(recipe), out, workers=0)
        assert (out / "unet" / "diffusion_pytorch_model.safetensors").exists()
        assert not (out / "model_index.json").exists()
    monkeypatch.undo()
    run(plan_raw(recipe), tmp_path / "out", workers=0)
    assert list_output(tmp_path / "out") == FILES
    abort(tmp_path / "aborted")
    assert not (tmp_path / "aborted").exists()


def test_pipelines_are_merged_from_and_to_s3(s3: S3, recipe: str, tmp_path: Path) -> None:
    source, out = new_place(s3), new_place(s3)
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            source.put(str(path.relative_to(tmp_path)), path.read_bytes())
    run(plan_raw(recipe.replace(str(tmp_path), source.url)), out.url, workers=0)
    run(plan_raw(recipe), tmp_path / "expected", workers=0)
    found, expected = out.hash(), hash_output(tmp_path / "expected")
    assert {name: found[name] for name in FILES} == {name: expected[name] for name in FILES}
    assert verify(out.url, replay=1).replayed == 1


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of huggingface_hub's own uploads
def test_pipelines_are_merged_to_the_hub_and_from_there(
    hub: Hub, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    run(plan_raw(recipe), tmp_path / "expected", workers=0)
    with use_hub(hub, tmp_path / "home") as start:
        start(token=hub.token)
        run(plan_raw(recipe), "hf://org/merged", workers=0)
        commit = hub.repos["org/merged"].find_commit("main")
        assert commit is not None
        expected = hash_output(tmp_path / "expected")
        del expected["README.md"]  # which goes by the repository's name there
        assert {name: commit.files[name].sha256 for name in expected} == expected
        merged = plan_raw(make_recipe(tmp_path / "a").replace(str(tmp_path / "a"), "org/merged"))
        run(merged, tmp_path / "again", workers=0)
    assert list_output(tmp_path / "again") == FILES


def test_a_pipeline_is_no_language_model_and_the_error_names_the_way(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"a is a pipeline of diffusers; its components are merged with --raw"):
        make_plan(load_recipe(recipe))


def test_a_pipeline_and_a_file_are_not_merged(recipe: str, tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(PlanError, match=r"x\.safetensors is none; merge pipelines with each other, or"):
        plan_raw(make_recipe(tmp_path / "a", tmp_path / "x.safetensors"), names="union")


def test_a_component_alone_is_merged_as_any_dictionary(recipe: str, tmp_path: Path) -> None:
    run(plan_raw(make_recipe(tmp_path / "a" / "unet", tmp_path / "b" / "unet")), tmp_path / "out", workers=0)
    assert read_tensors(tmp_path / "out").keys() == SHAPES["unet"].keys()


def test_a_component_that_is_missing_is_named(recipe: str, tmp_path: Path) -> None:
    for path in (tmp_path / "a" / "vae").iterdir():
        path.unlink()
    (tmp_path / "a" / "vae").rmdir()
    with pytest.raises(CheckpointError, match=r"model_index\.json: names 'vae', and there is no such folder"):
        plan_raw(recipe)


@pytest.mark.parametrize(
    "text", ["[", "[]", "{}", json.dumps({f"c{i}": ["a", "b"] for i in range(99)}), '{"../x": ["a", "b"]}']
)
def test_an_index_of_a_pipeline_that_is_none_is_refused(text: str, recipe: str, tmp_path: Path) -> None:
    (tmp_path / "a" / "model_index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model_index\.json: (is not JSON|names \d+ components)"):
        plan_raw(recipe)
