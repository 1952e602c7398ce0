"""The demo, from nothing to a verified merge."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from models import read_tensors

from mergemill.cli import demo_models
from mergemill.cli.demo import list_examples

Run = Callable[..., tuple[int, str, str]]


def test_demo_merges_and_a_second_one_says_that_it_is_done(
    mergemill: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = mergemill("demo")
    assert (code, err) == (0, "")
    assert "Verified mergemill-demo/merged" in out
    assert "mergemill plan mergemill-demo/recipe.yml" in out
    assert (tmp_path / "mergemill-demo/merged/model.safetensors.index.json").exists()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 32e6

    code, out, _ = mergemill("demo")
    assert code == 0
    assert "holds the demo already" in out
    assert "mergemill demo mergemill-demo-2" in out


def test_demo_merges_something_that_differs_from_its_inputs(mergemill: Run, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert mergemill("demo", folder)[0] == 0
    name = "model.layers.0.mlp.up_proj.weight"
    merged = read_tensors(folder / "merged")[name]
    inputs = [read_tensors(folder / model)[name] for model in ("models/base", "models/variant-a", "models/variant-b")]
    assert all(not merged.equal(tensor) for tensor in inputs)


def test_demo_that_was_stopped_goes_on(mergemill: Run, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert mergemill("demo", folder)[0] == 0
    (folder / "models/variant-b/model.safetensors").unlink()
    for path in sorted((folder / "merged").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    code, out, _ = mergemill("demo", folder)
    assert code == 0
    assert "Verified" in out


def test_demo_leaves_a_folder_of_others_alone(mergemill: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text("merge_method: linear\n")
    code, _, err = mergemill("demo", tmp_path)
    assert code == 2
    assert "holds other files" in err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"VOCABULARY": 64, "HIDDEN": 16, "INTERMEDIATE": 32}.items():
        monkeypatch.setattr(demo_models, name, size)


@pytest.mark.parametrize("name", list_examples())
def test_every_example_is_a_demo(mergemill: Run, tmp_path: Path, tiny: None, name: str) -> None:
    code, out, err = mergemill("demo", tmp_path / "demo", "--recipe", name, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["redone_parts"] > 0


def test_a_demo_of_an_example_is_no_other_demo(
    mergemill: Run, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = mergemill("demo", "my demo", "--recipe", "linear")
    assert code == 0
    assert "Made 2 Llama models of " in out
    _, out, _ = mergemill("demo", "my demo", "--recipe", "linear")
    assert "for a new one: mergemill demo --recipe linear 'my demo-2'" in out
    code, out, err = mergemill("demo", "my demo")
    assert (code, out) == (2, "")
    assert "holds other files" in err


def test_an_example_that_is_not_there_names_those_that_are(mergemill: Run) -> None:
    code, _, err = mergemill("demo", "--recipe", "slirp")
    assert code == 2
    assert "slerp" in err
