"""The programs that are compared, and the recipes that they are given."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PYTHON_VARIABLE = "MERGEMILL_MERGEKIT_PYTHON"
FLOOR, MERGEMILL, MERGEKIT = "floor", "mergemill", "mergekit"
PROGRAMS = (FLOOR, MERGEMILL, MERGEKIT)
BASE, *OTHERS = MODELS = ("base", "a", "b")
_WEIGHED = "models: [{{model: {a}, parameters: {{weight: 0.5}}}}, {{model: {b}, parameters: {{weight: 0.5}}}}]\n"
_PLAIN = "models: [{{model: {a}}}, {{model: {b}}}]\n"
_BASE = "base_model: {base}\n"
_DTYPE = "dtype: bfloat16\n"
RECIPES = {
    "linear": _WEIGHED,
    "slerp": "base_model: {a}\n" + _PLAIN + "parameters: {{t: 0.4}}\n",
    "task_arithmetic": _BASE + _WEIGHED,
    "ties": _BASE + _WEIGHED + "parameters: {{density: 0.5}}\n",
    "dare_ties": _BASE + _WEIGHED + "parameters: {{density: 0.5}}\n",
    "della": _BASE + _WEIGHED + "parameters: {{density: 0.5, epsilon: 0.15}}\n",
    "breadcrumbs": _BASE + _WEIGHED + "parameters: {{density: 0.5, gamma: 0.01}}\n",
    "sce": _BASE + _PLAIN + "parameters: {{select_topk: 0.5}}\n",
}
RANDOM = ("dare_ties", "della")  # of which two programs cannot give the same values


@dataclass(frozen=True)
class Job:
    """One merge, for every program."""

    method: str
    recipe: Path
    sources: tuple[Path, ...]  # the files of the models that it reads
    size_bytes: int  # of one model's files, and so of the output
    out: Path  # where the output goes; is removed before every run


def make_job(method: str, models: Mapping[str, Path], folder: Path) -> Job:
    """Write the recipe of a method into `folder` and return the job."""
    text = f"merge_method: {method}\n" + RECIPES[method] + _DTYPE
    recipe = folder / f"{method}.yml"
    recipe.write_text(text.format(**models))
    files = {name: list_weights(models[name]) for name in list_models([method])}
    sizes = [sum(file.stat().st_size for file in found) for found in files.values()]
    return Job(method, recipe, tuple(file for found in files.values() for file in found), sizes[0], folder / "out")


def list_models(methods: Sequence[str]) -> list[str]:
    """Return the models that any of the methods reads."""
    return [name for name in MODELS if any(f"{{{name}}}" in RECIPES[method] for method in methods)]


def list_weights(folder: Path) -> list[Path]:
    """Return the files of a folder that hold weights."""
    return sorted(folder.rglob("*.safetensors"))


def find_missing(program: str) -> str | None:
    """Return why a program cannot run here, or None where it can."""
    if program != MERGEKIT:
        return None
    python = os.environ.get(PYTHON_VARIABLE)
    if not python:
        return f"{PYTHON_VARIABLE} is not set: it names the python of an environment with mergekit 0.1.5"
    return None if Path(python).is_file() else f"{PYTHON_VARIABLE}={python}: no such file"


def make_command(program: str, job: Job, memory: str) -> list[str]:
    """Return the command line that does `job`."""
    if program == FLOOR:
        script = Path(__file__).with_name("floor.py")
        sources = [str(source) for source in job.sources]
        return [sys.executable, "-S", "-E", str(script), str(job.out), str(job.size_bytes), *sources]
    if program == MERGEMILL:
        return [find_script(program), "merge", str(job.recipe), str(job.out), "--quiet", "--memory", memory]
    return [find_script(program), str(job.recipe), str(job.out), "--no-write-model-card", "--quiet"]


def find_script(program: str) -> str:
    """Return the command that a program is started with."""
    if program == MERGEMILL:
        return str(Path(sys.executable).with_name("mergemill"))
    return str(Path(os.environ[PYTHON_VARIABLE]).with_name("mergekit-yaml"))


def make_environ() -> dict[str, str]:
    """Return the environment of every program: nothing is looked for on the network."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
