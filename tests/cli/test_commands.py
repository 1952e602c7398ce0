"""Each command on its happy way, and what it says when something is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]

COMMANDS = (
    "merge",
    "transplant",
    "plan",
    "verify",
    "push",
    "inspect",
    "convert",
    "diff",
    "methods",
    "schema",
    "man",
    "evaluate",
    "sweep",
    "evolve",
    "soup",
    "cocktail",
    "results",
    "submit",
    "status",
    "attach",
    "cancel",
    "abort",
    "demo",
    "env",
    "extract-lora",
    "resize-lora",
    "ui",
    "recipe",
)


@pytest.fixture(scope="module")
def merged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished merge. Not to be changed."""
    from mergemill.cli.main import execute

    out = tmp_path_factory.mktemp("merged") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        assert execute(["merge", "ties.yml", str(out), "--quiet"]) == 0
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(mergemill: Run, command: str) -> None:
    code, out, _ = mergemill(command, "--help")
    assert code == 0
    assert f"xample: mergemill {command}" in out or f"mergemill {command} …" in out


def test_help_lists_every_command_on_a_line_that_is_whole(mergemill: Run) -> None:
    code, out, _ = mergemill("--help")
    lines = out.partition("Commands:\n")[2].splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert not any(line.endswith("...") for line in lines)


def test_no_command_shows_the_help_as_an_error(mergemill: Run) -> None:
    code, out, err = mergemill()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: mergemill")


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(mergemill: Run, option: str) -> None:
    code, out, _ = mergemill(option)
    assert code == 0
    assert out.startswith("mergemill ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mrege"], "No such command 'mrege'"),
        (["merge"], "Missing argument 'RECIPE'"),
        (["merge", "ties.yml", "out", "--workers", "-1"], "--workers"),
        (["plan", "ties.yml", "--momery", "1"], "No such option"),
        (["plan", "ties.yml", "--memory", "much"], "--memory: 'much' is not a size"),
        (["diff", "base", ""], "'' is not a model: its path is empty"),
        (["diff", "base", "base", "--base", " "], "'' is not a model: its path is empty"),
        (["transplant", "", "base", "out"], "'' is not a model: its path is empty"),
        (["extract-lora", "base", "", "out"], "'' is not a model: its path is empty"),
        (["convert", "", "out", "--dtype", "float16"], "'' is not a model: its path is empty"),
        (["sweep", "", "x", "--vary", "a=1", "--text", "base/config.json"], "a sweep needs a recipe"),
        (["cocktail", "base", "./base", "--out", "", "--text", "base/config.json"], "an empty location"),
        (["results", ""], "an empty location"),
        (["plan", "base"], "base: is a folder; a recipe is a file of YAML, which names models"),
        (["plan", "nowhere.yml"], "nowhere.yml: cannot be read"),
        (["plan", "typo.yml"], "typo.yml:2: unknown key 'dtpye'; did you mean 'dtype'?"),
        (["merge", "typo.yml", "out"], "typo.yml:2: unknown key 'dtpye'; did you mean 'dtype'?"),
        (["inspect", "nowhere"], "nowhere"),
        (["verify", "base"], "base"),
        (["abort", "base"], "base: holds no unfinished merge"),
        (["merge", "ties.yml", "base", "--quiet"], "base: holds 'README.md'"),
        (["methods", "tise"], "did you mean 'ties'?"),
        (["demo", "base"], "base holds other files"),
        (["demo", "ties.yml"], "ties.yml is a file"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(mergemill: Run, here: Path, arguments: list[str], words: str) -> None:
    code, out, err = mergemill(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("mergemill: error: ")
    assert words in err
    first, *excerpt = err.splitlines()
    assert words in first
    assert excerpt == (["  2 | dtpye: float16", "    | ^^^^^"] if "typo.yml" in arguments else [])
    assert not (here / "out").exists()


def test_plan_says_what_is_read_written_and_needed(mergemill: Run, here: Path) -> None:
    code, out, err = mergemill("plan", "ties.yml")
    assert (code, err) == (0, "")
    assert out.startswith("ties: 3 models into 111 tensors\n")
    for word in ("read", "write", "memory", "digest", "./base: 111 tensors"):
        assert word in out


def test_plan_as_json_has_the_numbers(mergemill: Run, here: Path) -> None:
    code, out, _ = mergemill("plan", "ties.yml", "--json", "--shard-size", "tensor")
    numbers = json.loads(out)
    assert code == 0
    assert (numbers["tensors"], len(numbers["shards"]), len(numbers["sources"])) == (111, 111, 3)
    assert 0 < numbers["projected_bytes"] <= numbers["memory_bytes"] == 1 << 30


def test_warnings_of_the_plan_are_shown(mergemill: Run, here: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text((here / "ties.yml").read_text() + "parameters: {t: 0.5}\n")
    _, out, _ = mergemill("plan", recipe)
    assert "warning: " in out
    assert "'t'" in out.partition("warning: ")[2]


def test_merge_puts_its_result_on_stdout_and_the_rest_on_stderr(mergemill: Run, here: Path, tmp_path: Path) -> None:
    code, out, err = mergemill("merge", "ties.yml", tmp_path / "out")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'out'}: 1")
    assert out.count("\n") == 1
    assert err.startswith("ties: 3 models")
    assert "\n1 worker of " in err
    assert "dashboard" not in err  # nothing listens where threads of this process work
    assert "\x1b" not in out + err  # no colours, no bars: this is no terminal


def test_merge_again_says_that_it_is_finished(mergemill: Run, here: Path, merged: Path) -> None:
    code, out, _ = mergemill("merge", "ties.yml", merged)
    assert code == 0
    assert "finished already" in out


def test_a_finished_merge_is_replaced_where_that_is_asked(
    mergemill: Run, here: Path, merged: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(merged, tmp_path / "out")
    code, _, err = mergemill("merge", "ties.yml", out, "--seed", 3)
    assert (code, "or replace it with --overwrite" in err) == (2, True)
    assert mergemill("merge", "ties.yml", out, "--seed", 3, "--overwrite", "--quiet")[0] == 0


def test_quiet_merge_says_nothing(mergemill: Run, here: Path, tmp_path: Path) -> None:
    assert mergemill("merge", "ties.yml", tmp_path / "out", "--quiet") == (0, "", "")


def test_merge_as_json_is_one_event_a_line(mergemill: Run, here: Path, tmp_path: Path) -> None:
    code, out, err = mergemill("merge", "ties.yml", tmp_path / "out", "--json", "--shard-size", "tensor")
    events = [json.loads(line) for line in out.splitlines()]
    names = [event["event"] for event in events]
    assert (code, err) == (0, "")
    assert names == ["plan", "started", *["part"] * 111, "committed"]
    assert events[-2]["parts_done"] == events[-1]["parts"] == 111


def test_error_is_an_event_too(mergemill: Run, here: Path) -> None:
    code, out, err = mergemill("merge", "typo.yml", "out", "--json")
    event = json.loads(out)
    assert code == 2
    assert (event["event"], event["exit_code"]) == ("error", 2)
    assert err.startswith(f"mergemill: error: {event['message']}\n")
    assert event["faults"] == [{"line": 2, "message": "unknown key 'dtpye'; did you mean 'dtype'?"}]


def test_verify_finds_a_finished_merge_whole(mergemill: Run, here: Path, merged: Path) -> None:
    code, out, _ = mergemill("verify", merged, "--replay", 1)
    assert code == 0
    assert "as it was written" in out
    assert "1 part merged again" in out
    code, out, _ = mergemill("verify", merged, "--json")
    assert json.loads(out)["replayed"] == 0


def test_verify_of_a_changed_shard_is_exit_code_1(mergemill: Run, merged: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(merged, tmp_path / "changed")
    (shard,) = changed.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, out, err = mergemill("verify", changed)
    assert (code, out) == (1, "")
    assert err.startswith("mergemill: error: ")
    assert err.count("\n") == 1


def test_inspect_shows_a_checkpoint(mergemill: Run, here: Path) -> None:
    code, out, _ = mergemill("inspect", "base")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0
    assert (facts["kind"], facts["model"], facts["tensors"]) == ("checkpoint", "llama", "111")
    assert facts["layers"].startswith("12")


def test_inspect_lists_tensors(mergemill: Run, merged: Path) -> None:
    _, out, _ = mergemill("inspect", merged, "--tensors")
    assert "merge, finished" in out
    assert any(line.split()[:3] == ["model.norm.weight", "BF16", "256"] for line in out.splitlines())
    _, out, _ = mergemill("inspect", merged, "--tensors", "--json")
    found = json.loads(out)
    assert found["tensors"] == len(found["tensor_list"]) == 111
    assert sum(tensor["nbytes"] for tensor in found["tensor_list"]) == found["nbytes"]


def test_methods_are_listed_with_what_they_do(mergemill: Run) -> None:
    _, out, _ = mergemill("methods")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert {"linear", "slerp", "task_arithmetic", "ties", "passthrough"} <= set(lines)
    assert "and a base" in lines["ties"]
    _, out, _ = mergemill("methods", "--json")
    assert {method["name"] for method in json.loads(out)} == set(lines) - {"method"}


def test_method_shows_its_parameters_and_source(mergemill: Run) -> None:
    _, out, _ = mergemill("methods", "ties")
    assert "arXiv:2306.01708" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert "required" in rows["weight"]
    assert "from 0 to 1" in rows["density"]
    assert "true" in rows["normalize"]


def test_schema_is_json(mergemill: Run) -> None:
    _, out, _ = mergemill("schema")
    named = json.loads(out)["properties"]["merge_method"]
    assert {"ties", "slerp"} <= set(named["anyOf"][0]["enum"])
    assert named["anyOf"][1]["type"] == "string"  # a method of one's own is no error in an editor
