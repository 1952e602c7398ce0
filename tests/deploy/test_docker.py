"""The images: Dockerfiles by hadolint, and what their entry point starts."""

import inspect
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from deployments import DEPLOY, check_command, is_refused, need_module, run_program
from packaging.requirements import Requirement

from mergemill.engine.recipe import load_cluster
from mergemill.engine.runs.clusters.factories import make_arguments

DOCKER = DEPLOY / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_as_hadolint_wants_them(path: Path) -> None:
    done = run_program("hadolint", path)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [
        ("USER 10001:10001", "USER root", "DL3002"),
        ("python:3.11-slim-bookworm AS build", "python AS build", "DL3006"),
        ("WORKDIR /src", "WORKDIR src", "DL3000"),
    ],
)
def test_hadolint_finds_a_mistake(right: str, wrong: str, rule: str) -> None:
    text = (DOCKER / "Dockerfile").read_text()
    assert right in text
    done = run_program("hadolint", "-", text=text.replace(right, wrong))
    assert done.returncode != 0
    assert rule in done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_have_two_stages_no_root_and_the_versions_that_ci_tests(path: Path) -> None:
    text = path.read_text()
    stages = text.split("\nFROM ")
    assert len(stages) == 3
    assert "gcc" in stages[1]
    assert "gcc" not in stages[2]
    assert "\nUSER 10001:10001\n" in stages[2]
    installs = [line for line in text.splitlines() if "pip install" in line]
    assert len(installs) == 3
    assert all("constraints.txt" in line or '"setuptools==' in line for line in installs)
    assert "mergemill[s3,hub,dashboard,metrics,ui,report]" in installs[-1]


def test_the_wheel_is_built_by_a_setuptools_that_the_package_takes() -> None:
    (wanted,) = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["build-system"]["requires"]
    (given,) = {found for path in DOCKERFILES for found in re.findall(r'"(setuptools==[\d.]+)"', path.read_text())}
    assert Requirement(wanted).specifier.contains(given.partition("==")[2])
    assert all("--no-build-isolation" in path.read_text() for path in DOCKERFILES)


def test_what_the_images_copy_is_let_through_and_nothing_else() -> None:
    lines = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert {
        "engine",
        "cli",
        "configs",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "deploy/docker",
        "deploy/dask",
    } == allowed
    assert all((DEPLOY.parent / name).exists() for name in allowed)


def enter(tmp_path: Path, *arguments: str) -> str:
    """Return the command line that the entry point becomes."""
    for name in ("dask", "mergemill", "python"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name}|$@"\n')
        program.chmod(0o755)
    command = [DOCKER / "entrypoint.sh", *arguments]
    done = subprocess.run(
        command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_one_image_is_scheduler_worker_and_driver(tmp_path: Path) -> None:
    assert enter(tmp_path, "scheduler", "--port", "8786") == "dask|scheduler --port 8786"
    assert enter(tmp_path, "worker", "tcp://s:8786", "--name", "a b") == "dask|worker tcp://s:8786 --name a b"
    assert enter(tmp_path, "merge", "recipe.yml", "out") == "mergemill|merge recipe.yml out"
    assert enter(tmp_path, "python", "/example.py") == "python|/example.py"
    assert enter(tmp_path, "--help") == "mergemill|--help"
    assert enter(tmp_path) == "mergemill|"


def test_pods_of_dask_kubernetes_start_what_it_tells_them(tmp_path: Path) -> None:
    need_module("dask_kubernetes", "dask-kubernetes")
    from dask_kubernetes.operator import make_cluster_spec

    given = make_arguments(load_cluster("kubernetes"), 5 << 30)
    known = inspect.signature(make_cluster_spec).parameters
    spec = make_cluster_spec(**{name: value for name, value in given.items() if name in known})["spec"]
    started = {name: enter(tmp_path, *spec[name]["spec"]["containers"][0]["args"]) for name in ("worker", "scheduler")}
    words = {name: line.removeprefix("dask|").split() for name, line in started.items()}
    assert [first for first, *_ in words.values()] == ["worker", "scheduler"]
    worker = check_command(words["worker"])
    assert (worker["nthreads"], worker["memory_limit"]) == (2, str(5 << 30))
    assert check_command(words["scheduler"])["host"] == "0.0.0.0"


def test_a_command_line_that_the_image_does_not_have_is_found() -> None:
    assert check_command(["merge", "r.yml", "out", "--memory", "4GiB"])["memory"] == "4GiB"
    assert check_command(["worker", "--nthreads", "2", "--name", "$(NAME)"])["nthreads"] == 2
    assert is_refused(["merge", "r.yml", "out", "--memroy", "4GiB"])
    assert is_refused(["merge", "r.yml"])
    assert is_refused(["mrege", "r.yml", "out"])
    assert is_refused(["worker", "--nthread", "2"])
    assert is_refused(["scheduler", "--prot", "8786"])
