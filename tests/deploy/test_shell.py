"""Shell scripts of deploy/: as shellcheck wants them, and the SLURM driver's command line."""

import os
import subprocess
from pathlib import Path

import pytest
from deployments import DEPLOY, check_mergemill, is_refused, run_program

SCRIPTS = sorted(DEPLOY.rglob("*.sh"))
DRIVER = DEPLOY / "slurm" / "driver.sh"


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


def test_without_a_recipe_the_driver_says_how_it_is_used() -> None:
    done = subprocess.run([DRIVER], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch ")
