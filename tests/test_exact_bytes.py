"""Shards are, byte for byte, what ``safetensors.torch.save_file`` writes, and the folder loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors, write_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergemill.engine import merge
from mergemill.engine.recipe import parse_recipe

PAIR = [{"model": "base"}, {"model": "tuned", "parameters": {"weight": 0.7, "density": 0.6}}]
RECIPES: Mapping[str, dict[str, Any]] = {
    "linear": {"models": PAIR, "parameters": {"weight": 1}},
    "slerp": {"models": PAIR, "base_model": "base", "parameters": {"t": [0.2, 0.7]}, "dtype": "float16"},
    "task_arithmetic": {"models": PAIR, "base_model": "base", "out_dtype": "float32"},
    "ties": {"models": PAIR, "base_model": "base"},
    "dare_linear": {"models": PAIR, "base_model": "base"},
    "dare_ties": {"models": PAIR, "base_model": "base", "dtype": "float32", "out_dtype": "bfloat16"},
    "passthrough": {"models": [{"model": "tuned"}]},
}
SHARDS = {"one": "5GB", "several": 50_000, "one a tensor": "tensor"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bfloat16 Llamas with buffers, a scalar and a tensor without elements."""
    folder = tmp_path_factory.mktemp("exact")
    extras = ("integer", "bool", "scalar", "empty")
    base = write_llama(folder / "base", seed=1, layers=2, extras=extras)
    write_llama(folder / "tuned", seed=2, layers=2, extras=extras, near=base, shards=3)
    return folder


@pytest.fixture
def make_merge(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A method's name to the folder of its merge."""

    def run_merge(method: str, **options: Any) -> Path:
        monkeypatch.chdir(zoo)
        recipe = parse_recipe(json.dumps({"merge_method": method, **RECIPES[method]}))
        merge(recipe, tmp_path / "out", workers=0, **options)
        return tmp_path / "out"

    return run_merge


@pytest.mark.parametrize("size", SHARDS)
@pytest.mark.parametrize("method", ["ties", "passthrough", "slerp"])
def test_every_shard_is_what_safetensors_writes(method: str, size: str, make_merge: Any, tmp_path: Path) -> None:
    check_shards(make_merge(method, shard_size=SHARDS[size]), tmp_path)


@pytest.mark.parametrize("method", [name for name in RECIPES if name not in ("ties", "passthrough", "slerp")])
def test_shards_of_every_method_are_what_safetensors_writes(method: str, make_merge: Any, tmp_path: Path) -> None:
    check_shards(make_merge(method), tmp_path)


def check_shards(out: Path, scratch: Path) -> None:
    """Write each shard's tensors again with safetensors, and compare the files."""
    shards = sorted(out.glob("*.safetensors"))
    assert shards
    for shard in shards:
        again = scratch / "again.safetensors"
        save_file(load_file(shard), again, metadata={"format": "pt"})
        assert shard.read_bytes() == again.read_bytes(), shard.name


def test_passthrough_copies_every_tensor_bit_for_bit(make_merge: Any, zoo: Path) -> None:
    found, wanted = read_tensors(make_merge("passthrough", shard_size=70_000)), read_tensors(zoo / "tuned")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a checkpoint."""
    found = json.loads((folder / "model.safetensors.index.json").read_text())
    assert isinstance(found, dict)
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare dtype, shape and bytes."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def test_index_names_every_tensor_where_it_is(make_merge: Any) -> None:
    out = make_merge("ties", shard_size=50_000)
    index = read_index(out)
    held: dict[str, str] = {}
    total = 0
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            held |= dict.fromkeys(opened.keys(), shard.name)
            total += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    assert len(set(held.values())) > 2
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("size", SHARDS)
def test_transformers_loads_the_folder_and_finds_every_weight(
    size: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(zoo)
    for name, seed in (("plain-a", 3), ("plain-b", 4)):
        if not (zoo / name).exists():
            write_llama(zoo / name, seed=seed, layers=2)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": "plain-a"}, {"model": "plain-b"}],
        "parameters": {"weight": 1},
    }
    merge(parse_recipe(json.dumps(recipe)), tmp_path / "out", workers=0, shard_size=SHARDS[size])
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: value for key, value in told.items() if value} == {}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    stored = read_tensors(tmp_path / "out")
    assert [name for name, tensor in model.state_dict().items() if not same_bits(tensor, stored[name])] == []
    model.save_pretrained(tmp_path / "again", max_shard_size=30_000)
    ours, theirs = (read_index(tmp_path / folder) for folder in ("out", "again"))
    assert ours["metadata"] == theirs["metadata"]
    assert list(ours["weight_map"]) == list(theirs["weight_map"])
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("the cat", return_tensors="pt")
    output = model.generate(**tokens, max_new_tokens=3, do_sample=False, pad_token_id=2)
    assert output.shape[1] > tokens["input_ids"].shape[1]
