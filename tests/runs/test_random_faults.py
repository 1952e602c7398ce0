"""Small merges with random faults of workers, schedulers and drivers; `python tests/bench/faults.py` makes hundreds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = 5
SCRIPT = Path(__file__).parents[1] / "bench" / "faults.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_faults_change_no_byte_and_leave_nothing() -> None:
    """In a process of its own, since it forks."""
    command = [sys.executable, str(SCRIPT), "--faults", str(FAULTS), "--seed", "5"]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert sum(int(row[1]) for row in rows) == FAULTS
