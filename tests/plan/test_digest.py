"""The plan's digest: equal where the output's bytes and the parts are equal, and only there."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plan.sketches import config, llama, plan_of, write_sketch

from mergemill.engine import describe_plan

RECIPE: dict[str, Any] = {
    "merge_method": "dare_ties",
    "base_model": "base",
    "models": [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 0.2}}],
    "parameters": {"density": 0.5},
}


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        write_sketch(tmp_path / name, llama(), config=config(), shards=2, tokenizer=True)


def digest(recipe: dict[str, Any] = RECIPE, **options: Any) -> str:
    return plan_of(recipe, **options).digest


def test_planning_twice_gives_the_same_plan() -> None:
    assert plan_of(RECIPE) == plan_of(RECIPE)
    assert len(digest()) == 64


def test_the_digest_does_not_depend_on_the_hash_seed() -> None:
    Path("recipe.yml").write_text(json.dumps(RECIPE))
    face = "from mergemill.engine import load_recipe, make_plan"
    code = f"{face}; print(make_plan(load_recipe('recipe.yml')).digest)"
    environ = {**os.environ, "PYTHONHASHSEED": "12345"}  # ours is another one
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"merge_method": "dare_linear"},
        {"parameters": {"density": 0.6}},
        {"parameters": {"density": 0.5, "rescale": False}},
        {"models": list(reversed(RECIPE["models"]))},
        {"models": RECIPE["models"][:1]},
        {"dtype": "float32"},
        {"base_model": "a", "models": [{"model": "b", "parameters": {"weight": 1}}]},
    ],
)
def test_another_recipe_gives_another_digest(changes: dict[str, Any]) -> None:
    assert digest(RECIPE | changes) != digest()


@pytest.mark.parametrize("options", [{"seed": 1}, {"shard_size": 1000}, {"shard_size": "tensor"}])
def test_another_seed_or_shard_size_gives_another_digest(options: dict[str, Any]) -> None:
    assert digest(**options) != digest()


def touch(path: Path) -> None:
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("a/model-00001-of-00002.safetensors", touch),
        ("base/config.json", lambda path: path.write_text(path.read_text().replace("[", "[7, "))),
        ("base/tokenizer.json", lambda path: path.write_text(path.read_text() + " ")),
    ],
)
def test_a_source_that_changes_gives_another_digest(file: str, change: Callable[[Path], Any]) -> None:
    before = digest()
    change(Path(file))
    assert digest() != before


def test_files_that_the_output_does_not_hold_do_not_count() -> None:
    before = digest()
    Path("base/training_args.bin").write_bytes(b"x")
    Path("a/tokenizer.json").write_text("{}")
    assert digest() == before


def test_memory_and_workers_do_not_count() -> None:
    plan = plan_of(RECIPE)
    found = [describe_plan(plan, memory=memory) for memory in ("200MB", "100GB")]
    assert [each["digest"] for each in found] == [plan.digest] * 2
    assert found[0]["memory_bytes"] != found[1]["memory_bytes"]
