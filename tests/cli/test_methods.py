"""``mergemill methods``: what is there, what one of them is, and what it takes for a model."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mergemill.engine.methods import find_coefficients, find_methods, find_steps

Run = Callable[..., tuple[int, str, str]]


def facts_of(text: str) -> dict[str, str]:
    """Return the lines of two columns as a mapping; the last of a name holds."""
    return {line.split("  ")[0]: line.partition("  ")[2].strip() for line in text.splitlines() if "  " in line}


def test_all_methods_and_steps_are_listed(mergemill: Run) -> None:
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
def test_each_step_is_shown_with_its_parameters(mergemill: Run, name: str) -> None:
    _, out, _ = mergemill("methods", name)
    step = {**find_coefficients(), **find_steps()}[name]
    assert out.startswith(step.title)
    assert all(parameter.name in out for parameter in step.parameters)
    _, out, _ = mergemill("methods", name, "--json")
    assert json.loads(out)["kind"] == ("post" if name in find_steps() else "coefficients")


def test_the_cost_for_a_model_is_shown(mergemill: Run, here: Path) -> None:
    code, out, err = mergemill("methods", "ties", "--model", "base", "--models", 3)
    facts = facts_of(out)
    assert (code, err) == (0, "")
    assert facts["merging"] == "3 models like it and a base"
    assert facts["largest tensor"].endswith("BF16 [1024, 256], in 1 part")
    assert "its inputs are read 9 times at most" in facts["streamed"]
    assert "its inputs are read once" in facts["kept"]
    least_bytes = int(facts["least --memory"].split()[0])
    code, out, _ = mergemill("methods", "ties", "--model", "base", "--models", 3, "--json")
    found = json.loads(out)
    assert found["cost"]["least_bytes"] == least_bytes
    assert (found["passes"], found["grain"], found["cost"]["models"]) == (9, "block", 3)


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


OWN = '''"""Own: the first model.

Source: a test.
"""

from torch import Tensor

from mergemill.engine.methods import merge_method


@merge_method(reads="element")
def first(models: list[Tensor], *, scale: float = 1.0) -> Tensor:
    """Return the first model, scaled."""
    return models[0].mul_(scale)
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with ``own.py``, and ``plain.yml`` that does not name it."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "plain.yml").write_text("merge_method: first\nmodels: [{model: ./a}, {model: ./b}]\n")
    return tmp_path


def test_own_methods_are_listed_and_shown(mergemill: Run, here: Path, own: Path) -> None:
    _, out, _ = mergemill("methods", "--methods", own / "own.py")
    assert any(line.split()[0] == "first" and "the first model." in line for line in out.splitlines())
    _, out, _ = mergemill("methods", "first", "--methods", own / "own.py", "--model", "base")
    assert out.startswith("Own: the first model.\n")
    assert facts_of(out)["merging"] == "2 models like it"
    assert mergemill("methods", "first")[0] == 2


def test_plan_and_merge_say_whose_code_they_run(mergemill: Run, here: Path, own: Path, tmp_path: Path) -> None:
    checksum = hashlib.sha256(OWN.encode()).hexdigest()
    code, out, _ = mergemill("plan", own / "plain.yml", "--methods", own / "own.py")
    assert code == 0
    assert f"  code    {own}/own.py, sha256 {checksum}: is run by this merge\n" in out
    assert "warning" not in out
    code, _, err = mergemill("merge", own / "plain.yml", tmp_path / "out", "--methods", own / "own.py")
    assert code == 0
    assert f"own.py, sha256 {checksum}" in err
    code, out, err = mergemill("verify", tmp_path / "out", "--replay", 1)
    assert "1 part merged again" in out
    assert err == f"merging again runs the code of own.py (sha256 {checksum}), as {tmp_path / 'out'} keeps it\n"
    assert mergemill("verify", tmp_path / "out")[2] == ""


def test_a_recipe_that_names_code_is_warned_of(mergemill: Run, here: Path, own: Path) -> None:
    named = own / "named.yml"
    named.write_text((own / "plain.yml").read_text() + "methods: own.py\n")
    _, out, _ = mergemill("plan", named)
    assert f"warning: {named}: runs the code of own.py beside it, here and on every worker (sha256 " in out
    _, out, _ = mergemill("plan", named, "--json")
    assert json.loads(out)["code"][0]["path"] == str(own / "own.py")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(:\n", "own.py:1: invalid syntax"),
        ("", "own.py: holds no merge method"),
        (None, "own.py: cannot be read"),
    ],
)
def test_a_wrong_file_of_methods_is_one_line(
    mergemill: Run, here: Path, own: Path, text: str | None, words: str
) -> None:
    (own / "own.py").unlink() if text is None else (own / "own.py").write_text(text)
    for command in (["plan", own / "plain.yml"], ["merge", own / "plain.yml", own / "out"], ["methods"]):
        code, out, err = mergemill(*command, "--methods", own / "own.py")
        assert (code, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1
    assert not (own / "out").exists()
