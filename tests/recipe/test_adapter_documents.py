"""Documents with adapters: what is wrong with one is told in the words of the others."""

from typing import Any

import pytest

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe.adapters import load_adapters

FAULTS: tuple[tuple[dict[str, Any], str], ...] = (
    (
        {"rank": 0},
        "'rank' must be a whole number from 1 on, full, {energy: SHARE}, or ranks by module, not the number 0",
    ),
    (
        {"rank": True},
        "'rank' must be a whole number from 1 on, full, {energy: SHARE}, or ranks by module, not the boolean true",
    ),
    ({"rank": {"energy": 95}}, "has an energy of the number 95; it is a share, above 0 and up to 1"),
    ({"space": "cor"}, "'space' is the text 'cor', an unknown space; did you mean 'core'?"),
    ({"space": 3}, "'space' is the number 3, an unknown space; known here: delta, core, knots"),
)


@pytest.mark.parametrize(("more", "words"), FAULTS)
def test_a_bad_document_is_told_in_one_line(more: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_adapters({"adapters": [{"adapter": "a"}], "merge_method": "ties", **more})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranks_and_spaces_are_read() -> None:
    found = load_adapters({"adapters": [{"adapter": "a"}], "merge_method": "ties", "rank": 4, "space": "knots"})
    assert (found.rank, found.space) == (4, "knots")
