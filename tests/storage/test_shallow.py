"""Brackets of YAML are read to a depth: each word within them costs PyYAML a look at all that are open."""

import pytest
import yaml

from mergemill.engine.storage.shallow import MOST_DEPTH, ShallowLoader


@pytest.mark.parametrize(("opening", "closing"), ["[]", "{}"])
def test_brackets_are_read_to_a_depth_and_no_deeper(opening: str, closing: str) -> None:
    assert yaml.compose(opening * MOST_DEPTH + closing * MOST_DEPTH, Loader=ShallowLoader) is not None
    with pytest.raises(yaml.YAMLError, match=f"brackets are nested more than {MOST_DEPTH} deep"):
        yaml.compose(opening * (MOST_DEPTH + 1), Loader=ShallowLoader)


def test_many_brackets_that_are_closed_again_are_no_depth() -> None:
    assert yaml.compose("[" + "[1], " * 1000 + "]", Loader=ShallowLoader) is not None
