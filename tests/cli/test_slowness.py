"""Where the native loops are off, whoever plans, merges or asks for the version is told so, in a sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mergemill.engine import describe_slowness, make_plan, run
from mergemill.engine.tensors import native

Run = Callable[..., tuple[int, str, str]]
SENTENCE = "the native loops are off (MERGEMILL_NATIVE=0): merges take 3 to 15 times as long"


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the native loops, as a process is that was started so."""
    monkeypatch.setenv("MERGEMILL_NATIVE", "0")
    monkeypatch.setattr(native, "load", lambda: None)


@pytest.mark.usefixtures("off")
def test_plan_version_and_env_say_so(mergemill: Run, here: Path) -> None:
    assert f"warning: {SENTENCE}\n" in mergemill("plan", "ties.yml")[1]
    assert json.loads(mergemill("plan", "ties.yml", "--json")[1])["warnings"] == [SENTENCE]
    assert mergemill("--version")[2] == f"warning: {SENTENCE}\n"
    assert "off: MERGEMILL_NATIVE=0" in mergemill("env")[1]


@pytest.mark.usefixtures("off")
def test_a_merge_says_so_and_so_does_its_result(mergemill: Run, here: Path, tmp_path: Path) -> None:
    code, _, err = mergemill("merge", "ties.yml", tmp_path / "out", "--workers", "0", "--threads", "1")
    assert code == 0
    assert err.count(f"warning: {SENTENCE}\n") == 2  # before, and when it is done
    committed = run(make_plan("ties.yml"), tmp_path / "again", workers=0, threads=1)
    assert committed.warnings == (SENTENCE,)
    assert SENTENCE in repr(committed)
    again = run(make_plan("ties.yml"), tmp_path / "again", workers=0)
    assert again.warnings == ()  # it is finished already


@pytest.mark.usefixtures("off")
def test_of_a_clusters_machines_nothing_is_said(mergemill: Run, here: Path, tmp_path: Path) -> None:
    (tmp_path / "cluster.yml").write_text("kind: slurm\nworkers: 2\n")
    code, out, _ = mergemill("plan", "ties.yml", "--cluster", tmp_path / "cluster.yml", "--memory", "1GiB")
    assert code == 0
    assert "native loops" not in out


def test_that_they_were_not_built_is_told_with_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERGEMILL_NATIVE", raising=False)
    monkeypatch.setattr(native, "load", lambda: None)
    assert "(not built; install a C compiler, and mergemill again)" in describe_slowness()


@pytest.mark.skipif(native.load() is None, reason="the native loops were not built: there is no C compiler")
def test_where_they_are_on_nothing_is_said(mergemill: Run, here: Path, tmp_path: Path) -> None:
    assert describe_slowness() == ""
    assert "native" not in "".join(mergemill("plan", "ties.yml")[1:])
    assert mergemill("--version")[2] == ""
    assert run(make_plan("ties.yml"), tmp_path / "out", workers=0, threads=1).warnings == ()
