"""Shell scripts of deploy/: as shellcheck wants them, and the SLURM driver run as a job runs it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from deployments import DEPLOY, check_mergemill, is_refused, run_program
from models import write_llama

from mergemill.engine import load_recipe, make_plan, run

SCRIPTS = sorted(DEPLOY.rglob("*.sh"))
DRIVER = DEPLOY / "slurm" / "driver.sh"
RECIPE = "{merge_method: linear, models: [{model: MODELS/a}, {model: MODELS/b}], parameters: {weight: 1}}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_as_shellcheck_wants_them(path: Path) -> None:
    done = run_program("shellcheck", path)
    assert (done.returncode, done.stdout) == (0, "")
    shell = path.read_text().splitlines()[0].rpartition("/")[2].removeprefix("env ")
    assert subprocess.run([shell, "-n", path], check=False).returncode == 0
    assert os.access(path, os.X_OK)


def test_shellcheck_and_bash_find_a_mistake() -> None:
    text = DRIVER.read_text()
    unquoted = text.replace('rm -rf "$folder"', "rm -rf $folder")
    assert unquoted != text
    done = run_program("shellcheck", "-", text=unquoted)
    assert (done.returncode, "SC2086" in done.stdout) == (1, True)
    broken = text.replace("\nfi\n", "\n", 1)
    assert subprocess.run(["bash", "-n"], input=broken, text=True, capture_output=True, check=False).returncode != 0


def test_the_slurm_driver_merges_as_mergemill_can() -> None:
    (line,) = [line for line in DRIVER.read_text().splitlines() if line.startswith("mergemill ")]
    words = line.removesuffix(" &").replace('"$@"', "--shard-size 5GB").replace('"', "").split()[1:]
    assert check_mergemill(words)["memory"] == "$memory"
    assert is_refused([word.replace("--memory", "--ram") for word in words])


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on one node; `srun` starts two tasks."""
    for name, seed in (("a", 1), ("b", 2)):
        write_llama(tmp_path / name, seed=seed, layers=1)
    (tmp_path / "recipe.yml").write_text(RECIPE.replace("MODELS", str(tmp_path)))
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {
        "srun": '#!/bin/bash\n"$@" & "$@" & trap "kill $(jobs -p | xargs)" TERM EXIT; wait\n',
        "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
        "mergemill": f'#!/bin/bash\nexec {Path(sys.executable).with_name("mergemill")} "$@"\n',
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "1",
        "MERGEMILL_MEMORY": "64MiB",
        "TMPDIR": str(tmp_path),
    }


@pytest.mark.slow
def test_a_job_merges_and_leaves_only_the_output(job: dict[str, str], tmp_path: Path) -> None:
    command = [DRIVER, tmp_path / "recipe.yml", tmp_path / "out", "--shard-size", "tensor"]
    done = subprocess.run(command, env=job, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 workers" in done.stderr
    run(make_plan(load_recipe(tmp_path / "recipe.yml"), shard_size="tensor"), tmp_path / "here")
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir() if path.is_file()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".mergemill-")] == []


@pytest.mark.slow
def test_a_job_that_fails_says_so_and_ends_all_that_it_started(job: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text("merge_method: none\n")
    command = [DRIVER, tmp_path / "recipe.yml", tmp_path / "out"]
    done = subprocess.run(command, env=job, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "recipe.yml:1" in done.stderr
    ended_s = time.monotonic() + 20
    while time.monotonic() < ended_s and list_processes(tmp_path):
        time.sleep(0.2)
    assert list_processes(tmp_path) == []
    assert not (tmp_path / "out").exists()


def list_processes(folder: Path) -> list[str]:
    """Return the command lines of processes that name a folder."""
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(folder) in line]


def test_without_a_recipe_the_driver_says_how_it_is_used() -> None:
    done = subprocess.run([DRIVER], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch ")
