"""Tools that are killed at random moments go on, and end with the bytes of a run that nobody disturbed."""

import os
import subprocess
import sys
from pathlib import Path

KILLS = int(os.environ.get("MERGEMILL_KILLS", "6"))
SCRIPT = Path(__file__).with_name("kill_tools.py")


def test_tools_that_are_killed_end_with_the_same_bytes(tmp_path: Path) -> None:
    """More of them with MERGEMILL_KILLS=30."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(KILLS)]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert sum(int(line.split()[1]) for line in done.stdout.splitlines() if " kills, " in line) == KILLS
