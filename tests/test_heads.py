"""Output heads where tied and untied models meet: what is written, and what transformers makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors, write_llama
from transformers import AutoModelForCausalLM

from mergemill.engine import merge
from mergemill.engine.recipe import parse_recipe

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = {"tied": True, "tied-too": True, "untied": False, "untied-too": False}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llamas of two layers in float32: two that are tied and two that are not."""
    folder = tmp_path_factory.mktemp("heads")
    for seed, (name, tied) in enumerate(TIED.items()):
        write_llama(folder / name, seed=seed, layers=2, tied=tied, dtype="float32")
    return folder


def find_head(zoo: Path, name: str) -> torch.Tensor:
    """Return the head that a model computes with."""
    tensors = read_tensors(zoo / name)
    return tensors.get(HEAD, tensors[EMBEDDING])


def load(recipe: dict[str, Any], zoo: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Merge, and return the model that transformers makes of it without a complaint."""
    monkeypatch.chdir(zoo)
    merge(parse_recipe(json.dumps(recipe)), out, workers=0)
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {key: value for key, value in told.items() if value} == {}
    return model


@pytest.mark.parametrize("donor", [None, *TIED])
@pytest.mark.parametrize(("first", "last"), [("untied", "tied"), ("tied", "untied"), ("untied", "untied-too")])
def test_a_stack_embeds_like_its_first_slice_and_ends_like_its_last(
    first: str, last: str, donor: str | None, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in (first, last)]
    recipe = {"merge_method": "passthrough", "slices": slices} | ({"base_model": donor} if donor else {})
    model = load(recipe, zoo, tmp_path / "out", monkeypatch)
    assert torch.equal(model.model.embed_tokens.weight, read_tensors(zoo / first)[EMBEDDING])
    assert torch.equal(model.lm_head.weight, find_head(zoo, last))
    assert model.config.tie_word_embeddings is False
    assert model.config.num_hidden_layers == 4


def test_a_stack_of_tied_models_stays_tied_to_the_embedding_of_its_first_slice(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model has a head of its own, so the stack gets none; mergekit's stacks of tied models are so too."""
    slices = [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in ("tied", "tied-too")]
    model = load({"merge_method": "passthrough", "slices": slices}, zoo, tmp_path / "out", monkeypatch)
    assert HEAD not in read_tensors(tmp_path / "out")
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, find_head(zoo, "tied"))


@pytest.mark.parametrize(("a", "b"), [("tied", "untied"), ("untied", "tied"), ("tied", "tied-too")])
def test_a_merge_averages_the_heads_that_its_models_compute_with(
    a: str, b: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": a}, {"model": b}], "parameters": {"weight": 1}}
    model = load(recipe, zoo, tmp_path / "out", monkeypatch)
    assert model.config.tie_word_embeddings is (TIED[a] and TIED[b])
    torch.testing.assert_close(model.lm_head.weight.data, (find_head(zoo, a) + find_head(zoo, b)) / 2)


def test_a_tied_base_gives_its_embedding_as_the_base_of_heads(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("untied", "untied-too")]
    recipe = {"merge_method": "task_arithmetic", "base_model": "tied", "models": models}
    model = load(recipe, zoo, tmp_path / "out", monkeypatch)
    wanted = (find_head(zoo, "untied") + find_head(zoo, "untied-too")) / 2
    torch.testing.assert_close(model.lm_head.weight.data, wanted)
