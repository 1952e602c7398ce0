"""The commands of searches, on tiny models: what they print, and for programs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from search.toys import by_model, by_values, make_search, write_toys

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `write_toys` fills. Not to be changed."""
    return write_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def there(toys: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as the working directory."""
    monkeypatch.chdir(toys)
    return toys


def test_evolve_tells_each_candidate_and_the_best(mergemill: Run, there: Path, tmp_path: Path) -> None:
    path = tmp_path / "search.yml"
    path.write_text(json.dumps(make_search(by_values(), strategy={"name": "sobol"}, budget={"evaluations": 9})))
    code, out, err = mergemill("evolve", path, tmp_path / "s", "--evaluations", 5)
    assert code == 0
    assert err.count("\n") == 5
    assert "the best so far" in err
    assert out.startswith("best: number ")
    assert out.rstrip().endswith(f"merge the best with: mergemill merge {tmp_path}/s/best.yml OUT")
    code, out, err = mergemill("evolve", path, tmp_path / "s", "--json", "--quiet")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["evaluations"], found["failed"], found["stopped"]) == (9, 0, "evaluations")
    assert mergemill("evolve", path, tmp_path / "s", "-q") == (0, "", "")
    assert found["best"].keys() == {"number", "values", "score", "holdout"}
    code, out, _ = mergemill("results", tmp_path / "s", "--json", "--top", 3)
    scores = [json.loads(line)["score"] for line in out.splitlines()]
    assert scores == sorted(scores)
    assert scores[0] == found["best"]["score"]
    _, out, _ = mergemill("evolve", path, tmp_path / "s", "--write")
    assert out.rstrip().endswith(f"ended by evaluations; the best is in {tmp_path}/s/model")
    assert (tmp_path / "s" / "model" / "config.json").exists()
    _, out, _ = mergemill("results", tmp_path / "s")
    assert out.split()[:5] == ["number", "score", "hold-out", "x", "y"]


def test_a_candidates_recipe_is_printed_whole(mergemill: Run, there: Path, tmp_path: Path) -> None:
    arguments = ["recipe.yml", tmp_path / "s", "--vary", "x=0:1:0.5", "--vary", "y=0.25", "--command", by_values()]
    code, out, _ = mergemill("sweep", *arguments, "--quiet", "--json")
    assert (code, json.loads(out)["evaluations"]) == (0, 3)
    code, out, _ = mergemill("results", tmp_path / "s", "--recipe", 1)
    assert code == 0
    (tmp_path / "recipe.yml").write_text(out)
    assert mergemill("plan", tmp_path / "recipe.yml")[0] == 0
    assert "weight: 0.25" in out
    assert mergemill("results", tmp_path / "s", "--recipe", 7)[0] == 2


def test_a_search_that_failed_says_why_also_for_programs(mergemill: Run, there: Path, tmp_path: Path) -> None:
    arguments = ["recipe.yml", tmp_path / "s", "--vary", "x=0:1:0.5", "--vary", "y=0.25", "--command", "false {model}"]
    code, out, err = mergemill("sweep", *arguments, "-q")
    assert (code, out) == (1, "")
    assert "false: ended with status 1" in err
    lines = [json.loads(line) for line in mergemill("results", tmp_path / "s", "--json")[1].splitlines()]
    assert [(line["state"], line["error"]) for line in lines] == [("failed", "false: ended with status 1")] * 3
    assert mergemill("results", tmp_path / "s")[1].count("false: ended with status 1") == 3


def test_soup_and_cocktail_print_json_in_the_given_order(mergemill: Run, there: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": "./zero"}, {"model": "./two"}],
        "parameters": {"weight": 1},
    }
    (tmp_path / "soup.yml").write_text(json.dumps(recipe))
    code, out, _ = mergemill("soup", tmp_path / "soup.yml", tmp_path / "a", "--command", by_model(1.2), "--json")
    made = json.loads(out)
    assert code == 0
    assert (made["order"], made["kept"]) == (["./two", "./zero"], ["./two", "./zero"])
    assert made["scores"] == pytest.approx([0.8, 0.2], abs=1e-6)
    given = ["./zero", "./two", "--out", tmp_path / "b", "--command", by_model(1.2)]
    code, out, _ = mergemill("cocktail", *given, "--json")
    made = json.loads(out)
    assert made["losses"] == pytest.approx([1.2, 0.8], abs=1e-6)
    assert sum(made["weights"]) == pytest.approx(1.0)
    _, out, _ = mergemill("cocktail", *given)
    assert "at 0.1" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep", "recipe.yml", "s", "--vary", "x=0,1"], "by one of --text and --command"),
        (["sweep", "recipe.yml", "s", "--vary", "x=0:1", "--command", "a {model}"], "y} is no variable"),
        (["evolve", "nowhere.yml", "s"], "nowhere.yml: cannot be read"),
        (["results", "zero"], "zero: holds no search"),
    ],
)
def test_wrong_input_is_one_line(mergemill: Run, there: Path, arguments: list[str], words: str) -> None:
    code, out, err = mergemill(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert not (there / "s").exists()
