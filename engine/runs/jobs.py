"""Running a merge's driver inside a cluster: as a SLURM job, or as a DaskJob of the Dask operator for Kubernetes.

What is submitted holds the recipe's text and files of methods as they are now: edits of later do not reach it.
"""

import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergemill.engine.errors import ClusterError, MethodsError, OutputError, PlanError
from mergemill.engine.methods.own import read_methods
from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.plan.small_files import RECIPE_NAME
from mergemill.engine.recipe import AnyRecipe, ClusterFile
from mergemill.engine.recipe.stages import list_methods
from mergemill.engine.runs.driver import DRIVER_MEMORY, RESUME, find_folder
from mergemill.engine.storage.ranges import is_remote
from mergemill.engine.storage.urls import parse_path, parse_place

__all__ = ["Job", "find_methods", "find_resume", "make_job", "submit_job"]

KINDS = ("slurm", "kubernetes")
NOTICE_S = 120  # before the end of a job's time, for the driver to end cleanly
_COMMANDS = {"slurm": ("sbatch", "--parsable"), "kubernetes": ("kubectl", "create", "-f", "-")}


@dataclass(frozen=True, slots=True)
class Job:
    """A driver that can be submitted."""

    kind: str
    name: str  # in Kubernetes; SLURM gives a number
    text: str  # a batch script, or a manifest


def make_job(
    recipe: AnyRecipe,
    out: str,
    file: ClusterFile,
    *,
    cluster: str,
    arguments: Sequence[str] = (),
    folder: Path,
    resume: str = "",
) -> Job:
    """Return the job that merges `recipe` into `out` on the cluster of `file`, which `merge` knows as `cluster`.

    arguments: further options of ``mergemill merge``. folder: what relative paths are relative to. resume: the
    command that submits it again, for `status`. Raises `PlanError` for kinds of clusters in which no driver can be run,
    and for outputs that such a driver cannot write.
    """
    if file.kind not in KINDS:
        raise PlanError(
            f"{file.name or file.kind}: no driver is run inside a cluster of kind {file.kind}; submit takes "
            f"{' and '.join(KINDS)}; otherwise: mergemill merge … --cluster {cluster}"
        )
    out = parse_place(out, OutputError)
    _check_out(out, file)
    name = f"{file.options.get('name', 'mergemill')}-{secrets.token_hex(4)}"  # or it would be the last job's
    if file.kind == "slurm":
        words = ["--cluster", cluster, *arguments]
        return Job(file.kind, name, make_script(recipe, out, file, arguments=words, folder=folder, resume=resume))
    from mergemill.engine.runs.manifest import write_manifest  # which only a submission needs

    texts = list_texts(recipe)
    return Job(file.kind, name, write_manifest(texts, out, file, name=name, arguments=arguments, resume=resume))


def find_methods(given: str) -> str:
    """Return the path of a file of methods as a job knows it, which may run elsewhere; `MethodsError` for a URL."""
    return str(parse_path(given, MethodsError, what="a file of methods").absolute())


def _check_out(out: str, file: ClusterFile) -> None:
    if out.startswith("hf://"):
        raise PlanError(
            f"{out}: is written by one machine only, by way of its disk; submit a merge into s3://… or a folder that "
            "all workers share, or run mergemill merge"
        )
    if file.kind == "kubernetes" and not is_remote(out):
        raise PlanError(
            f"{out}: would be on the disk of a pod, and gone with it; give a place in object storage, s3://…"
        )


def submit_job(job: Job) -> str:
    """Submit a job; returns what it is called there. `ClusterError` where that cannot be done."""
    command = _COMMANDS[job.kind]
    try:
        done = subprocess.run(command, input=job.text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ClusterError(f"{command[0]}: is not installed here; see --dry-run for what it would be given") from error
    if done.returncode:
        raise ClusterError(f"{shlex.join(command)}: failed: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0] if job.kind == "slurm" else job.name


def find_resume(command: str) -> tuple[str, str]:
    """Return the command that goes on with the merge of this process, and its folder: `command`, or what submitted it.

    The folder is empty where the command can be given from any.
    """
    submitted = os.environ.get(RESUME)
    return (submitted, "") if submitted else (command, find_folder())


def make_script(
    recipe: AnyRecipe, out: str, file: ClusterFile, *, arguments: Sequence[str], folder: Path, resume: str
) -> str:
    """Return the batch script of a driver; it may be requeued, since a merge resumes."""
    name = Path(recipe.file or RECIPE_NAME).name
    words = ["merge", f'"$files"/{shlex.quote(name)}', *map(shlex.quote, [out, *arguments])]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {directive}" for directive in _list_directives(file)),
        "set -u",
        f"cd {shlex.quote(str(folder))} || exit 2",
        f"export {RESUME}={shlex.quote(resume)}",
        *file.driver.prologue,
        "files=$(mktemp -d) || exit 2",
        "trap 'rm -rf \"$files\"' EXIT",
    ]
    for path, text in list_texts(recipe).items():
        place = f'"$files"/{shlex.quote(path)}'
        lines += [f'mkdir -p "$(dirname {place})"', f"printf %s {shlex.quote(text)} > {place}"]
    return "\n".join([*lines, f"{_find_program()} {' '.join(words)} &", *_WAIT]) + "\n"


# In the background, so that the end of the job's time reaches the driver, which then ends as by Ctrl-C.
_WAIT = (
    "merge=$!",
    "trap 'kill -TERM \"$merge\" 2>/dev/null' TERM",
    'wait "$merge"; code=$?',
    'while kill -0 "$merge" 2>/dev/null; do wait "$merge"; code=$?; done',
    'exit "$code"',
)


def list_texts(recipe: AnyRecipe) -> dict[str, str]:
    """Return the recipe and its and its stages' files of methods, by their paths from its folder."""
    place = Path(recipe.file or RECIPE_NAME)
    named = list_methods(recipe)
    return {place.name: recipe.text, **{name: read_methods(place.parent / name, name=name).text for name in named}}


def _list_directives(file: ClusterFile) -> list[str]:
    options, driver = file.options, file.driver
    named = {
        "partition": options.get("queue"),
        "account": options.get("account"),
        "time": driver.walltime or options.get("walltime"),
        "mem": f"{-(-parse_size(driver.memory or DRIVER_MEMORY, what='driver.memory') // (1 << 20))}M",
        "cpus-per-task": driver.cpus or 1,
        "signal": f"B:TERM@{NOTICE_S}",
        "open-mode": "append",
        "output": "mergemill-%j.log",
    }
    given = [f"--{name}={value}" for name, value in named.items() if value is not None]
    return ["--job-name=mergemill", "--requeue", *given, *driver.directives]


def _find_program() -> str:
    """Return the command `mergemill` of this Python, or else of whatever the prologue brings."""
    beside = Path(sys.executable).with_name("mergemill")
    return shlex.quote(str(beside)) if beside.is_file() else "mergemill"
