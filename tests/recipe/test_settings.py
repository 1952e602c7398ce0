"""Settings: which shapes there are, and what a filter matches."""

import pytest

from mergemill.engine.recipe import Condition, Parameters, parse_recipe


def read_setting(written: str) -> object:
    return parse_recipe(f"{{merge_method: m, models: [{{model: a}}], parameters: {{t: {written}}}}}").parameters["t"]


@pytest.mark.parametrize(
    ("written", "setting"),
    [
        ("1", 1),
        ("0.5", 0.5),
        ("1e-5", 1e-5),
        ("-2.5E+3", -2500.0),
        ("yes", True),
        ("off", False),
        ("mean", "mean"),
        ("'0.5'", "0.5"),
        ("2024-01-01", "2024-01-01"),
        ("[0, 0.5, 1]", (0, 0.5, 1)),
        ("[0.5]", (0.5,)),
        ("[true, false]", (True, False)),
        ("[a, b]", ("a", "b")),
        ("{filter: mlp, value: 1}", (Condition(filter="mlp", value=1),)),
        ("[{value: [0, 1]}]", (Condition(value=(0, 1)),)),
    ],
)
def test_shapes(written, setting):
    read = read_setting(written)
    assert repr(read) == repr(setting)  # True is not 1 here, nor 1 the same as 1.0


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (None, True),
        ("*", True),
        ("self_attn", True),
        ("layers.1", True),
        ("layers.?1", False),
        (r"re:layers\.\d+\.self", True),
        ("re:^self", False),
    ],
)
def test_filters(pattern, matches):
    condition = Condition(filter=pattern, value=1)
    assert condition.matches("model.layers.10.self_attn.q_proj.weight") is matches


def test_parameters_are_an_immutable_mapping_in_the_order_of_names():
    parameters = Parameters({"weight": 1, "density": 0.5})
    assert list(parameters) == ["density", "weight"]
    assert parameters == Parameters({"density": 0.5, "weight": 1})
    assert parameters.get("lambda") is None
    with pytest.raises(TypeError):
        parameters["weight"] = 2
