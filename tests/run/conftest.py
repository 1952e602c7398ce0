"""Fixtures of the tests of running."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from run.merging import make_recipe_of, write_family

from mergemill.engine import Committed, make_plan, run
from mergemill.engine.run import drive
from mergemill.engine.run.cluster import Workers, open_cluster


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models ``base``, ``A`` and ``B``. Not to be changed."""
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def own_family(tmp_path: Path) -> Path:
    """The same three models, to be damaged by the test."""
    return write_family(tmp_path / "models")


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A worker of this process, for the many small merges of a module."""
    with open_cluster(Workers(0, 2, 1 << 30)) as client:
        yield client


@pytest.fixture
def merge_here(client: Client, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Committed]:
    """Merge a recipe into a folder."""

    def merge(recipe: Mapping[str, Any], out: Path, **options: Any) -> Committed:
        with monkeypatch.context() as patch:
            patch.setattr(drive, "open_cluster", lambda workers: nullcontext(client))
            return run(make_plan(make_recipe_of(recipe)), out, workers=0, threads=2, **options)

    return merge
