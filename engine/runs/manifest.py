"""A merge as objects of Kubernetes: a ConfigMap with the recipe, and a DaskJob of the Dask operator."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.recipe import ClusterFile
from mergemill.engine.runs.clusters.factories import make_arguments
from mergemill.engine.runs.clusters.preflight import make_limit
from mergemill.engine.runs.driver import DRIVER_MEMORY, RESUME
from mergemill.engine.runs.worker.workers import MEMORY

OPTIONS = ("image", "name", "namespace", "env", "resources", "scheduler_service_type")  # that have a place in a DaskJob
STORAGE_NAME = "mergemill-storage.yml"  # beside the recipe
WAIT_S = 600  # for the scheduler, whose pod may start after the driver's
_SCHEDULER_BYTES = 2 << 30
_DASHBOARD = "http-dashboard"  # the port that is asked for metrics and health
_PORTS = {"tcp-comm": 8786, _DASHBOARD: 8787}
_WORKER_PORTS = {_DASHBOARD: 8788}
_SECRET = re.compile("(?i)(secret|token($|[^i]|i[^z])|password|access_key_id)")


def write_manifest(
    texts: Mapping[str, str], out: str, file: ClusterFile, *, name: str, arguments: Sequence[str] = (), resume: str = ""
) -> str:
    """Return the manifest, in YAML, of the merge of `texts`, the recipe and its files, the recipe first.

    resume: the command that submits it again.
    """
    documents = make_objects(texts, out, file, name=name, arguments=arguments, resume=resume)
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def make_objects(
    texts: Mapping[str, str], out: str, file: ClusterFile, *, name: str, arguments: Sequence[str], resume: str
) -> list[dict[str, Any]]:
    """Return a ConfigMap, and a DaskJob: driver, scheduler and workers, which end together."""
    _check(texts, file, arguments)
    recipe, texts = f"/recipe/{next(iter(texts))}", dict(texts)
    given = {"--memory": file.memory or MEMORY, "--device": file.device}
    if file.storage:
        texts[STORAGE_NAME] = _write_storage(file)
        given["--storage-as"] = f"/recipe/{STORAGE_NAME}"
    for option, value in given.items():
        if value is not None and option not in arguments:
            arguments = [*arguments, option, value]
    labels = {"app.kubernetes.io/name": "mergemill"}
    namespace = {"namespace": str(file.options["namespace"])} if "namespace" in file.options else {}
    meta = {"metadata": {"name": name, "labels": labels, **namespace}}
    words = ["merge", recipe, out, *arguments, "--wait", str(WAIT_S)]
    job = {"spec": _make_driver(file, name, words, resume)}
    spec = {"job": job, "cluster": {"spec": _make_cluster(file, name, arguments)}}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", **meta, "data": texts},
        {"apiVersion": "kubernetes.dask.org/v1", "kind": "DaskJob", **meta, "spec": spec},
    ]


def _check(texts: Mapping[str, str], file: ClusterFile, arguments: Sequence[str]) -> None:
    """Raise `PlanError` for what has no place in the manifest."""
    where = file.name or file.kind
    if odd := [path for path in texts if not re.fullmatch(r"[\w.-]+", path)]:
        raise PlanError(
            f"{odd[0]}: cannot be in a ConfigMap; lay it beside the recipe, named with letters, digits, . _ -"
        )
    if "--methods" in arguments:
        raise PlanError("--methods: names files of this machine, which a pod does not have; name them in the recipe")
    if "image" not in file.options:
        raise PlanError(f"{where}: needs the option 'image' to submit a driver: one that has mergemill")
    said = [str(each["name"]) for each in make_arguments(file, 0)["env"] if "value" in each]
    if odd := list(filter(_SECRET.search, said)):
        raise PlanError(
            f"{where}: options: env: {odd[0]}: a secret would stand in the manifest; make it one of Kubernetes, and "
            "name that in driver.secrets"
        )
    if odd := [option for option in file.options if option not in OPTIONS]:
        raise PlanError(f"{where}: options: {odd[0]!r} has no place in a DaskJob; submit takes {', '.join(OPTIONS)}")


def _write_storage(file: ClusterFile) -> str:
    """Return a cluster file that says only how storage is reached."""
    return yaml.safe_dump({"kind": file.kind, "workers": file.count, "storage_options": file.storage}, sort_keys=False)


def _make_driver(file: ClusterFile, name: str, words: Sequence[str], resume: str) -> dict[str, Any]:
    memory_bytes = parse_size(file.driver.memory or DRIVER_MEMORY, what="driver.memory")
    container = _make_container(file, "driver", words, _make_size(memory_bytes, file.driver.cpus or 1))
    container["env"].append({"name": RESUME, "value": resume})
    container["volumeMounts"].append({"name": "recipe", "mountPath": "/recipe", "readOnly": True})
    pod = _make_pod(container, {"name": "recipe", "configMap": {"name": name}})
    # One that was cancelled, or that cannot work, would be started for ever, and the cluster stay with it.
    return pod | {"restartPolicy": "Never"}


def _make_cluster(file: ClusterFile, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    service = {
        "type": str(file.options.get("scheduler_service_type", "ClusterIP")),
        "selector": {"dask.org/cluster-name": name, "dask.org/component": "scheduler"},
        "ports": [{"name": each, "protocol": "TCP", "port": port, "targetPort": each} for each, port in _PORTS.items()],
    }
    return {
        "worker": {"replicas": file.count, "spec": _make_pod(_make_worker(file, arguments))},
        "scheduler": {"spec": _make_pod(_make_scheduler(file)), "service": service},
    }


def _make_worker(file: ClusterFile, arguments: Sequence[str]) -> dict[str, Any]:
    asked = dict(itertools.pairwise(arguments))
    limit_bytes = make_limit(parse_size(asked["--memory"], what="--memory"), asked.get("--device") or "cpu")
    words = ["--nthreads", str(file.threads or 1), "--memory-limit", str(limit_bytes)]
    words += ["--dashboard-address", f":{_WORKER_PORTS[_DASHBOARD]}"]
    file = file.model_copy(update={"device": asked.get("--device")})
    resources = make_arguments(file, limit_bytes)["resources"]
    container = _make_container(file, "worker", ["worker", "--name", "$(DASK_WORKER_NAME)", *words], resources)
    probe = _make_probe(initialDelaySeconds=30, periodSeconds=20)
    return container | _list_ports(_WORKER_PORTS) | {"livenessProbe": probe}


def _make_scheduler(file: ClusterFile) -> dict[str, Any]:
    words = ["scheduler", "--host", "0.0.0.0", "--port", "8786", "--dashboard-address", ":8787"]
    container = _make_container(file, "scheduler", words, _make_size(_SCHEDULER_BYTES, 1))
    del container["envFrom"]  # it reads no storage
    probes = {
        "readinessProbe": _make_probe(periodSeconds=10),
        "livenessProbe": _make_probe(initialDelaySeconds=15, periodSeconds=20),
    }
    return container | _list_ports(_PORTS) | probes


def _list_ports(ports: Mapping[str, int]) -> dict[str, Any]:
    return {"ports": [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports.items()]}


def _make_probe(**times: int) -> dict[str, Any]:
    return {"httpGet": {"path": "/health", "port": _DASHBOARD}, **times}


def _make_size(memory_bytes: int, cpus: int) -> dict[str, Any]:
    return {
        "requests": {"cpu": str(cpus), "memory": str(memory_bytes)},
        "limits": {"memory": str(memory_bytes)},
    }


def _make_pod(container: Mapping[str, Any], *volumes: Mapping[str, Any]) -> dict[str, Any]:
    user = {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "automountServiceAccountToken": False,
        "securityContext": user,
        "containers": [container],
        "volumes": [{"name": "scratch", "emptyDir": {}}, *volumes],
    }


def _make_container(file: ClusterFile, name: str, words: Sequence[str], resources: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "image": str(file.options["image"]),
        "args": list(words),
        "env": make_arguments(file, 0)["env"],
        "envFrom": [{"secretRef": {"name": secret}} for secret in file.driver.secrets],
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
    }


class _Dumper(yaml.SafeDumper):
    """Writes texts of many lines as they are, and quotes what another parser may take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write what is there twice twice."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    odd = len(text) == 1 or text[:1] in "0123456789+-."
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else '"' if odd else None)


_Dumper.add_representer(str, _represent_text)
