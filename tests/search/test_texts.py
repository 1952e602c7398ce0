"""Searches judged by texts: nothing is written, a generation is judged together, and commands say it by options."""

import csv
import json
from pathlib import Path

import pytest
from evaluation.families import TEXT, write_family

from mergemill.cli.main import execute
from mergemill.engine import evaluate
from mergemill.engine.errors import InputError
from mergemill.engine.search.searches import TextSource, make_candidate, read_results, run_search


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny models, two texts and examples. Not to be changed."""
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("a", "b")):
        write_family(folder / name, "llama", seed=seed)
    (folder / "held.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT[::-1])
    (folder / "few.jsonl").write_text(json.dumps({"input": "The harbour", "output": " wakes"}))
    return folder


@pytest.fixture
def here(texts: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(texts)
    return texts


def make_search(**more: object) -> dict[str, object]:
    models = [{"model": "./a", "parameters": {"weight": "${x}"}}, {"model": "./b", "parameters": {"weight": 0.5}}]
    return {
        "recipe": {"merge_method": "linear", "models": models, "parameters": {"normalize": False}},
        "variables": {"x": {"low": 0.0, "high": 1.0}},
        "objective": {"perplexity": {"text": "held.txt", "window": 32}},
        "strategy": {"name": "grid", "steps": 3},
        **more,
    }


def test_a_search_by_perplexity_writes_no_model_and_reads_each_generation_once(here: Path, tmp_path: Path) -> None:
    found = run_search(make_search(holdout={"text": "other.txt", "window": 32}), tmp_path / "s", write=True)
    page = (tmp_path / "s" / "plot.html").read_text()
    assert page.count('class="level"') >= 4  # candidate 0 and a parent, in two pictures
    assert "<td>./a</td>" in page
    card = (tmp_path / "s" / "model" / "README.md").read_text()
    assert "* `held.txt`, sha256 `" in card
    assert "| `b` | " in card
    recipe = (tmp_path / "s" / "best.yml").read_text()
    assert found.best is not None
    alone = evaluate(recipe, TextSource(text="held.txt", window=32))
    assert found.best.score == pytest.approx(alone.perplexity, rel=1e-6)
    assert found.best.stderr == pytest.approx(alone.stderr, rel=1e-4)
    other = evaluate(recipe, TextSource(text="other.txt", window=32))
    assert found.best.holdout == pytest.approx(other.perplexity, rel=1e-6)
    assert found.trials[2].bytes_read == 0  # those before in its generation have read all that it needs
    once = evaluate(make_candidate(tmp_path / "s", 1), TextSource(text="held.txt", window=32)).bytes_read
    assert sum(each.bytes_read for each in found.trials) == 2 * once  # of two texts
    assert not list((tmp_path / "s" / "candidates").iterdir())


def test_a_search_of_two_texts_shows_its_front(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = [{"perplexity": {"text": name, "window": 64}} for name in ("held.txt", "other.txt")]
    strategy, budget = {"name": "nsga2", "population": 4}, {"evaluations": 8}
    search = make_search(objective={"sum": items}, strategy=strategy, budget=budget)
    (tmp_path / "s.yml").write_text(json.dumps(search))
    assert execute(["evolve", str(tmp_path / "s.yml"), str(tmp_path / "s"), "--json", "-q"]) == 0
    front = json.loads(capsys.readouterr().out)["front"]
    parts = {trial.number: trial.parts for trial in read_results(tmp_path / "s")}
    assert front
    for number, own in parts.items():
        assert (number in front) == (not any(x <= own[0] and y <= own[1] and (x, y) != own for x, y in parts.values()))
    assert execute(["results", str(tmp_path / "s"), "--top", "8"]) == 0
    assert capsys.readouterr().out.count("front") == len(front)
    assert execute(["evolve", str(tmp_path / "s.yml"), str(tmp_path / "s")]) == 0
    assert f"front: number {front[0]} (" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "s" / "table.csv").read_text().splitlines()))
    assert [int(row["number"]) for row in rows if row["front"] == "1"] == sorted(front)
    assert {int(row["number"]): float(row["perplexity of other.txt"]) for row in rows} == {
        number: own[1] for number, own in parts.items()
    }
    page = (tmp_path / "s" / "README.md").read_text()
    assert f"by perplexity of held.txt: {', '.join(f'number {number}' for number in front)}.\n" in page
    assert page.count("| yes |") == len(front)
    assert "perplexity of other.txt against perplexity of held.txt: the front" in (tmp_path / "s/plot.html").read_text()


def test_a_race_ends_with_the_best_that_there_is_without_and_goes_on_after_a_kill(here: Path, tmp_path: Path) -> None:
    def search(**more: object) -> dict[str, object]:
        return make_search(objective={"perplexity": {"text": "held.txt", "window": 16}}, **more)

    whole = run_search(search(strategy={"name": "grid", "steps": 5}), tmp_path / "whole")
    raced = run_search(search(strategy={"name": "grid", "steps": 5, "racing": True}), tmp_path / "raced")
    assert whole.best is not None
    assert raced.best is not None
    assert (raced.best.number, raced.best.score) == (whole.best.number, pytest.approx(whole.best.score, rel=1e-9))
    assert 0 < sum(trial.raced for trial in raced.trials) < 5
    for one, other in zip(raced.trials, whole.trials, strict=True):
        assert one.score == pytest.approx(other.score, rel=0.1 if one.raced else 1e-9)
    with (tmp_path / "raced" / "table.csv").open() as table:
        assert [int(row["estimated"]) for row in csv.DictReader(table)] == [trial.raced for trial in raced.trials]
    for page in ("README.md", "plot.html"):
        assert ", estimated" in (tmp_path / "raced" / page).read_text()
        assert ", estimated" not in (tmp_path / "whole" / page).read_text()
    (tmp_path / "again").mkdir()
    lines = (tmp_path / "raced" / "trials.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "again" / "trials.jsonl").write_bytes(b"".join(lines[:3]))
    (tmp_path / "again" / "search.json").write_bytes((tmp_path / "raced" / "search.json").read_bytes())
    again = run_search(search(strategy={"name": "grid", "steps": 5, "racing": True}), tmp_path / "again")
    assert [trial.score for trial in again.trials] == [trial.score for trial in raced.trials]


def test_a_generation_in_which_one_cannot_be_judged_is_judged_one_by_one(here: Path, tmp_path: Path) -> None:
    """Its trial says why, and the others have the scores that they have together."""
    search = make_search(objective={"sum": [{"entropy": {"text": "held.txt", "window": 32}}]})
    search["recipe"] = {**search["recipe"], "merge_method": "${m}", "parameters": {}}  # type: ignore[dict-item]
    search["recipe"]["models"][0]["parameters"] = {"weight": "${x}"}  # type: ignore[index]
    search["variables"] = {"m": {"choices": ["linear", "nearswap", "passthrough"]}, "x": {"choices": [0.5]}}
    with pytest.raises(InputError, match="a corner"):
        run_search(search, tmp_path / "s")
    search["variables"] = {"m": {"choices": ["linear", "passthrough", "karcher"]}, "x": {"choices": [0.5]}}
    trials = run_search(search, tmp_path / "s").trials
    assert [trial.state for trial in trials] == ["scored", "failed", "scored"]
    assert "passthrough" in str(trials[1].error)


@pytest.mark.slow
def test_two_workers_find_the_table_that_one_finds(here: Path, tmp_path: Path) -> None:
    """The windows are divided between them, and each reads the models for itself."""
    search = make_search(objective={"perplexity": {"text": "held.txt", "window": 64, "stride": 8}})
    two, one = (run_search(search, tmp_path / str(workers), workers=workers).trials for workers in (2, 0))
    assert [trial.score for trial in two] == pytest.approx([trial.score for trial in one], rel=1e-7)
    assert [trial.stderr for trial in two] == pytest.approx([trial.stderr for trial in one], rel=1e-5)
    assert sum(trial.bytes_read for trial in two) == 2 * sum(trial.bytes_read for trial in one)


def test_an_entropy_is_told_with_its_perplexity(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And with an error of its own; it is low for a model that is sure and wrong."""
    search = make_search(objective={"entropy": {"text": "held.txt", "window": 64}})
    search["variables"] = {"x": {"choices": [0.5]}}
    (tmp_path / "s.yml").write_text(json.dumps(search))
    assert execute(["evolve", str(tmp_path / "s.yml"), str(tmp_path / "s")]) == 0
    (trial,) = read_results(tmp_path / "s")
    found = evaluate(make_candidate(tmp_path / "s", 0), TextSource(text="held.txt", window=64))
    assert trial.score == pytest.approx(found.entropy, rel=1e-9)
    assert trial.stderr == pytest.approx(found.entropy_stderr, rel=1e-6)
    assert trial.perplexity == pytest.approx(found.perplexity, rel=1e-9)
    assert f"at perplexity {found.perplexity:.6g}" in capsys.readouterr().err


def test_a_text_that_changed_is_another_search(here: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    search = make_search(objective={"perplexity": {"text": str(tmp_path / "t.txt"), "window": 32, "windows": 2}})
    run_search(search, tmp_path / "s")
    (tmp_path / "t.txt").write_text(TEXT + "more")
    with pytest.raises(InputError, match=r"what differs: the texts \(.*t\.txt\)"):
        run_search(search, tmp_path / "s")


def test_commands_judge_by_texts(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> dict[str, object]:
        assert execute([str(each) for each in arguments]) == 0
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    single = run("evaluate", "a", "--text", "held.txt", "--window", 32, "--json")
    assert single.keys() >= {"perplexity", "nll", "bits_per_byte", "tokens", "bytes", "stderr", "entropy"}
    assert single.keys() >= {"bytes_read", "seconds"}
    few = [run("evaluate", name, "--examples", "few.jsonl", "--json")["nll"] for name in ("a", "b")]
    made = run("cocktail", "a", "b", "--out", tmp_path / "c", "--examples", "few.jsonl", "--json", "-q")
    assert made["losses"] == pytest.approx(few, abs=1e-6)
    recipe = {"merge_method": "linear", "models": [{"model": "./a"}, {"model": "./b"}], "parameters": {"weight": 1}}
    (tmp_path / "soup.yml").write_text(json.dumps(recipe))
    soup = run("soup", tmp_path / "soup.yml", tmp_path / "o", "--text", "held.txt", "--window", 32, "--json", "-q")
    best = min(read_results(tmp_path / "o.search"), key=lambda trial: trial.score or 0.0)
    written = run("evaluate", tmp_path / "o", "--text", "held.txt", "--window", 32, "--json")
    assert written["perplexity"] == pytest.approx(best.score, rel=1e-5)
    assert len(soup["scores"]) == 2  # type: ignore[arg-type]
