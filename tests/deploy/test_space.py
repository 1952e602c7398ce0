"""The Space: what the Hub wants of it, and that it starts the page as the page can be started."""

import re
import subprocess
from pathlib import Path

import yaml
from deployments import DEPLOY, check_mergemill, run_program

SPACE = DEPLOY / "space"


def test_the_readme_says_what_the_hub_wants() -> None:
    _, head, _ = (SPACE / "README.md").read_text("utf-8").split("---\n", 2)
    told = yaml.safe_load(head)
    assert (told["sdk"], told["app_port"]) == ("docker", 7860)
    assert {told["colorFrom"], told["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }
    assert len(told["short_description"]) <= 60


def test_the_image_is_as_hadolint_wants_it_and_runs_as_spaces_do() -> None:
    text = (SPACE / "Dockerfile").read_text()
    done = run_program("hadolint", SPACE / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")
    assert "--uid 1000" in text
    assert "\nUSER 1000:1000\n" in text
    assert re.search(r"mergemill\[[\w,]*\bui\b[\w,]*\]", text)


def test_it_starts_the_page_where_the_hub_says_that_it_is(tmp_path: Path) -> None:
    program = tmp_path / "mergemill"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "SPACE_HOST": "me-merge.hf.space"}
    done = subprocess.run([SPACE / "start.sh"], env=environ, capture_output=True, text=True, check=True)
    given = check_mergemill(done.stdout.split())
    assert (given["command"], given["host"], given["port"]) == ("ui", "0.0.0.0", 7860)
    assert (given["url"], given["framed_by"]) == ("https://me-merge.hf.space", "https://huggingface.co")
