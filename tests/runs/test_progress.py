"""A merge that is asked to show how far it is, in each place where it can be; and scripts that merge."""

import os
import pty
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from models import write_llama

from mergemill.engine import merge
from mergemill.engine.runs.guardless import is_guarded
from mergemill.engine.runs.pace import Pace
from mergemill.engine.runs.progress import COLUMNS, Meter, find_display, open_bar, open_lines, open_terminal

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
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  100%  ", done.stderr.splitlines()[-1])
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
    assert "100%" in drawn
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
    assert f", {done.parts} of {done.parts} part, since " in notebook[-1]
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
    assert re.search(r"  25%  25 B of 100 B, .* 1 of 4 parts, since 0 s", capsys.readouterr().err)


def test_nothing_is_shown_unless_asked_for(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": models / "a"}]}
    merge(recipe, models / "out", workers=0)
    assert capsys.readouterr() == ("", "")


def say_lines(seconds: Iterator[float], total: int) -> list[str]:
    """Return the lines of a work of which a byte, and a part, is done at each of these times."""
    now, lines = [0.0], list[str]()
    with open_lines(total, total, lines.append, ending=False, clock=lambda: now[0]) as advance:
        for number, second in enumerate(seconds):
            now[0] = second
            advance(number, number)
    return lines


def test_lines_come_for_each_tenth_with_their_time() -> None:
    lines = say_lines((number / 10 for number in range(1000)), 1000)  # 100 s in all: a tenth of the whole takes 10 s
    assert len(lines) == 9
    stamp, _, line = lines[0].partition("   ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", stamp)
    assert line == "10%  100 B of 1000 B, 10 B/s, 100 of 1,000 parts, since 10 s, 1 min 30 s left"


def test_lines_come_neither_too_often_nor_too_seldom() -> None:
    assert len(say_lines((part / 50 for part in range(101)), 100)) <= 1  # 2 s in all
    assert len(say_lines((float(second) for second in range(121)), 10_000)) == 4  # each half minute


def test_parts_that_were_there_say_nothing_of_the_rate() -> None:
    now = [0.0]
    meter = Meter(100, 10, clock=lambda: now[0])
    now[0] = 5.0
    meter.advance(50, 5, kept=True)
    assert meter.read() == Pace(50, 100, 5, 10, 5.0, 0.0)
    assert str(meter.read()) == " 50%  50 B of 100 B, 5 of 10 parts, since 5 s"
    now[0] = 7.0
    meter.advance(60, 6)
    assert str(meter.read()).endswith("5 B/s, 6 of 10 parts, since 7 s, 8 s left")


def draw(width: int, done: tuple[int, int] | None) -> str:
    """Return the last state of a bar on a terminal of this width."""
    from rich.console import Console

    with open(os.devnull, "w") as nowhere:
        console = Console(force_terminal=True, width=width, record=True, file=nowhere)
        with open_terminal(3 << 30, 4000, console) as advance:
            if done is not None:
                advance(*done)
        drawn = console.export_text().rstrip()
    return "⠋" + re.split(r"[\u2801-\u28ff]", drawn)[-1]  # what stands after the last spinner


@pytest.mark.parametrize("width", [30, 50, 60, 85, 105, 130])
def test_columns_of_a_bar_fall_away_where_the_terminal_is_narrow(width: int) -> None:
    last = draw(width, (1 << 30, 1234))
    assert len(last) <= width
    assert "33%" in last
    shown = {name for name, least in COLUMNS if width >= least}
    assert ("1.0 GiB of 3.0 GiB" in last) == ("sizes" in shown)
    assert ("1,234 of 4,000 parts" in last) == ("counts" in shown)


def test_a_bar_counts_the_time_before_the_first_bytes() -> None:
    assert re.search(r"0 B of 3.0 GiB since \d s 0 of 4,000 parts", " ".join(draw(130, None).split()))
