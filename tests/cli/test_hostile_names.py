"""Names out of files, which anybody may have written: whatever shows them shows them as text, and in few words."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

Run = Callable[..., tuple[int, str, str]]

HOSTILE = "\x1b]0;owned\x07\x9b31m\u202e\r\nforged: line\n" + "x" * 100_000
RECIPE = "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1}}]\n"


@pytest.fixture(autouse=True)
def _model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    save_file({f"{HOSTILE}.0.q": torch.ones(1), f"{HOSTILE}.w": torch.ones(2)}, "a/model.safetensors")
    Path("a/config.json").write_text(json.dumps({"model_type": HOSTILE}))
    Path("r.yml").write_text(RECIPE)


def check_lines(text: str, most: int) -> None:
    """Check that a terminal is told nothing but characters, few of them a line, and no line but ours."""
    for line in text.split("\n"):
        assert not line.startswith("forged")
        assert line.isprintable(), ascii(line)[:200]
        assert len(line) <= most


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_every_command_shows_a_hostile_name_as_text(mergemill: Run, json_too: tuple[str, ...]) -> None:
    told = [
        mergemill("plan", "r.yml", *json_too),
        mergemill("inspect", "a", "--tensors", *json_too),
        mergemill("merge", "r.yml", "out", *json_too),
        mergemill("status", "out", *json_too),
        mergemill("attach", "out", *json_too),
        mergemill("verify", "out", "--replay", "1"),
        mergemill("inspect", "out", *json_too),
        mergemill("cancel", "out", *json_too),
        mergemill("abort", "out"),
        mergemill("submit", "r.yml", "/out", "--cluster", "slurm", "--dry-run"),
        mergemill("submit", "r.yml", "/out", "--cluster", "kubernetes", "--dry-run"),
    ]
    assert [code for code, _, _ in told[:3]] == [0, 0, 0]
    for _, said, noted in told:
        check_lines(noted, 4000)
        check_lines(said, 10**7 if json_too else 4000)
    if json_too:
        assert json.loads(told[1][1])["model_type"] == HOSTILE


def test_what_a_driver_says_of_itself_is_shown_as_text(mergemill: Run) -> None:
    mergemill("merge", "r.yml", "out")
    note = Path("out/.mergemill/driver.json")
    driver = json.loads(note.read_text())
    note.write_text(json.dumps(driver | {"host": HOSTILE, "resume": HOSTILE, "error": HOSTILE, "how": HOSTILE}))
    for command in (("status", "out"), ("attach", "out"), ("cancel", "out")):
        _, said, noted = mergemill(*command)
        check_lines(said + noted, 4000)
    assert json.loads(mergemill("status", "out", "--json")[1])["driver"]["resume"] == HOSTILE


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"quantization_config": {"quant_method": HOSTILE}}),
        ("model.safetensors.index.json", {"weight_map": {HOSTILE: f"{HOSTILE}.safetensors"}}),
        ("model.safetensors.index.json", {"weight_map": {"w": "\ud800.safetensors"}}),
        ("model.safetensors.index.json", {HOSTILE: 1}),
    ],
)
def test_an_error_about_a_file_is_a_few_hundred_characters(mergemill: Run, name: str, content: object) -> None:
    Path("a", name).write_text(json.dumps(content))
    code, said, noted = mergemill("plan", "r.yml")
    assert (code, said) == (2, "")
    assert noted.startswith("mergemill: error: ")
    assert "fault of mergemill" not in noted
    check_lines(noted, 700)


def test_a_name_that_is_not_utf8_is_an_error_with_that_name(mergemill: Run) -> None:
    odd = os.fsdecode(b"\xff")
    Path("a", f"{odd}.model").write_bytes(b"")
    code, _, noted = mergemill("plan", "r.yml")
    assert (code, "\\udcff.model: its name is not UTF-8; rename it" in noted) == (2, True)
    code, _, noted = mergemill("merge", "r.yml", odd)
    assert (code, noted) == (2, "mergemill: error: \\udcff: is not UTF-8; give it another name\n")
