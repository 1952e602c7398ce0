"""Kubernetes: manifests, and what the Helm chart renders, by Kubernetes' schemas and those of Dask's operator."""

import copy
import functools
import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployments import DEPLOY, check_command, is_refused, iter_commands, need_module, read_yaml

from mergemill.engine import load_recipe
from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.runs.clusters.preflight import make_limit

MANIFESTS = DEPLOY / "kubernetes"
CHART = DEPLOY / "helm" / "mergemill"
PORTS = (8786, 8787, 8788, 40000)  # of the scheduler, of dashboards, of a worker itself
CRDS = "operator/deployment/helm/dask-kubernetes-operator/crds"
MORE_VALUES: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    "a cluster that stays": {"mode": "cluster", "scheduler": {"memoryGiB": 4}},
    "every value": {
        "image": {"repository": "registry/mergemill", "tag": "1", "pullPolicy": "Always", "pullSecrets": ["pull"]},
        "secretName": "",
        "serviceAccountName": "merger",
        "env": {"AWS_ENDPOINT_URL": "https://s3.example"},
        "output": "s3://models/merged",
        "options": ["--shard-size", "tensor", "--seed", "7"],
        "workers": {
            "replicas": 2,
            "threads": 3,
            "memoryGiB": 7,
            "nodeSelector": {"disk": "fast"},
            "tolerations": [{"key": "spot", "operator": "Exists"}],
        },
    },
    "GPUs": {"workers": {"device": "cuda"}},
    "a cluster of GPUs": {"mode": "cluster", "workers": {"device": "cuda", "memoryGiB": 20}},
    "no budget, no policy": {"podDisruptionBudget": False, "networkPolicy": False},
}


@functools.cache
def read_crd(kind: str) -> Any:
    """Return the schema of a kind of the operator's own."""
    need_module("dask_kubernetes", "dask-kubernetes")
    found = importlib.util.find_spec("dask_kubernetes")
    assert found is not None
    assert found.origin is not None
    (crd,) = read_yaml(Path(found.origin).parent / CRDS / f"{kind.lower()}.yaml")
    schema = _close(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    return schema | {"additionalProperties": True}  # apiVersion, kind and metadata are everybody's


def _close(schema: Any) -> Any:
    """Have a schema refuse what it does not name, as the API server warns of (it would drop it in silence)."""
    if isinstance(schema, list):
        return [_close(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _close(value) for name, value in schema.items()}
    free = closed.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in closed
    if isinstance(closed.get("properties"), dict) and not free:
        closed["additionalProperties"] = False
    if closed.pop("x-kubernetes-int-or-string", False):
        closed.pop("type", None)
    return closed


def find_faults(document: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with an object by the schema of its kind."""
    if document["apiVersion"] == "kubernetes.dask.org/v1":
        need_module("jsonschema", "jsonschema")
        import jsonschema

        schema = read_crd(document["kind"])
        found = [
            f"{list(each.path)}: {each.message}" for each in jsonschema.Draft7Validator(schema).iter_errors(document)
        ]
        return found + [fault for pod in iter_pods(document) for fault in find_faults(as_pod(pod))]
    need_module("kubernetes_validate", "kubernetes-validate")
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error.message)]
    return []


def iter_pods(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the pods that an object of the operator makes."""
    spec = document["spec"]
    if document["kind"] == "DaskJob":
        yield spec["job"]["spec"]
        spec = spec["cluster"]["spec"]
    yield spec["worker"]["spec"]
    yield spec["scheduler"]["spec"]


def as_pod(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pod of its own, for the stricter schema of Kubernetes."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": dict(spec)}


def render(values: Mapping[str, Any], *, name: str = "mergemill-merge") -> list[Any]:
    """Return the objects that the chart makes of values."""
    need_module("helm_python", "helm-python-sdk")
    import helm_python

    rendered = helm_python.Chart.load(CHART).render(dict(values), name=name, namespace="models")
    texts = [text for path, text in rendered.items() if path.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def read_manifests() -> list[Any]:
    """Return the objects of deploy/kubernetes."""
    return [document for path in sorted(MANIFESTS.glob("*.yaml")) for document in read_yaml(path)]


def find_all(name: str) -> list[Any]:
    """Return the objects of the manifests, or of the chart with some values."""
    return read_manifests() if name == "manifests" else render(MORE_VALUES[name])


ORIGINS = ("manifests", *MORE_VALUES)


@pytest.mark.parametrize("origin", ORIGINS)
def test_every_object_is_as_its_schema_says(origin: str) -> None:
    objects = find_all(origin)
    assert [fault for each in objects for fault in find_faults(each)] == []
    assert len(objects) >= 2


@pytest.mark.parametrize("origin", ORIGINS)
def test_what_is_made_is_what_each_mode_needs(origin: str) -> None:
    kinds = sorted(each["kind"] for each in find_all(origin))
    assert kinds == {
        "manifests": ["ConfigMap", "DaskCluster", "DaskJob", *2 * ["NetworkPolicy"], *2 * ["PodDisruptionBudget"]],
        "a cluster that stays": ["DaskCluster", "NetworkPolicy", "PodDisruptionBudget"],
        "a cluster of GPUs": ["DaskCluster", "NetworkPolicy", "PodDisruptionBudget"],
        "no budget, no policy": ["ConfigMap", "DaskJob"],
    }.get(origin, ["ConfigMap", "DaskJob", "NetworkPolicy", "PodDisruptionBudget"])


def plant(kind: str, *path: str | int, value: Any) -> Mapping[str, Any]:
    """Return an object of the manifests with one thing else in it."""
    found = copy.deepcopy(next(each for each in read_manifests() if each["kind"] == kind))
    place = found
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("DaskCluster", ("spec", "worker", "replicas"), "four"),
        ("DaskCluster", ("spec", "worker", "replica"), 4),
        ("DaskJob", ("spec", "job", "spec", "containers", 0, "resource"), {}),
        ("DaskJob", ("spec", "job", "spec", "containers", 0, "args"), "merge"),
        ("DaskJob", ("spec", "cluster", "spec", "scheduler", "service", "ports"), 8786),
        ("PodDisruptionBudget", ("spec", "minAvailabel"), 1),
        ("NetworkPolicy", ("spec", "podSelectr"), {}),
        ("NetworkPolicy", ("spec", "ingress", 0, "form"), []),
        ("NetworkPolicy", ("spec", "ingress", 1, "ports"), 8786),
        ("ConfigMap", ("data", "recipe.yml"), 7),
    ],
)
def test_a_mistake_is_found(kind: str, path: tuple[str | int, ...], value: Any) -> None:
    assert find_faults(plant(kind, *path, value=value)) != []


def iter_containers(objects: list[Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield each pod and its container."""
    for each in objects:
        if each["apiVersion"].startswith("kubernetes.dask.org"):
            for pod in iter_pods(each):
                (container,) = pod["containers"]
                yield pod, container


@pytest.mark.parametrize("origin", ORIGINS)
def test_no_container_is_root_or_writes_elsewhere_than_in_its_scratch(origin: str) -> None:
    for pod, container in iter_containers(find_all(origin)):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 10001
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["automountServiceAccountToken"] is bool(pod.get("serviceAccountName"))
        assert [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")] == ["/tmp"]


@pytest.mark.parametrize("origin", ORIGINS)
def test_containers_run_what_the_image_has_within_what_they_may_hold(origin: str) -> None:
    objects = find_all(origin)
    found = {
        container["name"]: (container, check_command(container["args"])) for _, container in iter_containers(objects)
    }
    worker, options = found["worker"]
    limit_bytes = parse_size(worker["resources"]["limits"]["memory"] + "B", what="limits.memory")
    assert parse_size(options["memory_limit"], what="--memory-limit") == limit_bytes
    assert str(options["nthreads"]) == worker["resources"]["requests"]["cpu"]
    device = "cuda" if "nvidia.com/gpu" in worker["resources"]["limits"] else "cpu"
    if "driver" in found:
        driver = found["driver"][1]
        assert (driver["device"] or "cpu") == device
        least_bytes = make_limit(parse_size(driver["memory"], what="--memory"), device)
        assert 0 <= limit_bytes - least_bytes < 1 << 20
        assert ("--wait", "600") in itertools.pairwise(found["driver"][0]["args"])  # the scheduler may start later
    for container, _ in found.values():
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("memory", [1, 3, 5, 6, 64])
def test_a_worker_has_the_room_that_mergemill_gives_one(device: str, memory: int) -> None:
    objects = render({"mode": "cluster", "workers": {"device": device, "memoryGiB": memory}})
    ((_, worker), (_, scheduler)) = iter_containers(objects)
    limits = worker["resources"]["limits"]
    limit_bytes = parse_size(limits["memory"] + "B", what="limits.memory")
    assert 0 <= limit_bytes - make_limit(memory << 30, device) < 1 << 20
    assert limits.get("nvidia.com/gpu") == ("1" if device == "cuda" else None)
    assert "nvidia.com/gpu" not in scheduler["resources"]["limits"]


def test_a_merge_on_gpus_says_so_and_has_the_image_for_it() -> None:
    found = {container["name"]: container for _, container in iter_containers(render(MORE_VALUES["GPUs"]))}
    assert {container["image"].rpartition("-")[2] for container in found.values()} == {"cuda"}
    words = found["driver"]["args"]
    assert words[words.index("--device") + 1] == "cuda"
    mine = {"image": {"tag": "mine"}, "workers": {"device": "cuda"}}
    assert all(container["image"].endswith(":mine") for _, container in iter_containers(render(mine)))


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_driver_that_has_ended_is_not_started_again(origin: str) -> None:
    jobs = [each for each in find_all(origin) if each["kind"] == "DaskJob"]
    assert all(each["spec"]["job"]["spec"]["restartPolicy"] == "Never" for each in jobs)


def test_a_command_line_that_is_none_is_found() -> None:
    (job,) = [each for each in read_manifests() if each["kind"] == "DaskJob"]
    words = job["spec"]["job"]["spec"]["containers"][0]["args"]
    assert is_refused([word.replace("--shard-size", "--shards") for word in words])


@pytest.mark.parametrize("origin", ORIGINS)
def test_secrets_are_named_and_nowhere_written(origin: str) -> None:
    objects = find_all(origin)
    assert [each for each in objects if each["kind"] == "Secret"] == []
    for _, container in iter_containers(objects):
        by_name = [each["secretRef"]["name"] for each in container.get("envFrom", ())]
        needs = container["name"] != "scheduler" and origin != "every value"
        assert by_name == (["mergemill-storage"] if needs else [])


@pytest.mark.parametrize("origin", ["manifests", "as it is"])
def test_the_recipe_is_one(origin: str, tmp_path: Path) -> None:
    (text,) = [each["data"]["recipe.yml"] for each in find_all(origin) if each["kind"] == "ConfigMap"]
    (tmp_path / "recipe.yml").write_text(text)
    load_recipe(tmp_path / "recipe.yml")


@pytest.mark.parametrize("origin", ORIGINS)
def test_budgets_and_services_select_the_pods_that_the_operator_makes(origin: str) -> None:
    objects = find_all(origin)
    clusters = [each for each in objects if each["kind"] in ("DaskCluster", "DaskJob")]
    for each in clusters:
        name, spec = each["metadata"]["name"], each["spec"]
        scheduler = (spec["cluster"]["spec"] if each["kind"] == "DaskJob" else spec)["scheduler"]
        assert scheduler["service"]["selector"] == {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
        assert [port["port"] for port in scheduler["service"]["ports"]] == [8786, 8787]
    budgets = [each["spec"] for each in objects if each["kind"] == "PodDisruptionBudget"]
    named = {budget["selector"]["matchLabels"]["dask.org/cluster-name"]: budget["minAvailable"] for budget in budgets}
    kinds = {each["metadata"]["name"]: 1 if each["kind"] == "DaskCluster" else 2 for each in clusters}
    assert named == ({} if origin == "no budget, no policy" else kinds)


def list_open(policy: Mapping[str, Any], labels: Mapping[str, str], *, namespace: str = "models") -> list[int]:
    """Return the ports, of those of a cluster, that a policy of the namespace `models` opens to pods with labels."""

    def is_peer(peer: Mapping[str, Any]) -> bool:
        chosen = peer.get("namespaceSelector", {"matchLabels": named("models")})
        near = named(namespace).items() >= chosen.get("matchLabels", {}).items()
        return near and labels.items() >= peer["podSelector"]["matchLabels"].items()

    def named(name: str) -> dict[str, str]:
        return {"kubernetes.io/metadata.name": name}

    rules = [rule for rule in policy["spec"]["ingress"] if any(map(is_peer, rule["from"]))]
    return [
        port
        for port in PORTS
        if any("ports" not in rule or {"protocol": "TCP", "port": port} in rule["ports"] for rule in rules)
    ]


def find_labels_of_the_operator() -> dict[str, str]:
    """Return the labels of the operator's own pod, by the chart that installs it."""
    need_module("helm_python", "helm-python-sdk")
    need_module("dask_kubernetes", "dask-kubernetes")
    import helm_python

    found = importlib.util.find_spec("dask_kubernetes")
    assert found is not None
    assert found.origin is not None
    chart = Path(found.origin).parent / "operator/deployment/helm/dask-kubernetes-operator"
    rendered = helm_python.Chart.load(chart).render({}, name="any", namespace="dask-operator")
    (text,) = [text for path, text in rendered.items() if path.endswith("/deployment.yaml")]
    return yaml.safe_load(text)["spec"]["template"]["metadata"]["labels"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("origin", ORIGINS)
def test_policies_let_in_the_cluster_the_operator_and_prometheus_and_nobody_else(origin: str) -> None:
    objects = find_all(origin)
    names = [each["metadata"]["name"] for each in objects if each["kind"] in ("DaskCluster", "DaskJob")]
    policies = {each["metadata"]["name"]: each for each in objects if each["kind"] == "NetworkPolicy"}
    assert sorted(policies) == ([] if origin == "no budget, no policy" else sorted(names))
    operator, prometheus = find_labels_of_the_operator(), {"app.kubernetes.io/name": "prometheus"}
    for name, policy in policies.items():
        assert policy["spec"]["podSelector"] == {"matchLabels": {"dask.org/cluster-name": name}}
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        member = {"dask.org/cluster-name": name, "dask.org/component": "job-runner"}
        assert list_open(policy, member) == list(PORTS)
        assert list_open(policy, member, namespace="another") == list_open(policy, {}) == []
        assert list_open(policy, {"dask.org/cluster-name": "another"}) == []
        assert list_open(policy, operator, namespace="dask-operator") == [8786, 8787]
        assert list_open(policy, operator, namespace="another") == []
        assert list_open(policy, prometheus, namespace="monitoring") == [8787, 8788]


def test_the_operator_is_looked_for_where_a_value_says() -> None:
    (policy,) = [each for each in render({"operatorNamespace": "dask"}) if each["kind"] == "NetworkPolicy"]
    assert list_open(policy, find_labels_of_the_operator(), namespace="dask") == [8786, 8787]
    assert list_open(policy, find_labels_of_the_operator(), namespace="dask-operator") == []


def test_helm_finds_nothing_wrong_with_the_chart() -> None:
    need_module("helm_python", "helm-python-sdk")
    import helm_python

    found = helm_python.lint(CHART, strict=True)
    assert [each["error"] for each in found["messages"]] == ["icon is recommended"]
    assert found["errors"] == []


def test_helm_finds_a_broken_template(tmp_path: Path) -> None:
    need_module("helm_python", "helm-python-sdk")
    import shutil

    import helm_python

    chart = tmp_path / "mergemill"
    shutil.copytree(CHART, chart)
    job = chart / "templates" / "daskjob.yaml"
    job.write_text(job.read_text().replace('include "mergemill.pod"', 'include "mergemill.pot"', 1))
    assert [each["severity"] for each in helm_python.lint(chart)["messages"] if each["severity"] > 1] != []
    with pytest.raises(helm_python.HelmError, match=r"mergemill\.pot"):
        helm_python.Chart.load(chart).render({})


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "both"},
        {"workers": {"replicas": 0, "threads": 1, "memoryGiB": 1}},
        {"workers": {"memoryGiB": "4GiB"}},
        {"workers": {"memroyGiB": 4}},
        {"workers": {"device": "gpu"}},
        {"networkPolicy": "no"},
        {"operatorNamespace": "*"},
        {"worker": {}},
        {"output": "merged"},
        {"output": "/shared/merged"},  # of which pods see nothing
        {"output": "hf://me/merged"},
        {"env": {"AWS_SECRET_ACCESS_KEY": "a secret"}},
        {"env": {"HF_TOKEN": "a secret"}},
        {"image": {"pullPolicy": "Sometimes"}},
        {"options": "--seed 7"},
    ],
    ids=str,
)
def test_a_broken_value_is_refused(values: Mapping[str, Any]) -> None:
    need_module("helm_python", "helm-python-sdk")
    import helm_python

    with pytest.raises(helm_python.HelmError):
        render(values)


@pytest.mark.parametrize("mode", ["job", "cluster"])
def test_the_notes_name_commands_that_are_there(mode: str) -> None:
    need_module("helm_python", "helm-python-sdk")
    import helm_python

    notes = helm_python.Chart.load(CHART).render({"mode": mode}, name="mine")["mergemill/templates/NOTES.txt"]
    commands = [check_command(words) for words in iter_commands(notes)]
    assert [each["command"] for each in commands] == ["cancel" if mode == "job" else "merge"]
    assert "service/mine-scheduler" in notes


def test_the_chart_has_the_version_of_the_package() -> None:
    from importlib.metadata import version

    (chart,) = read_yaml(CHART / "Chart.yaml")
    assert chart["appVersion"] == version("mergemill")
    assert all(
        container["image"].endswith(f":{version('mergemill')}") for _, container in iter_containers(read_manifests())
    )
    heads = [words for path in MANIFESTS.glob("*.yaml") for words in iter_commands(path.read_text())]
    assert [check_command(words)["command"] for words in heads] == ["merge"]
