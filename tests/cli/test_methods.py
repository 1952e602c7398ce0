"""``mergemill methods``: what is there, what one of them is, and what it takes for a model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mergemill.engine import find_coefficients, find_methods, find_steps

Run = Callable[..., tuple[int, str, str]]


def facts_of(text: str) -> dict[str, str]:
    """Return the lines of two columns as a mapping; the last of a name holds."""
    return {line.split("  ")[0]: line.partition("  ")[2].strip() for line in text.splitlines() if "  " in line}


def test_all_methods_and_stages_are_listed(mergemill: Run) -> None:
    _, out, _ = mergemill("methods")
    assert {line.split()[0] for line in out.splitlines()} == {
        "method", *find_methods(), *find_coefficients(), *find_steps(),
    }  # fmt: skip
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "post, after a method" in lines["svc"]
    assert "coefficients, before a method" in lines["lines"]


@pytest.mark.parametrize("name", find_methods())
def test_each_method_says_what_it_reads_and_how_often(mergemill: Run, name: str) -> None:
    code, out, err = mergemill("methods", name)
    facts, method = facts_of(out), find_methods()[name]
    assert (code, err) == (0, "")
    assert facts["reads"].startswith(f"{method.reads}: ")
    assert facts["passes"].startswith(f"{method.most_rounds + 1} over the inputs")
    assert facts["source"] == method.source
    assert {"models", "in memory"} <= facts.keys()


@pytest.mark.parametrize("name", [*find_coefficients(), *find_steps()])
def test_each_stage_is_shown_with_its_parameters(mergemill: Run, name: str) -> None:
    _, out, _ = mergemill("methods", name)
    stage = {**find_coefficients(), **find_steps()}[name]
    assert out.startswith(stage.title)
    assert all(parameter.name in out for parameter in stage.parameters)
    _, out, _ = mergemill("methods", name, "--json")
    assert json.loads(out)["kind"] == ("post" if name in find_steps() else "coefficients")


def test_the_cost_for_a_model_is_shown(mergemill: Run, here: Path) -> None:
    code, out, err = mergemill("methods", "ties", "--model", "base", "--models", 3)
    facts = facts_of(out)
    assert (code, err) == (0, "")
    assert facts["merging"] == "3 models like it and a base"
    assert facts["largest tensor"].endswith("BF16 [1024, 256], in 1 part")
    assert "its inputs are read 7 times" in facts["streamed"]
    assert "its inputs are read once" in facts["kept"]
    least_bytes = int(facts["least --memory"].split()[0])
    code, out, _ = mergemill("methods", "ties", "--model", "base", "--models", 3, "--json")
    found = json.loads(out)
    assert found["cost"]["least_bytes"] == least_bytes
    assert (found["passes"], found["grain"], found["cost"]["models"]) == (7, "block", 3)


def test_the_memory_said_is_the_memory_that_plan_accepts(mergemill: Run, here: Path) -> None:
    _, out, _ = mergemill("methods", "ties", "--model", "base", "--json")
    least_bytes = json.loads(out)["cost"]["least_bytes"]
    assert mergemill("plan", "ties.yml", "--memory", least_bytes)[0] == 0
    code, _, err = mergemill("plan", "ties.yml", "--memory", least_bytes - 1)
    assert code == 2
    assert f"needs {least_bytes} bytes" in err


def test_a_method_of_one_pass_says_nothing_of_keeping(mergemill: Run, here: Path) -> None:
    _, out, _ = mergemill("methods", "linear", "--model", "base")
    assert "kept" not in facts_of(out)
    assert facts_of(out)["merging"] == "2 models like it"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "base"], "--model is for one method"),
        (["lines", "--model", "base"], "lines is no method of its own"),
        (["ties", "--model", "nowhere"], "nowhere"),
        (["slerp", "--model", "base", "--models", 3], "slerp takes exactly 2 models; 3 were asked for"),
        (["ties", "--model", "base", "--models", 0], "--models"),
        (["meta"], "there is no method 'meta'; did you mean 'metagpt'?"),
    ],
)
def test_wrong_input_is_one_line(mergemill: Run, here: Path, arguments: list[str], words: str) -> None:
    code, out, err = mergemill("methods", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
