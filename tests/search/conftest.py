"""Fixtures of the searches' tests."""

from pathlib import Path

import pytest
from search.toys import write_toys


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `write_toys` fills. Not to be changed."""
    return write_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def here(toys: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as the working directory."""
    monkeypatch.chdir(toys)
    return toys
