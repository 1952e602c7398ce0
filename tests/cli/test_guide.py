"""``mergemill methods --guide``: the page is what the methods say, and each built-in one says enough."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mergemill.engine.methods import find_coefficients, find_methods, find_steps

Run = Callable[..., tuple[int, str, str]]
PAGE = Path(__file__).parents[2] / "engine" / "methods" / "guide.md"


def test_the_page_is_what_the_command_says(mergemill: Run) -> None:
    """To make it anew: mergemill methods --guide > engine/methods/guide.md."""
    code, out, err = mergemill("methods", "--guide")
    assert (code, err) == (0, "")
    assert out == PAGE.read_text(encoding="utf-8")


def test_the_guide_has_every_method_once(mergemill: Run) -> None:
    rows = [line.split("`")[1] for line in mergemill("methods", "--guide")[1].splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted([*find_methods(), *find_coefficients(), *find_steps()])


@pytest.mark.parametrize("name", [*find_methods(), *find_coefficients(), *find_steps()])
def test_each_says_what_it_is_for_and_on_what_evidence(name: str) -> None:
    found = {**find_methods(), **find_coefficients(), **find_steps()}[name]
    assert found.purpose.endswith(".")
    assert found.evidence.endswith(".")


def test_one_method_shows_both(mergemill: Run) -> None:
    method = find_methods()["ties"]
    _, out, _ = mergemill("methods", "ties")
    assert method.purpose in out
    assert method.evidence in out
    shown = json.loads(mergemill("methods", "ties", "--json")[1])
    assert (shown["purpose"], shown["evidence"]) == (method.purpose, method.evidence)


def test_a_method_that_says_nothing_is_told_so(mergemill: Run, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import Tensor\nfrom mergemill.engine.methods import merge_method\n\n\n"
        '@merge_method(reads="element")\ndef silent(models: list[Tensor]) -> Tensor:\n    return models[0]\n'
    )
    _, out, _ = mergemill("methods", "--guide", "--methods", tmp_path / "own.py")
    assert "| `silent` | nothing is said | 1 or more | once | blocks | nothing is said |" in out


def test_the_guide_is_of_all_methods(mergemill: Run) -> None:
    code, _, err = mergemill("methods", "ties", "--guide")
    assert code == 2
    assert "--guide is for all methods: mergemill methods --guide" in err
