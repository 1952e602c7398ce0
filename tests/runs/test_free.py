"""Where an output can never be is found before anything is written."""

import os
from pathlib import Path

import pytest
from runs.merging import plan_merge

from mergemill.engine import run
from mergemill.engine.errors import OutputError
from mergemill.engine.plan.values import Plan

_UNFINISHED = ".mergemill/model-00001-of-00001.safetensors.tmp-0123456789ab"  # the longest name that the merge makes


@pytest.fixture
def plan(family: Path) -> Plan:
    return plan_merge("linear", family)


def refuse(plan: Plan, out: Path, words: str) -> None:
    with pytest.raises(OutputError, match=words) as found:
        run(plan, out, workers=0)
    assert found.value.exit_code == 2
    assert len(str(found.value)) < 400
    assert "\n" not in str(found.value)


def test_a_name_of_300_characters_is_refused_before_anything_is_written(plan: Plan, tmp_path: Path) -> None:
    refuse(plan, tmp_path / "new" / ("x" * 300) / "out", "a name of the output would be 45 bytes too long")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("over", [1, 100])
def test_a_whole_path_that_is_too_long_is_refused_before_anything_is_written(
    over: int, plan: Plan, tmp_path: Path
) -> None:
    refuse(plan, _make_long(tmp_path, over), f"a path of the output would be {over} bytes too long")
    assert list(tmp_path.iterdir()) == []


def test_the_longest_path_that_fits_is_an_output(plan: Plan, tmp_path: Path) -> None:
    out = _make_long(tmp_path, 0)
    run(plan, out, workers=0)
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("below", [".", "out"])
def test_an_output_that_is_or_lies_below_a_link_to_nothing_is_refused(below: str, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    refuse(plan, tmp_path / "link" / below, "link: is a link to 'gone', where nothing is; make that folder")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def _make_long(folder: Path, over: int) -> Path:
    """Return a folder whose longest path, while a merge goes on, is as long as may be, and `over` bytes more."""
    lacking = os.pathconf(folder, "PC_PATH_MAX") - 1 + over - len(os.fsencode(folder / _UNFINISHED))
    last = 100 + lacking % 100
    return folder.joinpath(*["d" * 99] * ((lacking - last) // 100), "e" * (last - 1))
