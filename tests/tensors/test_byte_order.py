"""A processor of the other byte order is refused, since its merges would be silently wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

PLAN = """
import sys
sys.byteorder = "big"
from mergemill.cli.main import execute
sys.exit(execute(["plan", "recipe.yml"]))
"""
IMPORT = "import sys; sys.byteorder = {order!r}; import mergemill.engine.tensors.{module}"


def test_a_plan_is_one_line_that_says_what_would_do(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text("{merge_method: linear, models: [{model: a}], parameters: {weight: 1}}")
    done = subprocess.run([sys.executable, "-c", PLAN], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "this processor is big-endian, and checkpoints are little-endian" in line
    assert "use one that is little-endian" in line


@pytest.mark.parametrize("module", ["dtypes", "native", "expressions"])
def test_nothing_that_takes_stored_bytes_is_imported(module: str) -> None:
    big, little = (
        subprocess.run(
            [sys.executable, "-c", IMPORT.format(order=order, module=module)], capture_output=True, text=True
        )
        for order in ("big", "little")
    )
    assert (big.returncode, little.returncode) == (1, 0)
    assert big.stderr.splitlines()[-1].startswith("mergemill.engine.errors.MergemillError: this processor is big-")
