"""Fixtures of the tests of running."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from run.merging import make_recipe_of, write_family

from mergemill.engine import Committed, make_plan, run


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models ``base``, ``A`` and ``B``. Not to be changed."""
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def own_family(tmp_path: Path) -> Path:
    """The same three models, to be damaged by the test."""
    return write_family(tmp_path / "models")


@pytest.fixture
def merge_here() -> Callable[..., Committed]:
    """Merge a recipe into a folder."""

    def merge(recipe: Mapping[str, Any], out: Path, **options: Any) -> Committed:
        return run(make_plan(make_recipe_of(recipe)), out, workers=0, threads=2, **options)

    return merge
