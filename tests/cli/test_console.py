"""Tables and facts are not cut where nobody watches."""

import pytest

from mergemill.cli import console


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
