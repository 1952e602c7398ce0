"""Half a model is refused by what its folder says of itself."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from models import read_tensors, write_llama

from mergemill.engine.checkpoint.checkpoint import open_checkpoint
from mergemill.engine.checkpoint.family import layer_stacks
from mergemill.engine.checkpoint.unfinished import check_layers, check_names
from mergemill.engine.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", seed=0, shards=3)


def shard(number: int) -> str:
    return f"model-{number:05d}-of-00003.safetensors"


@pytest.mark.parametrize("kept", [[1], [3], [1, 2], [2, 3]])
def test_some_of_the_shards_without_an_index_are_no_model(kept: list[int], model: Path) -> None:
    (model / INDEX).unlink()
    for number in {1, 2, 3} - set(kept):
        (model / shard(number)).unlink()
    with pytest.raises(CheckpointError, match=rf"{len(kept)} of 3 shards, and not the others; is the download compl"):
        open_checkpoint(str(model))


def test_a_shard_alone_is_no_model_when_it_is_named_itself(model: Path) -> None:
    with pytest.raises(CheckpointError, match="1 of 3 shards, and not the others"):
        open_checkpoint(str(model / shard(2)))


def test_all_shards_without_their_index_are_refused_as_before(model: Path) -> None:
    (model / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"has 3 safetensors files and no {re.escape(INDEX)}"):
        open_checkpoint(str(model))


def test_the_only_shard_is_a_whole_model(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", seed=0)
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    assert len(open_checkpoint(str(model)).tensors) == len(read_tensors(model))


def test_an_index_that_leaves_shards_out_is_the_last_word(model: Path) -> None:
    """As of a model without the tensors that predict later tokens: its index says which shards make it."""
    index = json.loads((model / INDEX).read_text())
    left_out = index["weight_map"]["model.norm.weight"]
    config = json.loads((model / "config.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != left_out}
    (model / INDEX).write_text(json.dumps(index))
    (model / left_out).unlink()
    del config["num_hidden_layers"]
    (model / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(str(model)).tensors.keys() == index["weight_map"].keys()


def test_fewer_layers_than_the_config_says_are_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match=r"has 4 layers in 'model.layers', and config.json says 5; is the downl"):
        open_checkpoint(str(model))
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert open_checkpoint(str(model)).tensors


LAYERS = [f"model.layers.{i}.weight" for i in range(3)]


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (LAYERS, {}),
        (LAYERS, {"num_hidden_layers": "12"}),
        (LAYERS, {"num_hidden_layers": True}),
        (LAYERS, {"num_layers": 12}),
        (["albert.encoder.albert_layer_groups.0.w"], {"num_hidden_layers": 12, "num_hidden_groups": 1}),
        ([*LAYERS, "vision.layers.0.w"], {"num_hidden_layers": 12, "vision_config": {"num_hidden_layers": 24}}),
        (["model.vision.layers.0.w"], {"num_hidden_layers": 12}),
        (["projector.0.w"], {"num_hidden_layers": 12}),
        (["model.norm.weight"], {"num_hidden_layers": 12}),
    ],
    ids=str,
)
def test_a_count_that_may_mean_something_else_refuses_nothing(names: list[str], config: Mapping[str, Any]) -> None:
    check_layers(layer_stacks(names), config, "model")


@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": 4}, {"n_layer": 4}, {"text_config": {"num_hidden_layers": 4}}], ids=str
)
def test_a_plain_count_of_the_only_stack_is_believed(config: Mapping[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"has 3 layers in 'model\.layers', and config\.json says 4"):
        check_layers(layer_stacks(LAYERS), config, "model")


@pytest.mark.parametrize("journal", [None, b"", b'{"part": 0}\n', b'{"committed": true', b'{"committed": true}\nx\n'])
def test_a_folder_whose_merge_is_not_committed_is_refused(journal: bytes | None, model: Path) -> None:
    (model / ".mergemill").mkdir()
    (model / ".mergemill" / "plan.json").write_text("{}")
    if journal is not None:
        (model / ".mergemill" / "journal.jsonl").write_bytes(journal)
    with pytest.raises(CheckpointError, match="holds a merge that is not finished; run the same merge again to finish"):
        open_checkpoint(str(model))


@pytest.mark.parametrize(
    ("name", "data"),
    [("journal.jsonl", b'{"part": 0}\n{"committed": true}\n'), ("committed", b"{}"), ("journal.json", b"[]")],
)
def test_a_committed_merge_is_a_model(name: str, data: bytes, model: Path) -> None:
    (model / ".mergemill").mkdir()
    (model / ".mergemill" / "plan.json").write_text("{}")
    (model / ".mergemill" / name).write_bytes(data)
    assert open_checkpoint(str(model)).tensors


def test_a_state_folder_that_holds_no_plan_says_nothing(model: Path) -> None:
    (model / ".mergemill").mkdir()
    (model / ".mergemill" / "journal.jsonl").write_bytes(b"")
    assert open_checkpoint(str(model)).tensors


def test_many_shards_are_counted_in_linear_time() -> None:
    names = [f"model-{number:05d}-of-40000.safetensors" for number in range(1, 40_001)]
    check_names(names, "a")
    with pytest.raises(CheckpointError, match="39999 of 40000 shards"):
        check_names(names[1:], "a")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_told_as_one(name: str, tmp_path: Path) -> None:
    oid = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 12345\n")
    with pytest.raises(CheckpointError, match=rf"{name}: is a pointer of Git LFS, .*'git lfs pull'"):
        open_checkpoint(str(tmp_path))


def test_a_folder_of_the_hubs_cache_is_told_with_what_to_give_instead(tmp_path: Path) -> None:
    (tmp_path / "models--org--name" / "snapshots" / ("0" * 40)).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="give org/name, or a folder in snapshots/"):
        open_checkpoint(str(tmp_path / "models--org--name"))
