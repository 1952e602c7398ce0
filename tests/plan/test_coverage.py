"""The ledger: every tensor of every input is merged, copied, or dropped by a named rule."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan.sketches import config, llama, make_recipe, name_inputs, plan_of, write_sketch

from mergemill.engine.checkpoint import choose_family, open_checkpoint
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.formats import offer_stored
from mergemill.engine.plan.coverage import Ledger
from mergemill.engine.plan.stacks import make_stacks
from mergemill.engine.plan.values import Plan

LAYERS = 4
RULES = {
    "layer outside every slice",
    "before the layers, which come from the first slice",
    "after the layers, which come from the last slice",
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, one of them tied."""
    folder = tmp_path_factory.mktemp("coverage")
    for name in ("a", "b", "tied"):
        tied = name == "tied"
        write_sketch(folder / name, llama(layers=LAYERS, tied=tied), config=config(layers=LAYERS, tied=tied))
    return folder


def make_sources(ranges: list[tuple[str, int, int]], zoo: Path) -> list[dict[str, Any]]:
    """Return the sources of a slice, all cut to the height of its shortest."""
    height = min(last - first for _, first, last in ranges)
    return [{"model": str(zoo / name), "layer_range": [first, first + height]} for name, first, _ in ranges]


RANGE = st.tuples(st.sampled_from(["a", "b", "tied"]), st.integers(0, LAYERS), st.integers(0, LAYERS)).filter(
    lambda drawn: drawn[1] < drawn[2]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(RANGE, min_size=1, max_size=3), min_size=1, max_size=4))
def test_every_tensor_of_every_input_is_read_or_dropped_by_a_rule(zoo: Path, slices: list[Any]) -> None:
    sources = [{"sources": make_sources(ranges, zoo)} for ranges in slices]
    plan = plan_of({"merge_method": "linear", "slices": sources, "parameters": {"weight": 1}})
    read = {name for inputs in name_inputs(plan).values() for name in inputs}
    files: set[str] = set()
    for source in plan.sources:
        held = open_checkpoint(source.model).tensors
        used = [name for name in held if f"{source.model}:{name}" in read]
        assert source.tensors == len(held) == source.merged + source.copied + sum(source.dropped.values())
        assert source.merged == len(used)
        assert source.read_bytes == sum(held[name].nbytes for name in used)
        assert set(source.dropped) <= RULES
        files |= {held[name].file.url for name in used}
    assert [pin.url for pin in plan.pins] == sorted(files)
    assert {source.model for source in plan.sources} == {each["model"] for part in sources for each in part["sources"]}


def find_dropped(plan: Plan) -> dict[str, dict[str, int]]:
    """Return what is dropped of each model, by rule."""
    return {Path(source.model).name: dict(source.dropped) for source in plan.sources}


def test_a_frankenmerge_says_what_it_leaves_out(zoo: Path) -> None:
    slices = [{"sources": make_sources([("a", 0, 3)], zoo)}, {"sources": make_sources([("b", 2, 4)], zoo)}]
    assert find_dropped(plan_of({"merge_method": "passthrough", "slices": slices})) == {
        "a": {"after the layers, which come from the last slice": 2, "layer outside every slice": 9},
        "b": {"before the layers, which come from the first slice": 1, "layer outside every slice": 18},
    }


def test_a_donor_in_no_slice_gives_no_tensor(zoo: Path) -> None:
    recipe = {"merge_method": "passthrough", "slices": [{"sources": make_sources([("a", 0, 4)], zoo)}]}
    plan = plan_of(recipe | {"base_model": str(zoo / "b")})
    assert (plan.sources[1].merged, plan.sources[1].copied) == (0, 0)
    assert sum(plan.sources[1].dropped.values()) == plan.sources[1].tensors
    assert {Path(pin.url).parent.name for pin in plan.pins} == {"a"}


def test_copied_and_merged_are_told_apart(zoo: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": str(zoo / "a")}]}
    scale = {"parameters": {"scale": [{"filter": "mlp", "value": 2}]}}
    (source,) = plan_of(recipe | scale).sources
    assert (source.merged, source.copied, dict(source.dropped)) == (3 * LAYERS, 6 * LAYERS + 3, {})


def test_a_tensor_that_is_merged_and_copied_counts_once_as_merged(zoo: Path) -> None:
    first, second = ({"sources": make_sources([("a", 0, 1)], zoo)} for _ in range(2))
    slices = [first | {"parameters": {"scale": 2}}, second]
    (source,) = plan_of({"merge_method": "passthrough", "slices": slices}).sources
    assert (source.merged, source.copied) == (9 + 1, 2)


@pytest.mark.parametrize(
    "forgotten", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"]
)
def test_a_tensor_that_nothing_accounts_for_is_an_error(forgotten: str, zoo: Path) -> None:
    """No recipe comes to this; a planner that forgets a tensor does."""
    checkpoint = open_checkpoint(str(zoo / "a"))
    family = choose_family(checkpoint.config)
    recipe = make_recipe({"merge_method": "linear", "models": [{"model": "a"}]})
    stacks = make_stacks(recipe, {"a": checkpoint}, {"a": offer_stored(checkpoint)}, family)
    ledger = Ledger()
    for name in checkpoint.tensors:
        if name != forgotten:
            ledger.use("a", name, "merged")
    with pytest.raises(PlanError, match=f"a: tensor {forgotten} would be lost"):
        ledger.close({"a": checkpoint}, stacks, family)
    ledger.drop("a", forgotten, "a rule")
    (source,) = ledger.close({"a": checkpoint}, stacks, family)
    assert dict(source.dropped) == {"a rule": 1}
