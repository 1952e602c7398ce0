"""A stack of slices is refused, with both sides, where it is no model of the config that is written for it."""

from pathlib import Path
from typing import Any

import pytest
from plan.sketches import EMBEDDING, HEAD, Sketch, config, llama, plan_of, read_json, write_sketch

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.values import Plan


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, tensors: Sketch | None = None, *, layers: int = 4, **more: Any) -> None:
    write_sketch(Path(name), llama(layers=layers) if tensors is None else tensors, config=config(layers=layers, **more))


def stack(*ranges: tuple[str, int, int]) -> Plan:
    """Plan one slice a range."""
    slices = [{"sources": [{"model": model, "layer_range": [first, last]}]} for model, first, last in ranges]
    return plan_of({"merge_method": "passthrough", "slices": slices})


def mixture(*dense: int, layers: int = 4) -> dict[str, Any]:
    """Return a Llama whose layers are mixtures of experts but for the `dense` ones."""
    found: dict[str, Any] = {}
    for name, of in llama(layers=layers).items():
        before, mlp, rest = name.partition(".mlp.")
        if mlp and int(before.rpartition(".")[2]) not in dense:
            found |= {f"{before}.mlp.experts.{e}.{rest}": of for e in range(2)}
            found[f"{before}.mlp.gate.weight"] = ("BF16", (2, 8))
        else:
            found[name] = of
    return found


def heads(count: int) -> dict[str, Any]:
    """Return a Llama with another number of key and value heads."""
    return {
        name: ("BF16", (4 * count, 8)) if "k_proj" in name or "v_proj" in name else of
        for name, of in llama(layers=4).items()
    }


OTHERS: dict[str, tuple[Sketch, str]] = {
    "hidden size": (llama(layers=4, hidden=16), r"input_layernorm.weight of shape \[16\].* of shape \[8\]"),
    "key and value heads": (heads(2), r"k_proj.weight of shape \[8, 8\].* of shape \[4, 8\]"),
    "a bias": (llama(layers=4) | {f"model.layers.{i}.b": ("BF16", (8,)) for i in range(4)}, r"has b of shape.* no b "),
    "experts": (mixture(), r"layer 2 of the output is layer 1 of other, which has no mlp.down_proj.weight;"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_layers_of_another_kind_are_refused_with_both(kind: str) -> None:
    tensors, words = OTHERS[kind]
    write("a")
    write("other", tensors)
    with pytest.raises(PlanError, match=words):
        stack(("a", 0, 2), ("other", 1, 2), ("a", 3, 4))


@pytest.mark.parametrize("end", ["first", "last"])
def test_an_embedding_or_head_of_another_vocabulary_is_refused(end: str) -> None:
    write("a")
    write("other", llama(layers=4, vocab=24))
    other, a = [("other", 0, 1)], [("a", 1, 3)]
    ranges = [*other, *a] if end == "first" else [*a, *other]
    base = {"base_model": "a"}
    slices = [{"sources": [{"model": model, "layer_range": [x, y]}]} for model, x, y in ranges]
    name = EMBEDDING if end == "first" else HEAD
    with pytest.raises(PlanError, match=rf"{name} of the output has shape \[24, 8\], but .* of a, .* has \[16, 8\]"):
        plan_of({"merge_method": "passthrough", "slices": slices, **base})


def test_a_head_is_compared_with_the_embedding_where_the_donor_has_none() -> None:
    write("a", llama(layers=4, tied=True), tied=True)
    write("other", llama(layers=4, vocab=24))
    with pytest.raises(PlanError, match=rf"{HEAD} of the output .*but {EMBEDDING} has \[16, 8\]"):
        stack(("a", 0, 3), ("other", 3, 4))


def test_dense_layers_may_stay_in_front_and_no_where_else() -> None:
    write("ds", mixture(0), first_k_dense_replace=1)
    assert read_json(stack(("ds", 0, 3), ("ds", 2, 4)), "config.json")["num_hidden_layers"] == 5
    for ranges in ([(0, 2), (0, 4)], [(1, 4)]):
        with pytest.raises(PlanError, match="Slices must leave each kind of layer at a place of its kind"):
            stack(*(("ds", *each) for each in ranges))


@pytest.mark.parametrize(
    ("ranges", "fits"), [([(0, 4), (0, 4)], True), ([(0, 4), (2, 6)], True), ([(0, 3), (2, 6)], False)]
)
def test_kinds_that_alternate_without_a_word_must_go_on_alternating(ranges: list[tuple[int, int]], fits: bool) -> None:
    write("jamba", mixture(0, 2, 4, layers=6), layers=6)
    if fits:
        assert stack(*(("jamba", *each) for each in ranges)).tensors
    else:
        with pytest.raises(PlanError, match=r"layer 3 of the output is layer 2 of jamba"):
            stack(*(("jamba", *each) for each in ranges))


def test_kinds_that_the_config_lists_follow_their_layers() -> None:
    kinds = ["dense", "sparse", "sparse", "dense"]
    write("listed", mixture(0, 3), mlp_layer_types=kinds)
    plan = stack(("listed", 0, 2), ("listed", 0, 4), ("listed", 3, 4))
    assert read_json(plan, "config.json")["mlp_layer_types"] == [*kinds[:2], *kinds, "dense"]


def test_a_list_that_does_not_tell_the_kinds_apart_excuses_nothing() -> None:
    write("listed", mixture(0, 3), layer_types=["full_attention"] * 4)
    with pytest.raises(PlanError, match="layer 2 of the output is layer 0 of listed"):
        stack(("listed", 0, 2), ("listed", 0, 4))


def test_a_stack_that_the_config_does_not_count_is_refused_unless_nothing_moves() -> None:
    counted = config(layers=4)
    del counted["num_hidden_layers"]
    write_sketch(Path("odd"), llama(layers=4), config=counted)
    assert stack(("odd", 0, 4)).tensors
    with pytest.raises(PlanError, match=r"says nowhere how many layers 'model.layers' has"):
        stack(("odd", 0, 3), ("odd", 1, 4))


def later(name: str) -> None:
    extra = {"model.layers.4.eh_proj.weight": ("BF16", (8, 16))}
    tensors = llama(layers=5) | extra
    write_sketch(Path(name), tensors, config=config(layers=4, num_nextn_predict_layers=1))


def test_a_layer_that_predicts_later_tokens_is_no_layer_of_the_stack() -> None:
    later("glm")
    with pytest.raises(PlanError, match=r"layer_range \[0, 5\] of glm: its config counts 4 layers"):
        stack(("glm", 0, 5))


@pytest.mark.parametrize("ranges", [[(0, 4)], [(0, 3), (1, 4)]])
def test_a_stack_without_it_does_not_promise_it(ranges: list[tuple[int, int]]) -> None:
    later("glm")
    plan = stack(*(("glm", *each) for each in ranges))
    assert read_json(plan, "config.json")["num_nextn_predict_layers"] == 0
    assert any("num_nextn_predict_layers becomes 0" in warning for warning in plan.warnings)


def test_an_embedding_of_other_rows_than_the_config_says_is_told() -> None:
    write("a", vocab_size=20)
    (warning,) = plan_of({"merge_method": "passthrough", "models": [{"model": "a"}]}).warnings
    assert f"{EMBEDDING} has shape [16, 8], but the config of a says vocab_size 20" in warning


def test_layers_do_not_move_beside_a_tensor_that_holds_something_for_each() -> None:
    table = {"model.embed_tokens_per_layer.weight": ("BF16", (16, 4 * 2))}
    write("nano", llama(layers=4) | table)
    assert stack(("nano", 0, 4)).tensors
    for ranges in ([(0, 2), (1, 4)], [(0, 3)]):
        with pytest.raises(PlanError, match=r"embed_tokens_per_layer\.weight holds rows or columns for each layer of"):
            stack(*(("nano", *each) for each in ranges))


def test_what_the_config_says_of_a_layer_by_its_number_follows_it() -> None:
    write("a", per_layer_config={"1": {"head_dim": 2}, "3": {"head_dim": 4}})
    made = read_json(stack(("a", 0, 2), ("a", 1, 4)), "config.json")
    assert made["per_layer_config"] == {"1": {"head_dim": 2}, "2": {"head_dim": 2}, "4": {"head_dim": 4}}


@pytest.mark.parametrize(("ranges", "told"), [([(0, 4)], False), ([(0, 3), (2, 4)], True)])
def test_a_family_that_calculates_by_a_layers_number_is_told_where_layers_move(
    ranges: list[tuple[int, int]], told: bool
) -> None:
    write("a", model_type="diffllama")
    plan = stack(*(("a", *each) for each in ranges))
    assert any("diffllama calculates how strong a layer is" in warning for warning in plan.warnings) is told


def test_two_keys_of_one_count_change_together() -> None:
    write("a", model_type="xlstm", num_blocks=4)
    made = read_json(stack(("a", 0, 3), ("a", 2, 4)), "config.json")
    assert (made["num_blocks"], made["num_hidden_layers"]) == (5, 5)
