"""The page of deploy/: the commands on it are commands, the files are files."""

import re

from deployments import DEPLOY, check_command, check_mergemill, iter_commands

TEXT = (DEPLOY / "README.md").read_text()


def iter_lines() -> list[str]:
    """Return the lines of its code, those that go on after a backslash as one."""
    blocks = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def test_commands_are_those_that_mergemill_has() -> None:
    commands = [check_mergemill(words) for words in iter_commands("\n".join(iter_lines()))]
    assert {given["command"] for given in commands} == {"merge", "plan", "submit", "status", "attach", "cancel", "ui"}
    merging = [given for given in commands if given["command"] in ("merge", "submit")]
    where = [given.get("scheduler") or given["cluster"] for given in merging]
    started = ["/shared/scheduler.json", "slurm.yml", "pods.yml", None, "my.yml"]
    assert where == [*started, "tcp://scheduler:8786", "tls://scheduler:8786"]


def test_dask_is_started_as_dask_is() -> None:
    lines = [line.removeprefix("dask ").split() for line in iter_lines() if line.startswith("dask ")]
    assert [words[0] for words in lines] == ["scheduler", "worker"] * 2
    for words in lines:
        check_command(words)


def test_images_and_jobs_run_what_is_there() -> None:
    plain, cuda, page = [
        line.partition(" mergemill:0.1.0")[2] for line in iter_lines() if line.startswith("docker run")
    ]
    assert check_command(plain.split())["recipe"] == "recipe.yml"
    assert check_command(cuda.removeprefix("-cuda ").split())["device"] == "cuda"
    assert check_command(page.split())["url"] == "http://127.0.0.1:8797"
    (sbatch,) = [line for line in iter_lines() if line.startswith("sbatch")]
    _, _, rest = sbatch.partition("driver.sh ")
    assert check_mergemill(["merge", *rest.split()])["shard_size"] == "5GB"


def test_files_are_where_it_says() -> None:
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    named = re.findall(r"\bdeploy/[\w./-]+", "\n".join(iter_lines()))
    assert len(linked) > 8
    assert [name for name in linked if not (DEPLOY / name).exists()] == []
    assert [name for name in named if not (DEPLOY.parent / name).exists()] == []


def test_values_of_helm_are_values_of_the_chart() -> None:
    import yaml

    values = yaml.safe_load((DEPLOY / "helm" / "mergemill" / "values.yaml").read_text())
    (install,) = [line for line in iter_lines() if line.startswith("helm install")]
    given = re.findall(r"--set(?:-file)? ([\w.]+)=", install)
    assert len(given) == 5
    for name in given:
        place = values
        for step in name.split("."):
            assert step in place, name
            place = place[step]


def test_it_says_what_trusting_a_scheduler_means() -> None:
    assert "What trusting a Dask scheduler means" in TEXT


def test_what_an_attacker_may_hold_names_tests_that_are_there() -> None:
    table = TEXT.partition("## What an attacker may hold")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert list(dict.fromkeys(row[0] for row in rows)) == [
        "a model",
        "a model, a recipe, an output folder",
        "a recipe",
        "an output folder",
        "an output that was uploaded",
        "the network",
        "another site",
        "the page's token",
        "the same machine",
    ]
    for *_, named in rows:
        path, _, test = named.strip("`").partition("::")
        assert f"def {test}(" in (DEPLOY.parent / path).read_text(), named
