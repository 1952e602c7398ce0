"""Fixtures of the tests of running."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from models import EXTRAS
from runs.buckets import found_by_environment
from runs.merging import make_recipe_of, write_family
from servers.s3 import S3

from mergemill.engine import make_plan, run
from mergemill.engine.runs.events import Committed


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models ``base``, ``A`` and ``B``. Not to be changed."""
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def large_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same names, for shards of several uploads of the size that S3 asks for, with odd tensors, [] and [0, 512].

    Not to be changed.
    """
    folder = tmp_path_factory.mktemp("large_family")
    return write_family(folder, vocab=8000, hidden=512, layers=1, extras=EXTRAS)


@pytest.fixture
def s3(s3_server: S3) -> Iterator[S3]:
    """SeaweedFS and then moto, found by merges of this process through the environment."""
    with found_by_environment(s3_server):
        yield s3_server


@pytest.fixture
def seaweed(seaweed_server: S3) -> Iterator[S3]:
    """SeaweedFS, found by merges of this process through the environment."""
    with found_by_environment(seaweed_server):
        yield seaweed_server


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
