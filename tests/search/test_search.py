"""Whole searches: what they find, what they keep, what ends them, and that a kill at any moment changes no table."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest
from search.toys import PYTHON, by_model, by_values, make_search

from mergemill.engine import merge
from mergemill.engine.errors import InputError, OutputError, PlanError, RecipeError, RunError
from mergemill.engine.search.command import CommandFailed, list_places, run_command
from mergemill.engine.search.searches import Found, TrialFinished, make_candidate, read_results, run_search
from mergemill.engine.search.state import held
from mergemill.engine.search.trials import TRIALS_NAME

CMA = {"strategy": {"name": "cma", "seed": 1, "population": 6}, "budget": {"evaluations": 18}}


def list_rows(found: Found) -> list[tuple[object, ...]]:
    """Return what of a search's table does not hang on the machine."""
    return [(t.number, t.generation, dict(t.values), t.state, t.score, t.recipe_digest) for t in found.trials]


@pytest.fixture(scope="module")
def undisturbed(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    """A search by values, and what it found. Not to be changed."""
    folder = tmp_path_factory.mktemp("found") / "search"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(toys)
        return folder, run_search(make_search(by_values(), **CMA), folder)


def test_a_search_keeps_its_trials_its_table_and_the_best_recipe(undisturbed: tuple[Path, Found], here: Path) -> None:
    folder, found = undisturbed
    assert found.stopped == "evaluations"
    assert [trial.number for trial in found.trials] == list(range(18))
    assert found.best is not None
    assert found.best.score == min(trial.score for trial in found.trials if trial.score is not None)
    assert found.trials[0].values == {"x": 0.5, "y": 0.5}
    lines = [json.loads(line) for line in (folder / TRIALS_NAME).read_text().splitlines()]
    assert lines == [json.loads(json.dumps(trial.to_json())) for trial in found.trials]
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [float(row["score"]) for row in rows] == [trial.score for trial in found.trials]
    assert (folder / "best.yml").read_text() == make_candidate(folder, found.best.number)
    assert f"number {found.best.number}" in (folder / "README.md").read_text()
    page = (folder / "plot.html").read_text()
    assert page.count("<svg") == 3  # the scores, and against x and y
    assert page.count("<circle") == 3 * 18
    assert "<script" not in page
    ElementTree.fromstring(page.partition("</head>")[2].removesuffix("</html>\n"))
    assert read_results(folder)[0] == found.best
    assert not list((folder / "candidates").iterdir())


def test_a_search_cut_off_at_any_byte_ends_with_the_same_table(
    undisturbed: tuple[Path, Found], here: Path, tmp_path: Path
) -> None:
    """A line that a kill cut short counts for nothing; what stands is not judged again."""
    folder, found = undisturbed
    stored = (folder / TRIALS_NAME).read_bytes()
    for turn, size in enumerate(random.Random(0).sample(range(len(stored)), 4)):
        place = tmp_path / str(turn)
        place.mkdir()
        (place / "search.json").write_bytes((folder / "search.json").read_bytes())
        (place / TRIALS_NAME).write_bytes(stored[:size])
        events: list[TrialFinished] = []
        again = run_search(make_search(by_values(), **CMA), place, on_trial=events.append)
        assert list_rows(again) == list_rows(found)
        assert sum(event.kept for event in events) == stored[:size].count(b"\n")
        assert (place / "best.yml").read_bytes() == (folder / "best.yml").read_bytes()


def kill_and_go_on(search: Mapping[str, object], place: Path, draw: random.Random) -> int:
    """Run a search as a process and kill it a moment after a candidate, until it ends; returns how often."""
    path, kills = place.with_suffix(".yml"), 0
    path.write_text(json.dumps(search))
    code = "from mergemill.cli.main import main; main()"
    command = [sys.executable, "-c", code, "evolve", str(path), str(place), "--quiet"]
    while True:
        seen = count_lines(place)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and count_lines(place) < seen + draw.randint(1, 3):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.2))
        if process.poll() is not None:
            assert process.returncode == 0
            return kills
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1


def count_lines(place: Path) -> int:
    path = place / TRIALS_NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_search_killed_at_random_moments_ends_with_the_same_table(here: Path, tmp_path: Path) -> None:
    """Merges of candidates are killed too. With MERGEMILL_KILLS=50 so often."""
    search = make_search(by_model(0.7), strategy={"name": "cma", "seed": 2}, budget={"evaluations": 6})
    found, draw, kills, turn = run_search(search, tmp_path / "quiet"), random.Random(5), 0, 0
    while kills < int(os.environ.get("MERGEMILL_KILLS", "1")):
        turn += 1
        kills += kill_and_go_on(search, tmp_path / f"killed{turn}", draw)
        assert list_rows(run_search(search, tmp_path / f"killed{turn}")) == list_rows(found)
        assert not list((tmp_path / f"killed{turn}" / "candidates").glob("*"))


def test_the_best_merge_is_written_and_is_what_its_recipe_makes(here: Path, tmp_path: Path) -> None:
    search = make_search(by_model(0.7), strategy={"name": "grid", "steps": 3})
    run_search(search, tmp_path / "s", evaluations=1, write=True)  # an earlier best, which is replaced
    assert "it is no better than ./zero" in (tmp_path / "s" / "model" / "README.md").read_text()
    found = run_search(search, tmp_path / "s", write=True, workers=0)
    assert found.best is not None
    assert found.best.values == {"x": 0.0, "y": 0.5}
    assert found.best.score == pytest.approx(0.2, abs=1e-6)
    assert found.best.bytes_read > 0
    merge(tmp_path / "s" / "best.yml", tmp_path / "again")
    shards = [next((tmp_path / each).glob("*.safetensors")).read_bytes() for each in ("s/model", "again")]
    assert shards[0] == shards[1]
    card = (tmp_path / "s" / "model" / "README.md").read_text()
    assert "9 candidates were judged" in card
    assert "| `zero` | 0.7 |" in card
    assert "no better" not in card


def test_more_evaluations_go_on_with_the_same_search(
    undisturbed: tuple[Path, Found], here: Path, tmp_path: Path
) -> None:
    first = run_search(make_search(by_values(), **CMA), tmp_path / "s", evaluations=8)
    whole = run_search(make_search(by_values(), **CMA), tmp_path / "s")
    assert list_rows(first) == list_rows(undisturbed[1])[:8]
    assert list_rows(whole) == list_rows(undisturbed[1])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sh -c 'echo 3; echo broken >&2; exit 4' {values}", "ended with status 4: broken"),
        ("sh -c 'echo nothing' {values}", "printed no number"),
        ("sh -c 'echo 0.5; echo nan' {values}", "printed nan, which is no score"),
        ("sh -c 'kill -9 $$' {values}", "ended with signal 9"),
        ("no-such-command {values}", "cannot be started"),
    ],
)
def test_a_command_that_gives_no_number_says_why(command: str, words: str) -> None:
    with pytest.raises(CommandFailed, match=words):
        run_command(command, {"values": "{}"}, 60)


def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    command = f"sh -c 'sleep 60 & echo $! > {tmp_path}/child; wait' {{values}}"
    started = time.monotonic()
    with pytest.raises(CommandFailed, match=r"was not done after 0\.4 s"):
        run_command(command, {"values": "{}"}, 0.4)
    assert time.monotonic() - started < 20
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what the command started still runs")


@pytest.mark.parametrize(
    ("printed", "number"), [("loss 3.5e-2\n", 0.035), ("1 2 -7", -7.0), ("step 3: .25 (v2)", 0.25), ("5.", 5.0)]
)
def test_the_last_number_counts(printed: str, number: float) -> None:
    assert run_command("echo {values}", {"values": printed}, 60) == number


def test_a_command_must_name_the_candidate() -> None:
    assert list_places("score {model} '{values}'", "s.yml") == {"model", "values"}
    for command in ("score", "score {modle}", "score '"):
        with pytest.raises(RecipeError, match=r"s\.yml: the command"):
            list_places(command, "s.yml")


def test_a_search_of_which_no_candidate_has_a_score_ends_with_the_first_error(here: Path, tmp_path: Path) -> None:
    """Also where there were too few for three in a row."""
    search = make_search("sh -c 'exit 4' {values}", strategy={"name": "grid", "steps": 2}, budget={"evaluations": 2})
    with pytest.raises(RunError, match="no candidate has a score; the first of them: sh: ended with status 4"):
        run_search(search, tmp_path / "s")


def test_failed_candidates_rank_last_and_three_in_a_row_end_the_search(here: Path, tmp_path: Path) -> None:
    """The run after tries those three again, and a candidate may come right."""
    flag = tmp_path / "flag"
    command = f"sh -c 'test -e {flag} && echo 1' {{values}}"
    search = make_search(command, strategy={"name": "grid", "steps": 2})
    with pytest.raises(RunError, match="3 candidates in a row failed; the first of them: sh: ended with status 1"):
        run_search(search, tmp_path / "s")
    flag.touch()
    found = run_search(search, tmp_path / "s")
    assert [trial.score for trial in found.trials] == [1.0] * 4
    assert len((tmp_path / "s" / TRIALS_NAME).read_text().splitlines()) == 7
    assert len(read_results(tmp_path / "s")) == 4


def test_a_candidate_that_fails_is_noted_and_the_search_goes_on(here: Path, tmp_path: Path) -> None:
    judge = "import json,sys; given = json.loads(sys.argv[1]); print(1 / given['x'] + given['y'])"
    search = make_search(f'{PYTHON} -c "{judge}" {{values}}', strategy={"name": "grid", "steps": 2})
    search["variables"] = {"x": {"choices": [0, 1]}, "y": {"choices": [0, 1]}}
    found = run_search(search, tmp_path / "s")
    assert [trial.state for trial in found.trials] == ["failed", "failed", "scored", "scored"]
    assert "ZeroDivisionError" in str(found.trials[0].error)
    assert found.best is not None
    assert found.best.values == {"x": 1, "y": 0}
    assert read_results(tmp_path / "s")[-1].number == 1


def test_stall_ends_a_search_and_more_may_be_better(here: Path, tmp_path: Path) -> None:
    search = make_search(by_values(), strategy={"name": "random"}, budget={"evaluations": 99, "stall": 20})
    search["objective"] = {"command": by_values(), "direction": "max"}
    found = run_search(search, tmp_path / "s")
    assert found.stopped == "stall"
    assert found.best is not None
    assert found.best.score == max(trial.score for trial in found.trials if trial.score is not None)
    assert found.best == read_results(tmp_path / "s")[0]


def test_a_sum_adds_its_items_and_a_holdout_is_told_beside(here: Path, tmp_path: Path) -> None:
    search = make_search("", strategy={"name": "grid", "steps": 2}, holdout={"command": "sh -c 'echo 7' {values}"})
    more = {"command": "sh -c 'echo 5' {recipe}", "direction": "max"}
    search["objective"] = {"sum": [{"command": "sh -c 'echo 3' {values}", "weight": 2.0}, more]}
    trial = run_search(search, tmp_path / "s", evaluations=1).trials[0]
    assert (trial.score, trial.parts, trial.holdout) == (1.0, (3.0, 5.0), 7.0)
    assert trial.bytes_read == 0  # nothing was merged for it


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"variables": {"x": {"low": 0, "high": 1}}}, RecipeError, "is no variable"),
        ({"objective": {"command": "score"}}, RecipeError, "names no candidate"),
        (
            {"variables": {"x": {"low": 0, "high": 1}, "y": {"choices": ["a"]}}},
            InputError,
            "a corner of the search's box",
        ),
        ({"recipe": "nowhere.yml"}, RecipeError, "nowhere.yml"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(
    here: Path, tmp_path: Path, change: dict[str, object], error: type[Exception], words: str
) -> None:
    search = make_search(by_values(), strategy={"name": "grid", "steps": 2}) | change
    with pytest.raises(error, match=words):
        run_search(search, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_cma_of_one_number_says_what_searches_one(here: Path, tmp_path: Path) -> None:
    search = make_search(by_values(), budget={"evaluations": 3})
    search["recipe"] = json.loads((here / "recipe.yml").read_text().replace("${y}", "0.5"))
    search["variables"] = {"x": {"low": 0, "high": 1}}
    with pytest.raises(PlanError, match=r"strategy: \{name: line\}"):
        run_search(search, tmp_path / "s")


def test_another_search_in_the_folder_is_refused_with_what_differs(
    undisturbed: tuple[Path, Found], here: Path, tmp_path: Path
) -> None:
    folder, _ = undisturbed
    with pytest.raises(OutputError, match=r"what differs: the search file \(strategy\)"):
        run_search(make_search(by_values(), budget={"evaluations": 3}), folder)
    (tmp_path / "note").touch()
    with pytest.raises(OutputError, match="holds 'note' and no search"):
        run_search(make_search(by_values(), **CMA), tmp_path)


def test_two_drivers_do_not_share_a_folder(here: Path, tmp_path: Path) -> None:
    with held(tmp_path / "s"), pytest.raises(OutputError, match="another process searches here"):
        run_search(make_search(by_values(), **CMA), tmp_path / "s")


def test_a_genome_is_searched(here: Path, tmp_path: Path) -> None:
    search = {
        "genome": {"models": ["./zero", "./one"], "merge_method": "linear", "normalize": False},
        "objective": {"command": by_model(0.7)},
        "strategy": {"seed": 3},
        "budget": {"evaluations": 8},
    }
    found = run_search(search, tmp_path / "s")
    assert list(found.trials[0].values) == ["group0.model0.rest.weight", "group0.model1.rest.weight"]
    assert found.trials[0].score == pytest.approx(0.2, abs=1e-6)
