"""Fixtures of the tests of running."""

from pathlib import Path

import pytest
from run.merging import write_family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models ``base``, ``A`` and ``B``. Not to be changed."""
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def own_family(tmp_path: Path) -> Path:
    """The same three models, to be damaged by the test."""
    return write_family(tmp_path / "models")
