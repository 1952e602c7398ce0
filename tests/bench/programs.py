"""The programs that are compared, and the recipes that they are given."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from checkpoints import ITEM_BYTES

PYTHON_VARIABLE = "MERGEMILL_MERGEKIT_PYTHON"
FLOOR, BESIDE, URING, MERGEMILL, MERGEKIT = "floor", "beside", "uring", "mergemill", "mergekit"
FLOORS = {FLOOR: "after", BESIDE: "beside", URING: "uring"}  # and how they read and write, see floor.py
PROGRAMS = (*FLOORS, MERGEMILL, MERGEKIT)
MODELS = {"base": "BF16", "a": "BF16", "b": "BF16", "c": "BF16", "a64": "F64", "b64": "F64", "a16": "F16", "b32": "F32"}
_WEIGHED = "models: [{{model: {a}, parameters: {{weight: 0.5}}}}, {{model: {b}, parameters: {{weight: 0.5}}}}]\n"
_THREE = "models: [" + ", ".join(f"{{{{model: {{{m}}}, parameters: {{{{weight: 0.4}}}}}}}}" for m in "abc") + "]\n"
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
    "della_linear": _BASE + _WEIGHED + "parameters: {{density: 0.5, epsilon: 0.15}}\n",
    "model_stock": _BASE + _PLAIN,
    "ram": _BASE + _PLAIN,
    "ramplus_tl": _BASE + _PLAIN,
    "arcee_fusion": "base_model: {base}\nmodels: [{{model: {a}}}]\n",
    "geometric_median": _BASE + _PLAIN,
    "consensus_ta": _BASE + _WEIGHED,
    "consensus_ties": _BASE + _WEIGHED + "parameters: {{density: 0.5}}\n",
    "pcb": _BASE + _PLAIN,
    "passthrough": "models: [{{model: {a}}}]\n",
    "nearswap": "base_model: {base}\nmodels: [{{model: {a}}}]\nparameters: {{t: 0.001}}\n",
    "nuslerp": _WEIGHED,
    "multislerp": _WEIGHED,
    "karcher": _PLAIN,
    "dare_linear": _BASE + _WEIGHED + "parameters: {{density: 0.5}}\n",
    "breadcrumbs_ties": _BASE + _WEIGHED + "parameters: {{density: 0.5, gamma: 0.01}}\n",
    "expo": _BASE + "models: [{{model: {a}, parameters: {{weight: 1.3}}}}]\n",
    "magmax": _BASE + _PLAIN,
    "emr": _BASE + _PLAIN,
    "negmerge": _BASE + _PLAIN,
    "cabs": _BASE + _WEIGHED,
    "localize_stitch": _BASE + _PLAIN,
    "widen": _BASE + _PLAIN,
    # What other paths take, beside the same method above: a name before the dash, and what is different.
    "linear-float64": _WEIGHED.replace("{a}", "{a64}").replace("{b}", "{b64}"),
    "linear-mixed": _WEIGHED.replace("{a}", "{a16}").replace("{b}", "{b32}"),
    "linear-fp8": _WEIGHED + "quantize: fp8_block\n",
    "linear-three": _THREE,
    "ties-three": _BASE + _THREE + "parameters: {{density: 0.5}}\n",
    "ties-fp8": _BASE + _WEIGHED + "parameters: {{density: 0.5}}\nquantize: fp8_block\n",
    "ties-mixed": _BASE + _WEIGHED.replace("{a}", "{a16}").replace("{b}", "{b32}") + "parameters: {{density: 0.5}}\n",
    "task_arithmetic-delta_base": _BASE + _WEIGHED.replace("{{model: {a},", "{{model: {a}, delta_base: {c},"),
    "ties-delta_base": _BASE
    + _WEIGHED.replace("{{model: {a},", "{{model: {a}, delta_base: {c},")
    + "parameters: {{density: 0.5}}\n",
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")  # of which two programs cannot give the same values
OWN = ("geometric_median", "consensus_ta", "consensus_ties", "pcb", "expo", "magmax", "emr", "negmerge", "cabs")
OWN += ("localize_stitch", "widen")  # which mergekit has not, nor what cases differ in


@dataclass(frozen=True)
class Job:
    """One merge, for every program."""

    method: str
    recipe: Path
    sources: tuple[Path, ...]  # the files of the models that it reads
    size_bytes: int  # of the output
    out: Path  # where the output goes; is removed before every run


def make_job(method: str, models: Mapping[str, Path], folder: Path) -> Job:
    """Write the recipe of a method into `folder` and return the job."""
    text = f"merge_method: {method.partition('-')[0]}\n" + RECIPES[method] + _DTYPE
    recipe = folder / f"{method}.yml"
    recipe.write_text(text.format(**models))
    files = {name: list_weights(models[name]) for name in list_models([method])}
    sizes = [sum(file.stat().st_size for file in found) for found in files.values()]
    first = MODELS[next(iter(files))]
    size_bytes = plan_bytes(recipe) if "quantize" in text else sizes[0] * 2 // ITEM_BYTES[first]
    return Job(method, recipe, tuple(file for found in files.values() for file in found), size_bytes, folder / "out")


def plan_bytes(recipe: Path) -> int:
    """Return the bytes that the plan of a recipe will write."""
    command = [find_script(MERGEMILL), "plan", str(recipe), "--json"]
    done = subprocess.run(command, env=make_environ(), check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout)["write_bytes"])


def list_models(methods: Sequence[str]) -> list[str]:
    """Return the models that any of the methods reads."""
    return [name for name in MODELS if any(f"{{{name}}}" in RECIPES[method] for method in methods)]


def list_weights(folder: Path) -> list[Path]:
    """Return the files of a folder that hold weights."""
    return sorted(folder.rglob("*.safetensors"))


def knows(program: str, method: str) -> bool:
    """Whether a program merges so."""
    return program != MERGEKIT or not (method in OWN or "-" in method)


def find_missing(program: str) -> str | None:
    """Return why a program cannot run here, or None where it can."""
    if program == URING:
        if find_spec("liburing") is None:
            return "the package liburing is not installed"
        code = "import liburing as u; u.io_uring_queue_init(1, u.Ring())"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode
        return f"the package liburing does not run on this machine (it ended with {ended})" if ended else None
    if program != MERGEKIT:
        return None
    python = os.environ.get(PYTHON_VARIABLE)
    if not python:
        return f"{PYTHON_VARIABLE} is not set: it names the python of an environment with mergekit 0.1.5"
    return None if Path(python).is_file() else f"{PYTHON_VARIABLE}={python}: no such file"


def make_command(program: str, job: Job, memory: str) -> list[str]:
    """Return the command line that does `job`."""
    if program in FLOORS:
        script = Path(__file__).with_name("floor.py")
        sources = [str(source) for source in job.sources]
        bare = [] if program == URING else ["-S", "-E"]  # without packages
        return [sys.executable, *bare, str(script), FLOORS[program], str(job.out), str(job.size_bytes), *sources]
    if program == MERGEMILL:
        return [find_script(program), "merge", str(job.recipe), str(job.out), "--quiet", "--memory", memory]
    return [find_script(program), str(job.recipe), str(job.out), "--no-write-model-card", "--quiet"]


def find_script(program: str) -> str:
    """Return the command that a program is started with."""
    if program == MERGEMILL:
        return str(Path(sys.executable).with_name("mergemill"))
    return str(Path(os.environ[PYTHON_VARIABLE]).with_name("mergekit-yaml"))


def make_environ() -> dict[str, str]:
    """Return the environment of every program: nothing is looked for on the network, and what is compiled is kept."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
