"""What a run is asked: one value, and the same as keywords."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from mergemill.engine import describe_plan, merge, run, values
from mergemill.engine.runs import merge as merging

PAIRS = [(values.WorkerOptions, values.WorkerKeywords), (values.RunOptions, values.RunKeywords)]


@pytest.mark.parametrize(("value", "keywords"), PAIRS)
def test_keywords_are_the_fields_of_the_value(value: type[Any], keywords: type[Any]) -> None:
    hints = get_type_hints(value)
    assert {field.name: hints[field.name] for field in dataclasses.fields(value)} == get_type_hints(keywords)


@pytest.mark.parametrize("value", [value for value, _ in PAIRS])
def test_each_option_is_told_where_it_stands(value: type[Any]) -> None:
    own = value.__annotations__
    assert own
    assert [name for name in sorted(own) if f"{name}: " not in " ".join(str(value.__doc__).split())] == []


def test_run_names_all_of_its_options() -> None:
    asked = {field.name for field in dataclasses.fields(values.RunOptions)}
    assert [name for name in sorted(asked) if f"`{name}`" not in str(run.__doc__)] == []


@pytest.mark.parametrize("call", [run, describe_plan, merge])
def test_an_option_that_is_none_ends_it_before_anything_is_read(call: Callable[..., Any], tmp_path: Path) -> None:
    place = {} if call is describe_plan else {"out": tmp_path / "out"}
    with pytest.raises(TypeError, match="wrokers"):
        call("no-such-recipe.yml", **place, wrokers=2)
    assert list(tmp_path.iterdir()) == []


def test_options_of_a_merge_are_those_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(merging, "make_plan", lambda recipe, **given: told.update(given))
    monkeypatch.setattr(merging, "run_as", lambda plan, out, asked: asked)
    options = {"memory": "2GiB", "workers": 4, "storage": {"s3": {"region": "here"}}, "public": True}
    monkeypatch.setattr(merging, "check_places", lambda plans, **given: None)
    recipe = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    assert merge(recipe, "out", **options) == values.RunOptions(**options)  # type: ignore[arg-type]
    assert told["storage"] == {"s3": {"region": "here"}}
