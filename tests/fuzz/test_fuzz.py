"""What anybody may have written is read, or refused by an error of ours: the corpus that is kept, and what is near it.

Longer runs are for ``run.py``; here each target is tried for a moment, so that none of them rots.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import targets
from fuzz.mutations import mutate
from fuzz.targets import TARGETS, Target, try_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergemill.engine.errors import HeaderError, RecipeError

HERE = Path(__file__).parent
CORPUS = {name: [path.read_bytes() for path in sorted((HERE / "corpus" / name).iterdir())] for name in TARGETS}
MOST_BYTES = 20_000  # of a file of the corpus
SECONDS = 1  # of each target, by atheris


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_read_or_refused(name: str) -> None:
    for data in CORPUS[name]:
        try_target(name, data)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_near_the_corpus_is_read_or_refused(name: str) -> None:
    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(data=st.sampled_from(CORPUS[name]), seed=st.integers(0, 1 << 32), more=st.binary(max_size=8))
    def check(data: bytes, seed: int, more: bytes) -> None:
        try_target(name, mutate(data, seed) + more)

    check()


@pytest.mark.slow
def test_a_moment_of_fuzzing_finds_nothing(tmp_path: Path) -> None:
    """All targets by one command: watching what is imported takes ten times as long as a moment."""
    if importlib.util.find_spec("atheris") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("atheris is not installed; it is in the extra 'fuzz'")
    command = [sys.executable, str(HERE / "run.py"), *TARGETS, "--seconds", str(SECONDS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("stat::number_of_executed_units") == len(TARGETS)
    assert not list(tmp_path.iterdir())  # of findings


def test_the_corpus_is_small() -> None:
    for name, files in CORPUS.items():
        assert files, name
        assert max(map(len, files)) <= MOST_BYTES, name


@pytest.mark.parametrize(
    "error", [KeyError("a"), RecipeError("of another target"), HeaderError(""), HeaderError("a\nb")]
)
def test_another_error_than_a_target_names_is_a_finding(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def use(data: bytes) -> None:
        raise error

    monkeypatch.setattr(targets, "TARGETS", {"header": Target(use, (HeaderError,))})
    with pytest.raises((type(error), AssertionError)):
        try_target("header", b"")
