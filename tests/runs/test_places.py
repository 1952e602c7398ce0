"""One text means one place to all that take a location: models, outputs, recipes, cluster files, and every command."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from plan.sketches import config, llama, write_sketch

from mergemill.cli.main import execute
from mergemill.engine import abort, cancel, inspect, load_cluster, load_recipe, make_plan, merge, run, status, verify
from mergemill.engine.errors import InputError


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models in a folder whose name must be escaped in URLs."""
    place = tmp_path / "my models"
    for name in ("a", "b"):
        write_sketch(place / name, llama(), config=config())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return place


def linear(*names: str) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 0.5}} for name in names]}


SPELLINGS = ("{}", "file://{}", "file:{}", "FILE://localhost{}")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_file_url_is_read_and_written_alike(models: Path, spelling: str) -> None:
    def spell(path: Path) -> str:
        return spelling.format(str(path).replace(" ", "%20") if spelling != "{}" else path)

    (models / "recipe.yml").write_text(json.dumps(linear(spell(models / "a"), spell(models / "b"))))
    out = spell(models / "out")
    merge(spell(models / "recipe.yml"), out, workers=0)
    assert (models / "out" / "model.safetensors.index.json").is_file()
    assert sorted(path.name for path in models.parent.iterdir()) == ["my models"]
    assert verify(out).parts == status(out).parts_done
    assert inspect(out).kind == "merge"
    plan = make_plan(linear(out, spell(models / "a")))
    assert [str(Path(pin.url).parent) for pin in plan.pins] == [str(models / "a"), str(models / "out")]


def test_the_home_folder_is_read_and_written_alike(models: Path) -> None:
    merge(linear("~/my models/a", "~/my models/b"), "~/out", workers=0)
    assert inspect("~/out").kind == "merge"
    assert sorted(os.listdir(models.parent)) == ["my models", "out"]  # noqa: PTH208 -- names alone


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("s3:/bucket/out", "write s3://bucket/out, or ./s3:/bucket/out for a folder"),
        ("hf:org/name", "write hf://org/name, or"),
        ("file:out", "file:///folder"),
        ("file://host/out", "means a folder of this machine"),
        ("file:///out?", "%3F"),
        (" s3://bucket/out", "begins with a scheme such as s3://"),
        ("a\0b", "holds a NUL character"),
    ],
)
def test_what_is_nearly_a_url_is_refused_by_all_with_what_would_be_right(models: Path, text: str, right: str) -> None:
    plan = make_plan(linear("my models/a", "my models/b"))
    for take in (
        lambda: make_plan(linear(text, "my models/a")),
        lambda: make_plan({**linear("my models/a"), "base_model": text}),
        lambda: run(plan, text, workers=0),
        lambda: merge(linear("my models/a"), text, workers=0),
        *(lambda each=each: each(text) for each in (verify, status, abort, cancel, inspect)),
        lambda: load_recipe(text),
        lambda: load_cluster(f"{text}.yml"),
        lambda: make_plan(linear("my models/a"), methods=[text]),
        lambda: run(plan, "out", workers=0, cache="1GiB", cache_folder=text),
    ):
        with pytest.raises(InputError) as caught:
            take()
        assert right.replace("out", "") in str(caught.value).replace("out", "").replace(".yml", "")
    assert [path.name for path in models.parent.iterdir()] == ["my models"]


def test_a_recipe_a_cluster_file_and_methods_lie_on_a_disk(models: Path) -> None:
    for take, what in (
        (lambda: load_recipe("s3://b/r.yml"), "a recipe"),
        (lambda: load_cluster("s3://b/c.yml"), "a cluster file"),
        (lambda: make_plan(linear("my models/a"), methods=["s3://b/m.py"]), "a file of methods"),
    ):
        with pytest.raises(InputError, match=f"{what} lies on a disk of this machine; copy it there first"):
            take()


@pytest.mark.parametrize("command", ["verify", "inspect", "status", "abort", "attach", "cancel"])
def test_every_command_refuses_what_is_nearly_a_url(
    models: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute([command, "s3:/bucket/out"]) == 2
    assert "s3:/bucket/out: is no URL; write s3://bucket/out" in " ".join(capsys.readouterr().err.split())
