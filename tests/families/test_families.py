"""Each family of transformers: a tiny model saved by it, merged and stacked, does what engine/README.md says of it.

A sample is run; ``MERGEMILL_FAMILIES=all`` runs every family, ``MERGEMILL_FAMILIES=gemma3,t5`` those.
"""

import json
import os
import re
from pathlib import Path

import pytest
import transformers
from families.checks import find_average_fault, iter_stack_faults, load, merge_whole, plan_of, stack_recipe
from families.tiny import list_families, make_model

from mergemill.engine import merge
from mergemill.engine.errors import InputError
from mergemill.engine.recipe import parse_recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(transformers.__version__ != "5.23.0", reason="the table is of transformers 5.23.0"),
]
GIVEN = json.loads((Path(__file__).parent / "given.json").read_text())
PAGE = Path(__file__).parents[2] / "engine" / "README.md"
EVERY = 24  # of so many families one is in the sample


def read_table() -> dict[str, str]:
    """Return what the page says of each family's stack."""
    rows = re.findall(
        r"^\| (loads|loads, told|refused|whole only|not built) \| (.+) \|$", PAGE.read_text(), re.MULTILINE
    )
    return {name: verdict for verdict, names in rows for name in names.split(", ")}


TABLE = read_table()
BUILT = sorted(name for name, verdict in TABLE.items() if verdict != "not built")


def choose() -> list[str]:
    """Return the families that are run."""
    asked = os.environ.get("MERGEMILL_FAMILIES", "")
    return BUILT[::EVERY] if not asked else BUILT if asked == "all" else asked.split(",")


def test_the_table_has_every_family() -> None:
    assert sorted(TABLE) == sorted(list_families())


@pytest.mark.parametrize("name", choose())
def test_a_family_is_merged_and_stacked_as_the_table_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = [make_model(name, GIVEN.get(name, {}), seed) for seed in range(2)]
    for model, folder in zip(models, "ab", strict=True):
        model.save_pretrained(folder)
    kind = type(models[0])
    (a, told_a), (b, _) = (load(kind, Path(folder)) for folder in "ab")
    merge_whole(Path("a"), Path("b"), Path("whole"))
    whole, told = load(kind, Path("whole"))
    assert told == told_a  # nothing, but for what transformers itself complains of
    assert find_average_fault(whole, a, b) == ""
    if TABLE[name] == "whole only":
        return
    recipe = stack_recipe(Path("a"))
    if TABLE[name] == "refused":
        with pytest.raises(InputError, match=r"recipe\.yml: |config\.json: "):
            plan_of(recipe)
        return
    plan = plan_of(recipe)
    assert any("calculates" in warning for warning in plan.warnings) == (TABLE[name] == "loads, told")
    merge(parse_recipe(json.dumps(recipe)), tmp_path / "stack", workers=0)
    stack, told = load(kind, Path("stack"))
    assert told == told_a
    assert list(iter_stack_faults(stack, a)) == []
