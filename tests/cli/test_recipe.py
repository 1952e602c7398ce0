"""``mergemill recipe …``: what it writes is what ``mergemill merge -`` takes."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import read_tensors

Run = Callable[..., tuple[int, str, str]]


def feed(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def test_shuffled_layers_are_merged_from_stdin(
    mergemill: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    code, text, err = mergemill("recipe", "layershuffle", "-m", "base", "-m", "a", "--seed", "1", "--full-random")
    assert (code, err) == (0, "")
    feed(text.encode(), monkeypatch)
    code, _, err = mergemill("merge", "-", str(tmp_path / "out"), "--quiet")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] >= 2
    assert (tmp_path / "out" / "recipe.yml").read_text().strip() == text.strip()


def test_bakllama_takes_the_ends_from_their_models_and_scales_the_mlps(
    mergemill: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    file, recipe, out = tmp_path / "stack.yml", tmp_path / "recipe.yml", tmp_path / "out"
    file.write_text(
        "layer_slices: [{model: base, start: 0, end: 2, scale: 0.5}]\nembedding_source: a\nlm_head_source: b\n"
    )
    assert mergemill("recipe", "bakllama", str(file), "-o", str(recipe)) == (0, "", "")
    assert mergemill("merge", str(recipe), str(out), "--quiet")[0] == 0
    made, base, first, last = (read_tensors(folder) for folder in (out, models / "base", models / "a", models / "b"))
    assert torch.equal(made["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert torch.equal(made["model.norm.weight"], last["model.norm.weight"])
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(made[name], (base[name].float() * 0.5).to(base[name].dtype))
    same = name.replace("down_proj", "up_proj")
    assert torch.equal(made[same], base[same])


def test_legacy_words_become_a_recipe(mergemill: Run) -> None:
    words = ["--merge", "A", "--merge", "B", "--base-model", "base", "--density", "0.5", "--bf16", "--int8-mask"]
    code, out, _ = mergemill("recipe", "legacy", *words)
    assert code == 0
    assert "merge_method: ties\nbase_model: base\n" in out
    code, _, err = mergemill("recipe", "legacy", *words, "--naive-count")
    assert code == 2
    assert "no method counts signs; ties weighs them" in err


def test_stdin_that_is_no_recipe_is_refused(mergemill: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, fault in (
        (b"", "the recipe is empty"),
        (b"\xff\xfe", "stdin: not UTF-8 text"),
        (b" " * (2 << 20), "stdin:"),
    ):
        feed(text, monkeypatch)
        code, out, err = mergemill("plan", "-")
        assert (code, out) == (2, "")
        assert fault in err
