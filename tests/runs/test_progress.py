"""A merge that is asked to show how far it is, in each place where it can be; and scripts that merge."""

import os
import pty
import subprocess
import sys
import types
from pathlib import Path

import pytest
from models import write_llama

from mergemill.engine import merge
from mergemill.engine.runs.guardless import is_guarded
from mergemill.engine.runs.progress import find_display, open_bar

SCRIPT = """\
import mergemill

RECIPE = {{"merge_method": "linear", "models": [{{"model": "a"}}, {{"model": "b"}}], "parameters": {{"weight": 1}}}}

def main():
    print(mergemill.merge(RECIPE, "out", workers={workers}, memory="1GiB", progress=True))

{guard}
"""
GUARDED = 'if __name__ == "__main__":\n    main()'


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        write_llama(tmp_path / name, seed=seed, layers=1)
    return tmp_path


def start(folder: Path, *, workers: int, guard: str) -> "subprocess.CompletedProcess[str]":
    (folder / "script.py").write_text(SCRIPT.format(workers=workers, guard=guard))
    command = [sys.executable, "script.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_script_merges_a_mapping_and_shows_how_far_it_is(models: Path, workers: int) -> None:
    done = start(models, workers=workers, guard=GUARDED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Committed: out\n  wrote ")
    assert done.stderr.splitlines()[-1].startswith("100%  ")
    assert (models / "out" / "model.safetensors.index.json").is_file()


def test_a_script_without_a_guard_is_told_so_before_a_worker_starts(models: Path) -> None:
    done = start(models, workers=2, guard="main()")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"mergemill.engine.errors.PlanError: {models / 'script.py'}:8: worker processes import this file too: "
        'put what it does below if __name__ == "__main__":, or merge with workers=0'
    )
    assert done.stderr.count("Traceback") == 1
    assert not (models / "out").exists()


def test_a_script_without_a_guard_merges_in_threads(models: Path) -> None:
    assert start(models, workers=0, guard="main()").returncode == 0


@pytest.mark.parametrize(
    ("text", "line", "guarded"),
    [
        ("main()\n", 1, False),
        (f"{GUARDED}\n", 2, True),
        (f"{GUARDED}\nmain()\n", 3, False),
        ("import os\nif os:\n    main()\n", 3, False),
        ("for _ in 'a':\n    if __name__ == '__main__':\n        pass\n    main()\n", 4, False),
    ],
)
def test_a_guard_is_an_if_at_the_top_that_asks_for_the_name(text: str, line: int, guarded: bool) -> None:
    assert is_guarded(text, line) is guarded


def test_a_terminal_gets_a_bar(models: Path) -> None:
    (models / "script.py").write_text(SCRIPT.format(workers=0, guard=GUARDED))
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=models, env=environment, stdout=subprocess.PIPE, stderr=follower, check=True
    )
    drawn = os.read(leader, 1 << 16).decode()
    os.close(follower)
    os.close(leader)
    assert "━" in drawn
    assert "parts" in drawn
    assert done.stdout.startswith(b"Committed: out")


class Handle:
    """What IPython's `display` returns where it is given an id."""

    def __init__(self, shown: list[str]) -> None:
        self._shown = shown

    def update(self, value: object) -> None:
        self._shown.append(value._repr_html_())  # type: ignore[attr-defined]


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A process that has a notebook's IPython; returns what it shows."""
    shown: list[str] = []

    def display(value: object, *, display_id: bool) -> Handle:
        assert display_id
        Handle(shown).update(value)
        return Handle(shown)

    shell = types.ModuleType("IPython")
    shell.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    module = types.ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_a_notebook_gets_one_bar_that_moves(
    notebook: list[str], models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": models / "a"}]}
    done = merge(recipe, models / "out", workers=0, progress=True)
    assert notebook[0].startswith('<div><progress value="0" max="')
    assert notebook[-1].endswith(f", {done.parts} of {done.parts} parts</div>")
    assert capsys.readouterr().err == ""


def test_a_shell_of_ipython_without_a_kernel_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.ModuleType("IPython")
    shell.get_ipython = lambda: types.SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", shell)
    assert find_display() is None


def test_the_last_state_is_shown_where_its_block_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with open_bar(100, 4) as advance:
            advance(25, 1)
            raise KeyError("gone")

    with pytest.raises(KeyError):
        fail()
    assert capsys.readouterr().err == " 25%  25 B of 100 B, 1 of 4 parts\n"


def test_nothing_is_shown_unless_asked_for(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": models / "a"}]}
    merge(recipe, models / "out", workers=0)
    assert capsys.readouterr() == ("", "")
