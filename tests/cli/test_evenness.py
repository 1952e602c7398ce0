"""What holds for every command: variables, JSON, groups of options, completion, the manual."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mergemill.cli.app import make_command
from mergemill.cli.completion import complete_around, complete_cluster, complete_device, complete_recipe
from mergemill.cli.man import list_lines
from mergemill.cli.variables import find_misspelt, list_options, list_variables, list_words
from mergemill.engine import jobs

Run = Callable[..., tuple[int, str, str]]

RESERVED = ("NATIVE", "DEBUG", "RESUME", "KILLS", "FAMILIES", "MERGEKIT_PYTHON", "FUZZ_S", "WRITE_GOLDENS")
OF_ITS_OWN_KIND = {"man", "schema", "ui"}
"""Commands without `--json`: a page of the manual is no data, a schema is JSON, and a page is served."""


def list_commands(command: Any = None, *above: str) -> Iterator[tuple[str, Any]]:
    """Yield name and command of all that can be run."""
    for name, each in (command or make_command()).commands.items():
        if hasattr(each, "commands"):
            yield from list_commands(each, *above, name)
        else:
            yield " ".join([*above, name]), each


COMMANDS = dict(list_commands())


def open_context(*words: str) -> Any:
    command = COMMANDS[words[0]]
    return command.make_context(words[0], list(words[1:]), obj=list(words))


def test_every_option_has_its_variables_and_none_is_another_ones() -> None:
    options = [(name, option) for name, command in COMMANDS.items() for option in list_options(command)]
    assert len(options) > 150
    for name, option in options:
        of_command, of_all, *_ = option.envvar
        word = option.name.upper().replace("-", "_")
        assert of_all == f"MERGEMILL_{word}"
        assert of_command == f"MERGEMILL_{name.upper().replace('-', '_').replace(' ', '_')}_{word}"
        assert word not in RESERVED, name


def test_a_variable_is_an_option_and_what_is_nearer_is_stronger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEMILL_MEMORY", "3GiB")
    monkeypatch.setenv("MERGEMILL_QUIET", "1")
    monkeypatch.setenv("MERGEMILL_METHODS", "a.py b.py")
    params = open_context("merge", "r.yml", "out").params
    assert (params["memory"], params["quiet"], params["methods"]) == ("3GiB", True, ["a.py", "b.py"])
    monkeypatch.setenv("MERGEMILL_MERGE_MEMORY", "4GiB")
    assert open_context("merge", "r.yml", "out").params["memory"] == "4GiB"
    assert open_context("plan", "r.yml").params["memory"] == "3GiB"
    assert open_context("merge", "r.yml", "out", "--memory", "5GiB").params["memory"] == "5GiB"


def test_a_variable_that_is_almost_one_is_told_and_a_faulty_value_by_its_name(
    mergemill: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [name for command in COMMANDS.values() for name in list_variables(command)]
    assert list(find_misspelt([f"MERGEMILL_{name}" for name in (*RESERVED, "SHA", "BENCH_CLOCKS")], known)) == []
    assert list(find_misspelt(known, known)) == []
    for name, near in (("MEMROY", "MEMORY"), ("WORKER", "WORKERS"), ("MEGRE_SEED", "MERGE_SEED")):
        monkeypatch.setenv(f"MERGEMILL_{name}", "1")
        assert (
            f"warning: MERGEMILL_{name} is no variable of mergemill; did you mean 'MERGEMILL_{near}'?\n"
            in (mergemill("plan", "ties.yml")[2])
        )
    assert mergemill("merge", "ties.yml", "base", "-q")[2].count("\n") == 1
    for name, value in (("WORKERS", "x"), ("PLAN_MEMORY", "much"), ("CLUSTER", "nowhere"), ("SHARD_SIZE", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(f"MERGEMILL_{name}", value)
            code, _, err = mergemill("plan", "ties.yml")
        assert (code, f"MERGEMILL_{name}" in err, "--" in err.partition("; see: ")[0].rpartition("\n")[2]) == (
            2,
            True,
            False,
        )


def test_a_command_to_repeat_elsewhere_has_what_the_environment_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEMILL_SEED", "7")
    monkeypatch.setenv("MERGEMILL_RAW", "1")
    monkeypatch.setenv("MERGEMILL_QUIET", "0")
    monkeypatch.setenv("MERGEMILL_METHODS", "a.py b.py")
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://h:1")
    context = open_context("merge", "r.yml", "out", "--memory", "1GiB")
    said = "--scheduler tcp://h:1 --seed 7 --methods a.py --methods b.py --raw"
    assert list_words(context) == ["merge", "r.yml", "out", "--memory", "1GiB", *said.split()]
    context = open_context("merge", "--memory", "1GiB", "--", "r.yml", "out")  # as the page writes it
    assert list_words(context) == ["merge", "--memory", "1GiB", *said.split(), "--", "r.yml", "out"]


def test_a_wrong_value_of_a_variable_is_one_line(mergemill: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEMILL_WORKERS", "many")
    code, out, err = mergemill("plan", "ties.yml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "MERGEMILL_WORKERS" in err
    assert "integer" in err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_speaks_json(name: str) -> None:
    options = {each for param in COMMANDS[name].params for each in param.opts}
    assert ("--json" in options) != (name in OF_ITS_OWN_KIND)


def test_options_stand_in_groups_and_the_variables_below(mergemill: Run) -> None:
    _, out, _ = mergemill("merge", "--help")
    heads = re.findall(r"^(\w[\w ]*):$", out, re.MULTILINE)
    assert heads == ["Arguments", "Options", "Workers", "Storage", "What is shown"]
    assert "--memory" in out.partition("Workers:")[2].partition("Storage:")[0]
    assert "$MERGEMILL_SOME_OPTION" in out
    _, out, _ = mergemill("env", "--help")
    assert re.findall(r"^(\w[\w ]*):$", out, re.MULTILINE) == ["Options", "What is shown"]


def test_a_recipe_is_written_as_json_too(mergemill: Run) -> None:
    words = ("recipe", "legacy", "--merge", "a", "--merge", "b", "--base-model", "c", "--density", "0.5")
    code, out, _ = mergemill(*words, "--json")
    assert code == 0
    assert json.loads(out)["merge_method"] == "ties"


def test_what_would_be_submitted_and_what_is_are_json_too(
    mergemill: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("submit", "ties.yml", "out", "--cluster", "slurm", "--json")
    _, out, _ = mergemill(*words, "--dry-run")
    assert json.loads(out)["text"].startswith("#!")
    monkeypatch.setattr(jobs, "submit_job", lambda job: "4711")
    _, out, _ = mergemill(*words)
    assert json.loads(out) == {"kind": "slurm", "job": "4711", "out": "out"}


def test_the_guide_is_no_json(mergemill: Run) -> None:
    code, _, err = mergemill("methods", "--guide", "--json")
    assert code == 2
    assert "mergemill methods --json" in err


def test_names_are_completed(here: Path) -> None:
    assert complete_around("tie") == ["ties"]
    assert "metagpt" in complete_around("")
    assert complete_device("c") == ["cpu", "cuda"]
    assert complete_cluster("sl") == ["slurm"]
    assert complete_recipe("t") == ["ties.yml", "typo.yml"]
    assert complete_recipe(f"{here}/ti") == [f"{here}/ties.yml"]
    assert complete_recipe("no-such-folder/") == []


def test_a_shell_is_answered(here: Path) -> None:
    asked = {
        "_MERGEMILL_COMPLETE": "complete_bash",
        "COMP_WORDS": "mergemill merge ties.yml out --device cu",
        "COMP_CWORD": "5",
    }
    done = subprocess.run(
        [sys.executable, "-m", "mergemill"], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert (done.stdout.split(), done.stderr) == (["cuda"], "")


def test_the_manual_has_every_command_and_option(mergemill: Run) -> None:
    text = "\n".join(list_lines(make_command())).replace("\\-", "-")
    for name, command in COMMANDS.items():
        about = text.partition(f".SS mergemill {name}\n")[2].partition(".SS ")[0]
        assert command.help.split("\n")[0] in about, name
        assert all(max(each.opts, key=len) in about for each in list_options(command)), name
    code, out, _ = mergemill("man")
    assert (code, out.replace("\\-", "-")) == (0, text + "\n")


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_finds_the_manual_right(mergemill: Run) -> None:
    _, out, _ = mergemill("man")
    command = ["groff", "-man", "-k", "-Tutf8", "-ww", "-z"]
    done = subprocess.run(command, input=out, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_plan_with_its_output_makes_the_checks_of_a_merge(
    mergemill: Run, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert mergemill("plan", "ties.yml", out)[0] == 0
    assert not out.exists()
    code, _, err = mergemill("plan", "ties.yml", "base")
    assert code == 2
    assert "base: holds 'README.md'" in err
    for command in ("plan", "merge"):
        code, _, err = mergemill(command, "ties.yml", "base/config.json/deep/out")
        assert code == 2
        assert err.endswith("base/config.json, which is a file; choose another folder\n")
    assert mergemill("merge", "ties.yml", out, "--quiet")[0] == 0
    assert mergemill("plan", "ties.yml", out)[0] == 0
    assert mergemill("plan", "ties.yml", out, "--seed", "9", "--overwrite")[0] == 0
    code, _, err = mergemill("plan", "ties.yml", out, "--seed", "9")
    assert code == 2
    assert "holds another merge, which differs in the seed" in err
    found = os.statvfs_result([4096, 4096, 10, 1, 1, 10, 10, 10, 0, 255])
    monkeypatch.setattr(os, "statvfs", lambda place: found)
    code, _, err = mergemill("plan", "ties.yml", tmp_path / "other")
    assert code == 1
    assert "disk too full" in err
