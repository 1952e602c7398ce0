"""Runs mergekit 0.1.5 in its own environment, as the reference that merges are compared with.

`requirements.txt` beside this file makes the environment; `MERGEMILL_MERGEKIT_PYTHON` names its python.
mergekit is LGPL: it is run, never imported or copied.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from models import read_tensors

PYTHON_VARIABLE = "MERGEMILL_MERGEKIT_PYTHON"
SCRIPT = Path(__file__).with_name("run_mergekit.py")


class MergekitError(Exception):
    """mergekit refused or failed; the message is its own."""


@dataclass(frozen=True, slots=True)
class Job:
    """One merge for mergekit."""

    recipe: str
    """The recipe, as YAML; its models are absolute paths."""
    folder: Path
    """Where the output goes; its parent exists."""
    seed: int = 0
    """The seed of mergekit's global generator."""


def find_skip_reason() -> str | None:
    """Return why mergekit cannot run here, or None where it can."""
    python = os.environ.get(PYTHON_VARIABLE)
    if not python:
        return f"{PYTHON_VARIABLE} is not set: it names the python of an environment with mergekit 0.1.5"
    return None if Path(python).is_file() else f"{PYTHON_VARIABLE}={python}: no such file"


def run_mergekit(recipe: str, folder: Path, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Merge by `recipe` into `folder`, return the output's tensors, or raise `MergekitError`."""
    result = run_mergekit_batch([Job(recipe, folder, seed)])[0]
    if isinstance(result, MergekitError):
        raise result
    return result


def run_mergekit_batch(jobs: Sequence[Job]) -> list[dict[str, torch.Tensor] | MergekitError]:
    """Run all `jobs` in one process (its import takes seconds), and return their tensors or their errors."""
    listing = jobs[0].folder.with_name(jobs[0].folder.name + ".jobs.json")
    listing.write_text(
        json.dumps([{"recipe": job.recipe, "out": str(job.folder), "seed": job.seed} for job in jobs]),
        encoding="utf-8",
    )
    environ = {**os.environ, "PYTHONHASHSEED": "0"}
    command = [environ[PYTHON_VARIABLE], str(SCRIPT), "--batch", str(listing)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    return [read_result(job, done.stderr) for job in jobs]


def read_result(job: Job, output: str) -> dict[str, torch.Tensor] | MergekitError:
    """Return the tensors of a finished job, or its error; `output` explains a run that never began."""
    error = job.folder.with_name(job.folder.name + ".error")
    if error.is_file():
        return MergekitError(error.read_text(encoding="utf-8"))
    if not job.folder.is_dir():
        return MergekitError(output)
    return read_tensors(job.folder)
