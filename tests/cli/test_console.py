"""Lines of progress come neither too often nor too seldom; errors are one line."""

import pytest

from mergemill.cli import console


def test_progress_in_lines_keeps_its_pace(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    advance = console.make_lines(1000, 1000, clock=lambda: now)
    for second in range(1000):
        now = second / 10  # 100 s in all: a tenth of the whole takes 10 s
        advance(second, second)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert lines[0] == " 10%  100 B of 1000 B, 10 B/s, 100 of 1000 parts, 90 s left"


def test_fast_progress_is_not_a_line_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    advance = console.make_lines(100, 100, clock=lambda: now)
    for part in range(101):
        now = part / 50  # 2 s in all
        advance(part, part)
    assert len(capsys.readouterr().err.splitlines()) <= 1


def test_slow_progress_says_something_each_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    advance = console.make_lines(10_000, 10_000, clock=lambda: now)
    for second in range(1, 121):
        now = float(second)
        advance(second, second)
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_table_of_no_terminal_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    console.say_table([("a" * 300, "[bold]b")], heads=("x", "y"))
    assert capsys.readouterr().out.splitlines()[1] == f"{'a' * 300}  [bold]b"


def test_a_command_among_facts_is_one_line_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    console.say_facts([("ended", "today"), ("give up", f"mergemill abort {'o' * 100}")])
    assert capsys.readouterr().out == f"ended    today\ngive up  mergemill abort {'o' * 100}\n"
