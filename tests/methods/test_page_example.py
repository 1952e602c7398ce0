"""The example of a method of one's own in the page of methods, done as it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import read_tensors, write_llama
from runs.merging import hash_output

from mergemill.cli.main import execute

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "engine" / "methods" / "README.md"
SECTION = PAGE.read_text().partition("## A method of your own\n")[2].partition("\n## ")[0]
FILES = dict(re.findall(r"```\w+\n# (\S+\.\w+)\n(.*?)```", SECTION, re.DOTALL))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example's files and models, as the working directory."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    base = write_llama(tmp_path / "models" / "base", seed=0, layers=1)
    for seed, name in enumerate(("chat", "code"), start=1):
        write_llama(tmp_path / "models" / name, seed=seed, near=base, layers=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_is_whole_and_the_one_of_the_recipes() -> None:
    assert list(FILES) == ["my_methods.py", "recipe.yml", "test_my_methods.py"]
    assert FILES["my_methods.py"] == (ROOT / "configs" / "recipes" / "my_methods.py").read_text()


def test_merging_with_it_gives_its_formula_in_threads_and_processes(here: Path) -> None:
    for out, workers in (("threads", "0"), ("merged", "2")):
        assert execute(["merge", "recipe.yml", out, "--workers", workers, "--quiet"]) == 0
    assert hash_output(here / "threads") == hash_output(here / "merged")
    base, chat, code = (read_tensors(here / "models" / name) for name in ("base", "chat", "code"))
    for name, merged in read_tensors(here / "merged").items():
        b, x, y = (model[name].double() for model in (base, chat, code))
        expected = b + 0.4 * (1.2 * (x - b) + (y - b)) / 2
        assert (merged.double() - expected).abs().max() <= 2**-8 * expected.abs().max(), name


@pytest.mark.parametrize("line", re.findall(r"^mergemill .*?(?=  #| #|$)", SECTION, re.MULTILINE))
def test_its_commands_run(here: Path, line: str) -> None:
    _, *arguments = line.split()
    assert execute(arguments) == 0


def test_its_test_passes(here: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_methods.py"]
    paths = [str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
