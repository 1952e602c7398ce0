"""Running a merge's driver inside a cluster: as a SLURM job, or as a DaskJob of the Dask operator for Kubernetes.

What is submitted holds the recipe's text and files of methods as they are now: edits of later do not reach it.
"""

import json
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemill.engine.errors import ClusterError, PlanError
from mergemill.engine.methods.own import read_methods
from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.recipe import ClusterFile, Recipe
from mergemill.engine.run.workers import MEMORY

KINDS = ("slurm", "kubernetes")
NOTICE_S = 120  # before the end of a job's time, for the driver to end cleanly
_DRIVER_MEMORY = "4GiB"
_SPARE_BYTES = 1 << 30  # of a worker's pod, for Python, torch and Dask
_COMMANDS = {"slurm": ("sbatch", "--parsable"), "kubernetes": ("kubectl", "apply", "-f", "-")}


@dataclass(frozen=True, slots=True)
class Job:
    """A driver that can be submitted."""

    kind: str
    name: str  # in Kubernetes; SLURM gives a number
    text: str  # a batch script, or a manifest in JSON


def make_job(
    recipe: Recipe, out: str, file: ClusterFile, *, cluster: str, arguments: Sequence[str] = (), folder: Path
) -> Job:
    """Return the job that merges `recipe` into `out` on the cluster of `file`, which `merge` knows as `cluster`.

    arguments: further options of ``mergemill merge``. folder: what relative paths are relative to. Raises `PlanError`
    for kinds of clusters in which no driver can be run.
    """
    if file.kind not in KINDS:
        raise PlanError(
            f"{file.name or file.kind}: no driver is run inside a cluster of kind {file.kind}; submit takes "
            f"{' and '.join(KINDS)}; otherwise: mergemill merge … --cluster {cluster}"
        )
    name = f"mergemill-{secrets.token_hex(4)}"
    if file.kind == "slurm":
        return Job(file.kind, name, make_script(recipe, out, file, cluster=cluster, arguments=arguments, folder=folder))
    return Job(file.kind, name, json.dumps(make_manifest(recipe, out, file, name=name, arguments=arguments), indent=2))


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


def make_script(
    recipe: Recipe, out: str, file: ClusterFile, *, cluster: str, arguments: Sequence[str], folder: Path
) -> str:
    """Return the batch script of a driver; it may be requeued, since a merge resumes."""
    name = Path(recipe.name).name
    words = ["merge", f'"$files"/{shlex.quote(name)}', *map(shlex.quote, [out, "--cluster", cluster, *arguments])]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {directive}" for directive in _list_directives(file)),
        "set -u",
        f"cd {shlex.quote(str(folder))} || exit 2",
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


def list_texts(recipe: Recipe) -> dict[str, str]:
    """Return the recipe and its files of methods, by their paths from its folder."""
    place = Path(recipe.name)
    methods = {name: read_methods(place.parent / name, name=name).text for name in recipe.methods or ()}
    return {place.name: recipe.text, **methods}


def _list_directives(file: ClusterFile) -> list[str]:
    options, driver = file.options, file.driver
    named = {
        "partition": options.get("queue"),
        "account": options.get("account"),
        "time": driver.walltime or options.get("walltime"),
        "mem": f"{-(-parse_size(driver.memory or _DRIVER_MEMORY, what='driver.memory') // (1 << 20))}M",
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


def make_manifest(
    recipe: Recipe, out: str, file: ClusterFile, *, name: str, arguments: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a ConfigMap with the recipe, and a DaskJob: driver, scheduler and workers, which end together."""
    texts = list_texts(recipe)
    if odd := [path for path in texts if not re.fullmatch(r"[\w.-]+", path)]:
        raise PlanError(
            f"{odd[0]}: cannot be in a ConfigMap; lay it beside the recipe, named with letters, digits, . _ -"
        )
    if "--methods" in arguments:
        raise PlanError("--methods: names files of this machine, which a pod does not have; name them in the recipe")
    if "--memory" not in arguments:
        arguments = [*arguments, "--memory", file.memory or MEMORY]
    namespace = {"namespace": str(file.options["namespace"])} if "namespace" in file.options else {}
    mounted = f"/recipe/{Path(recipe.name).name}"
    driver = _make_container(file, "driver", ["merge", mounted, out, *arguments], _find_driver_bytes(file))
    driver["volumeMounts"].append({"name": "recipe", "mountPath": "/recipe", "readOnly": True})
    volume = {"name": "recipe", "configMap": {"name": name}}
    job = {"spec": _make_pod(driver, volume) | {"restartPolicy": "OnFailure"}}
    labels = {"app.kubernetes.io/name": "mergemill"}
    meta = {"metadata": {"name": name, "labels": labels, **namespace}}
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            {"apiVersion": "v1", "kind": "ConfigMap", **meta, "data": texts},
            {
                "apiVersion": "kubernetes.dask.org/v1",
                "kind": "DaskJob",
                **meta,
                "spec": {"job": job, "cluster": {"spec": _make_cluster(file, name, arguments)}},
            },
        ],
    }


def _make_cluster(file: ClusterFile, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    memory = arguments[list(arguments).index("--memory") + 1]
    limit_bytes = parse_size(memory, what="--memory") + _SPARE_BYTES
    threads = str(file.threads or 1)
    words = ["worker", "--name", "$(DASK_WORKER_NAME)", "--nthreads", threads, "--memory-limit", str(limit_bytes)]
    worker = _make_container(file, "worker", words, limit_bytes, cpus=threads)
    words = ["scheduler", "--host", "0.0.0.0", "--port", "8786", "--dashboard-address", ":8787"]
    scheduler = _make_container(file, "scheduler", words, 2 << 30)
    ports = {"tcp-comm": 8786, "http-dashboard": 8787}
    scheduler["ports"] = [{"name": each, "containerPort": port, "protocol": "TCP"} for each, port in ports.items()]
    service = {
        "type": "ClusterIP",
        "selector": {"dask.org/cluster-name": name, "dask.org/component": "scheduler"},
        "ports": [{"name": each, "protocol": "TCP", "port": n, "targetPort": each} for each, n in ports.items()],
    }
    return {
        "worker": {"replicas": file.count, "spec": _make_pod(worker)},
        "scheduler": {"spec": _make_pod(scheduler), "service": service},
    }


def _make_pod(container: Mapping[str, Any], *volumes: Mapping[str, Any]) -> dict[str, Any]:
    user = {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "automountServiceAccountToken": False,
        "securityContext": user,
        "containers": [container],
        "volumes": [{"name": "scratch", "emptyDir": {}}, *volumes],
    }


def _make_container(
    file: ClusterFile, name: str, words: Sequence[str], memory_bytes: int, *, cpus: str = ""
) -> dict[str, Any]:
    if "image" not in file.options:
        raise PlanError(
            f"{file.name or file.kind}: needs the option 'image' to submit a driver: one that has mergemill"
        )
    return {
        "name": name,
        "image": str(file.options["image"]),
        "args": list(words),
        "envFrom": [{"secretRef": {"name": secret}} for secret in file.driver.secrets],
        "resources": {
            "requests": {"cpu": cpus or str(file.driver.cpus or 1), "memory": str(memory_bytes)},
            "limits": {"memory": str(memory_bytes)},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
    }


def _find_driver_bytes(file: ClusterFile) -> int:
    return parse_size(file.driver.memory or _DRIVER_MEMORY, what="driver.memory")
