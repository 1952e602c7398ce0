"""``python -OO`` keeps no docstrings and asks no asserts, and every byte of an output is the same."""

import subprocess
import sys
from pathlib import Path

import pytest
from models import write_llama

MERGE = """
import sys
from mergemill.engine import load_recipe, make_plan, run
run(make_plan(load_recipe(sys.argv[1])), sys.argv[2], workers=0, threads=1)
"""
OWN = '''"""The mean, as one of us has it."""

import torch

from mergemill.engine.methods import merge_method


@merge_method(reads="element")
def mean(models: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean."""
    return sum(models) / len(models)
'''
BASE = "base_model: a\n"
RECIPES = {"ties": BASE, "linear": "", "own": "methods: own.py\n"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECIPES)
def test_optimised_python_writes_the_same_bytes(kind: str, tmp_path: Path) -> None:
    a = write_llama(tmp_path / "a", seed=1, layers=2, hidden=16, heads=2, intermediate=16, vocab=64)
    write_llama(tmp_path / "b", seed=2, layers=2, hidden=16, heads=2, intermediate=16, vocab=64, near=a)
    (tmp_path / "own.py").write_text(OWN)
    method = "mean" if kind == "own" else kind
    weights = "" if kind == "own" else "  parameters: {weight: 0.5}\n"
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: {method}\n{RECIPES[kind]}models:\n- model: a\n{weights}- model: b\n{weights}"
    )
    for name, flags in (("plain", []), ("optimised", ["-OO"])):
        command = [sys.executable, *flags, "-c", MERGE, "recipe.yml", name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    plain, optimised = (_read(tmp_path / name) for name in ("plain", "optimised"))
    assert "README.md" in plain
    assert plain == optimised


def _read(folder: Path) -> dict[str, bytes]:
    """Return every file but what tells of the run: its driver, its times."""
    told = {"driver.json", "journal.jsonl", "lock"}
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in told]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
