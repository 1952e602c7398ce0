"""Merges on a system that has only what macOS has are the same, byte for byte."""

from pathlib import Path

import pytest
from lacking import FULL_SYNC, as_on_macos
from runs.merging import finished_parts, hash_output, plan_merge, run_until

from mergemill.engine import run, verify


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_a_merge_has_the_same_bytes(method: str, family: Path, tmp_path: Path) -> None:
    run(plan_merge(method, family), tmp_path / "here", workers=0, threads=2)
    with as_on_macos() as commands:
        plan = plan_merge(method, family)
        run(plan, tmp_path / "there", workers=0)
        verify(tmp_path / "there")
    assert FULL_SYNC in commands
    assert hash_output(tmp_path / "there") == hash_output(tmp_path / "here")


def test_a_merge_that_was_killed_is_resumed(family: Path, tmp_path: Path) -> None:
    run(plan_merge("linear", family), tmp_path / "here", workers=0)
    with as_on_macos():
        plan = plan_merge("linear", family)
        run_until(plan, tmp_path / "there", 2)
        kept = finished_parts(tmp_path / "there")
        run(plan, tmp_path / "there", workers=0)
    assert len(kept) >= 2
    assert finished_parts(tmp_path / "there")[: len(kept)] == kept
    assert hash_output(tmp_path / "there") == hash_output(tmp_path / "here")
