"""What the guard found, as the command line says it: lines for people, JSON for programs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors, write_llama, write_tensors

Run = Callable[..., tuple[int, str, str]]

DOWN, NORM = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"
RECIPE = """\
merge_method: task_arithmetic
base_model: ./base
models: [{model: ./a}]
parameters: {weight: [{filter: up_proj, value: 12.5}, {value: 0.5}]}
"""
HEADING = "most changed, as a share of the base's norm, and beside the largest change of an input:"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two models; a's down_proj holds 3 NaN, and the base's norm is zero."""
    base = write_llama(tmp_path / "base", seed=0, layers=1, hidden=32, intermediate=48, vocab=96, dtype="float32")
    a = write_llama(tmp_path / "a", seed=1, layers=1, hidden=32, intermediate=48, vocab=96, near=base, dtype="float32")
    tensors = read_tensors(a)
    tensors[DOWN].view(-1)[[3, 50, 1500]] = torch.nan
    write_tensors(a, tensors)
    write_tensors(base, {**read_tensors(base), NORM: torch.zeros(32)})
    monkeypatch.chdir(tmp_path)
    for policy in ("warn", "keep-base", "fail"):
        (tmp_path / f"{policy}.yml").write_text(f"{RECIPE}guard: {{policy: {policy}}}\n")
    return tmp_path


def read_events(out: str) -> list[dict[str, Any]]:
    """Return the events of --json, which any reader of JSON must take."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in out.splitlines()]


def test_a_merge_ends_with_what_changed_most_and_what_was_found(mergemill: Run, here: Path) -> None:
    code, out, err = mergemill("merge", "warn.yml", "out")
    lines = err.splitlines()
    start = lines.index(HEADING) + 1
    changed, warnings = lines[start : start + 10], lines[start + 10 :]
    assert (code, out.count("\n")) == (0, 1)
    assert changed[0].split() == ["not", "finite", "0×", DOWN]
    assert changed[1].split()[:2] == ["from", "zero"]
    assert changed[1].split()[3] == NORM
    assert changed[2].split()[1:] == ["12.5×", "model.layers.0.mlp.up_proj.weight"]
    shares = [float(line.split()[0].rstrip("%")) for line in changed[2:]]
    assert shares == sorted(shares, reverse=True)
    assert all("0.5×" in line for line in changed[3:])
    assert warnings == [
        f"warning: {DOWN} has 3 values that are not finite",
        "warning: model.layers.0.mlp.up_proj.weight changed 12.5 times as much as any of its inputs, "
        "more than 10 times",
    ]


def test_a_kept_base_is_said(mergemill: Run, here: Path) -> None:
    code, _, err = mergemill("merge", "keep-base.yml", "out")
    assert code == 0
    assert f"warning: {DOWN} has 3 values that are not finite; the base's tensor was kept\n" in err


def test_fail_is_one_line_and_exit_code_1_each_time(mergemill: Run, here: Path) -> None:
    for _ in range(2):
        code, out, err = mergemill("merge", "fail.yml", "out", "--quiet")
        assert (code, out) == (1, "")
        assert err == (
            f"mergemill: error: out: {DOWN} has 3 values that are not finite (and 1 more tensors); the guard's policy "
            f"is 'fail', so nothing was committed. Change the recipe and merge into another folder, or mergemill abort "
            f"out\n"
        )
    assert mergemill("abort", "out")[0] == 0
    assert not (here / "out").exists()


def test_quiet_says_no_findings(mergemill: Run, here: Path) -> None:
    assert mergemill("merge", "warn.yml", "out", "--quiet") == (0, "", "")


def test_the_findings_as_json_have_null_for_what_is_no_number(mergemill: Run, here: Path) -> None:
    code, out, err = mergemill("merge", "warn.yml", "out", "--json")
    events = read_events(out)
    assert (code, err) == (0, "")
    guard = events[-1]["guard"]
    assert events[-1]["event"] == "committed"
    assert len(guard["most_changed"]) == 10
    assert guard["faults"][0] == {
        "tensor": DOWN,
        "change": None,
        "growth": 0.0,
        "broken": 3,
        "kept_base": False,
        "fault": "has 3 values that are not finite",
    }
    assert guard["faults"][1]["growth"] == pytest.approx(12.5, rel=1e-4)
    assert read_events(mergemill("merge", "warn.yml", "out", "--json")[1])[-1]["guard"] == guard, "said again"


def test_a_failed_guard_is_an_error_event(mergemill: Run, here: Path) -> None:
    code, out, _ = mergemill("merge", "fail.yml", "out", "--json")
    events = read_events(out)
    assert code == 1
    assert [event["event"] for event in events[-2:]] == ["part", "error"]
    assert (events[-1]["exit_code"], "the guard's policy is 'fail'" in events[-1]["message"]) == (1, True)


def test_the_plan_says_that_coefficients_cost_a_pass(mergemill: Run, here: Path) -> None:
    (here / "metagpt.yml").write_text(RECIPE + "coefficients: {method: metagpt}\n")
    _, out, _ = mergemill("plan", "metagpt.yml")
    assert "once before, for the coefficients' norms" in out
    numbers = json.loads(mergemill("plan", "metagpt.yml", "--json")[1])
    assert numbers["first_pass_bytes"] == numbers["read_bytes"] > 0
    assert json.loads(mergemill("plan", "warn.yml", "--json")[1])["first_pass_bytes"] == 0
