"""What is released: the wheel with native loops, the sources, and the files by which a release is made."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployments import DEPLOY, run_program

ROOT = DEPLOY.parent
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
BUILD = "import sys, setuptools.build_meta as made; out = sys.argv[1]; made.build_wheel(out); made.build_sdist(out)"


def run_python(*words: str | Path, python: str | Path = sys.executable, **options: Any) -> str:
    done = subprocess.run([str(python), *map(str, words)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The finished wheel and sources, built of a copy of the folder."""
    folder = tmp_path_factory.mktemp("release")
    copy = folder / "copy"
    for name in ("cli", "configs", "engine"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    run_python("-c", BUILD, folder / "built", cwd=copy)
    finish = DEPLOY / "release" / "finish.py"
    made = run_python(finish, *(folder / "built").iterdir(), "--into", folder / "dist").split()
    return {"wheel" if name.endswith(".whl") else "sdist": Path(name) for name in made}


def test_the_package_index_takes_them(built: Mapping[str, Path]) -> None:
    done = run_program("twine", "check", "--strict", *built.values())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="auditwheel knows Linux")
def test_one_wheel_serves_every_python_on_any_linux_of_these_years(built: Mapping[str, Path]) -> None:
    assert built["wheel"].name == f"mergemill-{VERSION}-py3-none-linux_x86_64.whl"
    done = run_program("auditwheel", "show", built["wheel"])
    assert '"manylinux_2_17_x86_64"' in " ".join(done.stdout.split())


def test_it_is_installed_without_a_compiler_and_has_native_loops(built: Mapping[str, Path], tmp_path: Path) -> None:
    run_python("-m", "venv", "--without-pip", tmp_path)
    python = tmp_path / "bin" / "python"
    (own,) = tmp_path.glob("lib/python*/site-packages")
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", own, built["wheel"])
    run_python(*install, env={"PATH": "", "HOME": str(tmp_path)})
    places = [path for path in sys.path if path.endswith("site-packages")]  # torch and the rest are there already
    (own / "rest.pth").write_text("\n".join(places))
    code = (
        "import mergemill, mergemill.engine as engine; from mergemill.cli.demo import list_examples;"
        "print(mergemill.__file__, engine.describe_environment()['native'], 'ties' in list_examples())"
    )
    where, *found = run_python("-c", code, python=python, cwd=tmp_path, env={"PATH": ""}).split()
    assert Path(where).is_relative_to(own)
    assert found == ["on", "True"]


def test_the_wheel_lists_its_files_and_says_the_tags_of_its_name(built: Mapping[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        about = f"mergemill-{VERSION}.dist-info"
        listed = [line.split(",")[0] for line in wheel.read(f"{about}/RECORD").decode().splitlines()]
        assert sorted(listed) == sorted(wheel.namelist())
        assert "\nTag: py3-none-linux_x86_64\n" in wheel.read(f"{about}/WHEEL").decode()
        links = re.findall(r"\]\((?!#)([^)]+)\)", wheel.read(f"{about}/METADATA").decode())
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://")] == []


def test_the_sources_have_what_a_build_needs_and_the_recipes(built: Mapping[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sources:
        names = {name.partition("/")[2] for name in sources.getnames()}
    tensors = ROOT / "engine" / "tensors"
    wanted = [*tensors.glob("*.c"), *tensors.glob("*.h"), *(ROOT / "configs" / "recipes").iterdir()]
    assert {str(path.relative_to(ROOT)) for path in wanted if path.is_file()} <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_a_wheel_with_native_loops_is_not_called_one_for_any_platform(
    built: Mapping[str, Path], tmp_path: Path
) -> None:
    finish = [sys.executable, str(DEPLOY / "release" / "finish.py"), str(built["wheel"])]
    done = subprocess.run([*finish, "--into", str(tmp_path), "--any"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "so it is not for any platform" in done.stderr


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ("vendor.github-workflows", ["workflows/ci.yml", "workflows/docs.yml", "workflows/release.yml"]),
        ("vendor.dependabot", ["dependabot.yml"]),
        ("vendor.github-issue-forms", ["ISSUE_TEMPLATE/fault.yml", "ISSUE_TEMPLATE/wish.yml"]),
        ("vendor.citation-file-format", ["CITATION.cff"]),
    ],
)
def test_files_for_github_are_as_their_schemas_say(schema: str, names: list[str]) -> None:
    done = run_program("check-jsonschema", "--builtin-schema", schema, *(GITHUB / name for name in names))
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_run_scripts_and_files_that_are_there() -> None:
    for path in (GITHUB / "workflows").iterdir():
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            commands = " ".join(step.get("run", "") for step in job["steps"])
            named = re.findall(r"(?:\.ci|deploy|configs)/[\w./-]+", commands)
            assert [name for name in named if not (ROOT / name).exists()] == []
            assert all("uses" in step or "run" in step for step in job["steps"])
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_versions_and_dependencies_are_said_alike_everywhere() -> None:
    conda = (DEPLOY / "conda" / "meta.yaml").read_text()
    assert f'set version = "{VERSION}"' in conda
    assert yaml.safe_load((GITHUB / "CITATION.cff").read_text())["version"] == VERSION
    assert f"## {VERSION}" in (GITHUB / "CHANGELOG.md").read_text()
    told = set(
        re.findall(r"^    - ([\w-]+) >=([\d.]+)$", conda.partition("  run:")[2].partition("test:")[0], re.MULTILINE)
    )
    names = {"xxhash": "python-xxhash", "torch": "pytorch", "dask": "dask-core"}
    wanted = {tuple(each.split(">=")) for each in PROJECT["project"]["dependencies"]}
    assert told == {(names.get(name, name), least) for name, least in wanted} | {("python", "3.11")}
    pinned = (ROOT / "configs" / "constraints.txt").read_text()
    for name, version in re.findall(r'"(\w+)==([\d.]+)"', (ROOT / ".pre-commit-config.yaml").read_text()):
        assert f"\n{name}=={version}\n" in pinned


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_pages_for_contributors_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https:)([^)#]+)\)", (GITHUB / name).read_text())
    assert [link for link in links if not (GITHUB / link).exists()] == []
