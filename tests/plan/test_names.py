"""Names that a disk may not take are found by the plan."""

from pathlib import Path

import pytest
from models import write_json
from plan.sketches import config, llama, plan_of, write_sketch

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.names import check_lengths, warn_of_twins


@pytest.mark.parametrize("letter", ["m", "é"])
def test_a_donors_file_with_too_long_a_name_is_found_before_the_merge(letter: str, tmp_path: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": str(tmp_path)}]}
    write_sketch(tmp_path, llama(), config=config())
    size = len(letter.encode())
    (tmp_path / f"{letter * (230 // size)}.model").write_bytes(b"x")
    plan_of(recipe)
    (tmp_path / f"{letter * (240 // size)}.model").write_bytes(b"x")
    with pytest.raises(PlanError, match="8 bytes too long for a disk"):
        plan_of(recipe)


def test_folders_of_a_name_have_a_length_of_their_own() -> None:
    check_lengths([f"{'f' * 255}/a"])
    with pytest.raises(PlanError, match="1 bytes too long"):
        check_lengths([f"{'f' * 256}/a"])


def test_names_that_are_one_on_other_disks_are_told(tmp_path: Path) -> None:
    write_sketch(tmp_path, llama(), config=config(auto_map={"AutoModel": "model_x.X"}))
    for name in ("model_x.py", "Model_X.py"):
        (tmp_path / name).write_text("")
    write_json(tmp_path / "tokenizer_config.json", {})
    (warning,) = plan_of({"merge_method": "passthrough", "models": [{"model": str(tmp_path)}]}).warnings
    assert warning.startswith("model_x.py and Model_X.py differ in case alone")
    assert list(warn_of_twins(["a", "b"])) == []
