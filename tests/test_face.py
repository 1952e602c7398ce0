"""The package `mergemill`: what people import, and ``python -m mergemill``."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from test_rooms import HEAVY, list_loaded

import mergemill
import mergemill.engine

FACE = [
    "__version__",
    "abort",
    "attach",
    "cancel",
    "errors",
    "events",
    "inspect",
    "load_cluster",
    "load_recipe",
    "make_plan",
    "make_raw_plan",
    "merge",
    "merge_state_dicts",
    "merge_tensors",
    "methods",
    "run",
    "status",
    "values",
    "verify",
]


def test_the_package_has_exactly_these_names() -> None:
    assert mergemill.__all__ == FACE
    assert set(FACE) <= set(dir(mergemill))


@pytest.mark.parametrize("name", FACE[1:])
def test_each_name_is_the_engines_own(name: str) -> None:
    assert getattr(mergemill, name) is getattr(mergemill.engine, name)


def test_types_are_told_of_every_name() -> None:
    tree = ast.parse(Path(mergemill.__file__).read_text("utf-8"))
    told = {name.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names}
    assert told >= set(FACE[1:])


def test_another_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="module 'mergemill' has no attribute 'merg'"):
        getattr(mergemill, "merg")  # noqa: B009 - which is what is tried


def test_importing_mergemill_imports_no_library() -> None:
    assert list_loaded("import mergemill") & (HEAVY | {"dask", "numpy", "pydantic", "yaml", "rich", "typer"}) == set()


def test_the_version_costs_no_library() -> None:
    assert list_loaded("import mergemill; mergemill.__version__") & (HEAVY | {"dask", "numpy", "pydantic"}) == set()


def test_python_m_mergemill_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mergemill", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mergemill {mergemill.__version__}\n"
    assert done.stderr == ""


def test_python_m_mergemill_ends_with_the_code_of_its_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mergemill", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mergemill: error: ")
