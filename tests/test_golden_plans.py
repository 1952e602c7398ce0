"""The plan of every recipe in ``configs/recipes`` is a golden file: a refactor must not change it.

A golden says what is made of what, not where it lies on this disk. Where a change is meant, write them anew
and read the difference before you commit it::

    MERGEMILL_WRITE_GOLDENS=1 pytest tests/test_golden_plans.py
    git diff tests/golden
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from models import write_llama
from plan.sketches import list_stored, list_tensors, name_inputs

from mergemill.engine import load_recipe, make_plan
from mergemill.engine.plan.values import OutputTensor, Plan, SmallFile
from mergemill.engine.tensors.expressions import Agreed
from mergemill.engine.tensors.merged import Merged

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yml"))
GOLDENS = ROOT / "tests" / "golden"
WRITE = "MERGEMILL_WRITE_GOLDENS"
SHARD_SIZE = 20_000  # bytes: several shards of small models


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every model that the recipes name."""
    folder = tmp_path_factory.mktemp("zoo")
    models = folder / "models"
    sizes: dict[str, Any] = {
        "layers": 8,
        "hidden": 16,
        "heads": 2,
        "kv_heads": 1,
        "intermediate": 32,
        "vocab": 64,
    }
    base = write_llama(models / "base", seed=1, **sizes)
    write_llama(models / "chat", seed=2, near=base, **sizes)
    write_llama(models / "code", seed=3, near=base, shards=3, **sizes)
    write_llama(models / "math", seed=4, near=base, **sizes)
    write_llama(models / "chat-fp16", seed=5, near=base, dtype="float16", **sizes)
    small = sizes | {"layers": 4}
    tied = write_llama(models / "small-base", seed=6, tied=True, extras=("integer", "scalar"), **small)
    write_llama(models / "small-chat", seed=7, near=tied, tied=True, extras=("integer", "scalar"), **small)
    write_llama(models / "small-untied", seed=8, near=tied, extras=("integer", "scalar"), **small)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_plan_of_a_published_recipe_is_its_golden(path: Path, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo)
    plan = make_plan(load_recipe(path), shard_size=SHARD_SIZE)
    found = json.dumps(describe(plan, path), indent=1, ensure_ascii=False) + "\n"
    golden = GOLDENS / f"{path.stem}.json"
    if os.environ.get(WRITE):
        golden.write_text(found, encoding="utf-8")
    assert golden.is_file(), f"there is no {golden.name}; write it with {WRITE}=1"
    assert found == golden.read_text(encoding="utf-8")


def test_every_golden_has_its_recipe() -> None:
    assert [path.stem for path in sorted(GOLDENS.iterdir())] == [path.stem for path in RECIPES]


def test_every_recipe_begins_with_what_it_is_for() -> None:
    assert [path.name for path in RECIPES if not path.read_text().startswith("# ")] == []


def describe(plan: Plan, path: Path) -> dict[str, Any]:
    """Return all of a plan that does not depend on where its files lie, or when they were written."""
    donor = Path(next(file.copied.url for file in plan.files if file.copied)).parent
    inputs = name_inputs(plan)
    return {
        "method": plan.origin.title,
        "tensors": {name: describe_tensor(tensor, inputs[name]) for name, tensor in list_tensors(plan).items()},
        "shards": {shard.name: list(shard.tensors) for shard in plan.shards},
        "parts": [
            f"{plan.shards[part.shard].name}: {part.size_bytes} bytes, {len(part.pieces)} pieces" for part in plan.parts
        ],
        "files": [describe_file(file, donor) for file in plan.files],
        "config changes": find_changes(plan, donor),
        "sources": {
            source.model: {
                "tensors": source.tensors,
                "merged": source.merged,
                "copied": source.copied,
                "dropped": dict(source.dropped),
                "read_bytes": source.read_bytes,
            }
            for source in plan.sources
        },
        "warnings": [warning.replace(str(path), path.name) for warning in plan.warnings],
    }


def describe_tensor(tensor: OutputTensor, inputs: tuple[str, ...]) -> str:
    """Return one line for one tensor: what it is, and how it is made of what."""
    expression = tensor.expression
    shape = "×".join(map(str, expression.shape)) or "scalar"
    # A model alone stands for its tensor of the same name, and for the dtype that is written.
    sources = ", ".join(
        name.removesuffix(f":{tensor.name}") + (f" ({stored.dtype})" if stored.dtype != tensor.dtype else "")
        for name, stored in zip(inputs, list_stored(tensor), strict=True)
    )
    if isinstance(expression, Merged):
        settings = " ".join(f"{name}={show(value)}" for name, value in expression.settings.items())
        base = "base, " if expression.has_base else ""
        places = ",".join(map(str, expression.place.models))
        factors = f"; factors {show(expression.factors)}" if expression.factors else ""
        vectors = f"; vectors {show(expression.vectors)}" if expression.vectors else ""
        how = f"{expression.kernel.name} in {expression.dtype} ({settings}; {base}places {places}{factors}{vectors})"
    else:
        how = "agreed" if isinstance(expression, Agreed) else "copied"
    return f"{tensor.dtype} {shape} {how} of {sources}"


def show(value: Any) -> str:
    """Return a setting as text; numbers by their shortest form that is exact to twelve digits."""
    if isinstance(value, tuple):
        return f"[{', '.join(show(item) for item in value)}]"
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def describe_file(file: SmallFile, donor: Path) -> str:
    """Return where a small file comes from."""
    if file.copied is None:
        return f"{file.name}: made"
    return f"{file.name}: copied from {Path(file.copied.url).relative_to(donor.parents[1])}"


def find_changes(plan: Plan, donor: Path) -> dict[str, str]:
    """Return the keys of the config that the merge changes."""
    before = json.loads((donor / "config.json").read_text())
    (made,) = [file.data for file in plan.files if file.name == "config.json"]
    assert made is not None
    after = json.loads(made)
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    return {key: f"{before.get(key)} -> {after.get(key)}" for key in keys}
