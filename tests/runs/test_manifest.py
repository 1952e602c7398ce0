"""Drivers in Kubernetes: manifests by the schemas of Kubernetes and of Dask's operator, and what `kubectl` is given."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.test_kubernetes import find_faults
from runs.merging import make_recipe

from mergemill.cli.main import execute
from mergemill.engine import load_recipe
from mergemill.engine.errors import PlanError
from mergemill.engine.recipe import load_cluster, parse_cluster
from mergemill.engine.runs.jobs import make_job

PODS = """
kind: kubernetes
workers: {minimum: 0, maximum: 3}
threads: 2
memory: 4GiB
driver: {memory: 2GiB, cpus: 1, secrets: [storage]}
options: {image: registry.example/mergemill, namespace: merges}
"""
KUBECTL = """#!/bin/sh
echo "$@" > {folder}/arguments
cat > {folder}/applied
{then}
"""


@pytest.fixture
def recipe(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in the working directory, beside the cluster file `pods.yml`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pods.yml").write_text(PODS)
    path = tmp_path / "recipe.yml"
    path.write_text(make_recipe("ties", family).text)
    return path


def make(recipe: Path, pods: str = PODS, *arguments: str) -> tuple[Any, Any]:
    """Return the ConfigMap and the DaskJob of a merge into object storage; both are as their schemas want them."""
    file, made = parse_cluster(pods, name="pods.yml"), load_recipe(recipe)
    job = make_job(made, "s3://b/out", file, cluster="pods.yml", arguments=arguments, folder=recipe.parent)
    config, dask_job = yaml.safe_load_all(job.text)
    assert find_faults(config) == []
    assert find_faults(dask_job) == []
    return config, dask_job


def find_containers(dask_job: Any) -> dict[str, Any]:
    """Return the containers by their names."""
    cluster = dask_job["spec"]["cluster"]["spec"]
    pods = [dask_job["spec"]["job"]["spec"], cluster["worker"]["spec"], cluster["scheduler"]["spec"]]
    return {container["name"]: container for pod in pods for container in pod["containers"]}


def test_the_manifest_is_as_kubernetes_and_the_operator_want_it(recipe: Path) -> None:
    config, dask_job = make(recipe)
    assert config["data"] == {"recipe.yml": recipe.read_text()}
    found = find_containers(dask_job)
    words = ["merge", "/recipe/recipe.yml", "s3://b/out", "--memory", "4GiB", "--wait", "600"]
    assert found["driver"]["args"] == words
    secrets = {name: each.get("envFrom") for name, each in found.items()}
    assert secrets["driver"] == secrets["worker"] == [{"secretRef": {"name": "storage"}}]
    assert secrets["scheduler"] is None
    assert dask_job["spec"]["job"]["spec"]["restartPolicy"] == "Never", "or a driver that was cancelled goes on"
    assert {each["image"] for each in found.values()} == {"registry.example/mergemill"}
    assert {each["metadata"]["namespace"] for each in (config, dask_job)} == {"merges"}
    assert dask_job["spec"]["cluster"]["spec"]["worker"]["replicas"] == 3
    assert found["worker"]["resources"] == {
        "requests": {"cpu": "2", "memory": str(5 << 30)},
        "limits": {"memory": str(5 << 30)},
    }


def test_options_with_a_place_in_a_dask_job_reach_it(recipe: Path) -> None:
    options = "name: mine, scheduler_service_type: NodePort, env: {PLACE: '1e3'}, resources: {limits: {cpu: '7'}}, "
    config, dask_job = make(recipe, PODS.replace("options: {", f"options: {{{options}"))
    found = find_containers(dask_job)
    names = {each["metadata"]["name"] for each in (config, dask_job, *make(recipe, PODS))}
    assert {re.sub("-[0-9a-f]{8}$", "", name) for name in names} == {"mine", "mergemill"}
    assert len(names) == 2, "each job has a name of its own"
    assert dask_job["spec"]["cluster"]["spec"]["scheduler"]["service"]["type"] == "NodePort"
    assert all({"name": "PLACE", "value": "1e3"} in each["env"] for each in found.values())
    assert all({"name": "OMP_NUM_THREADS", "value": "1"} in each["env"] for each in found.values())
    assert found["worker"]["resources"] == {"limits": {"cpu": "7"}}


@pytest.mark.parametrize("option", ["idle_timeout: 60", "worker_command: dask-worker", "quiet: true", "typo: 1"])
def test_an_option_without_a_place_is_one_error(recipe: Path, option: str) -> None:
    name = option.partition(":")[0]
    with pytest.raises(PlanError, match=rf"^pods\.yml: options: '{name}' has no place in a DaskJob; submit takes "):
        make(recipe, PODS.replace("options: {", f"options: {{{option}, "))


def test_the_driver_reaches_storage_as_the_cluster_file_says(recipe: Path, tmp_path: Path) -> None:
    config, dask_job = make(recipe, f"{PODS}storage_options: {{s3: {{endpoint_url: 'http://store:9000'}}}}\n")
    words = find_containers(dask_job)["driver"]["args"]
    mounted = Path(words[words.index("--storage-as") + 1])
    assert str(mounted.parent) == "/recipe"
    (tmp_path / mounted.name).write_text(config["data"][mounted.name])
    assert load_cluster(tmp_path / mounted.name).storage == {"s3": {"endpoint_url": "http://store:9000"}}


@pytest.mark.parametrize(("of_file", "arguments"), [("device: cuda\n", ()), ("", ("--device", "cuda"))])
def test_workers_on_cuda_ask_for_a_gpu_each(recipe: Path, of_file: str, arguments: tuple[str, ...]) -> None:
    _, dask_job = make(recipe, PODS + of_file, *arguments)
    found = find_containers(dask_job)
    assert found["worker"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert found["driver"]["args"].count("--device") == 1
    assert not any("nvidia" in str(found[name]["resources"]) for name in ("driver", "scheduler"))


def test_what_a_config_map_or_a_pod_cannot_have_is_one_error(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"^--methods: names files of this machine"):
        make(recipe, PODS, "--methods", "/own.py")
    with pytest.raises(PlanError, match=r"^pods\.yml: needs the option 'image'"):
        make(recipe, PODS.replace("image", "name"))
    with pytest.raises(PlanError, match="cannot be in a ConfigMap"):
        make(recipe.rename(tmp_path / "a recipe.yml"))


def test_what_would_be_lost_or_read_by_others_is_one_error(recipe: Path) -> None:
    file, made = parse_cluster(PODS, name="pods.yml"), load_recipe(recipe)
    for out, said in [("merged", "gone with it"), ("/data/merged", "gone with it"), ("hf://me/merged", "one machine")]:
        with pytest.raises(PlanError, match=rf"^{out}: .*{said}"):
            make_job(made, out, file, cluster="pods.yml", folder=recipe.parent)
    with pytest.raises(PlanError, match=r"^pods\.yml: options: env: HF_TOKEN: .* driver\.secrets"):
        make(recipe, PODS.replace("options: {", "options: {env: {HF_TOKEN: hf_1}, "))
    make(recipe, PODS.replace("options: {", "options: {env: {TOKENIZERS_PARALLELISM: 'false'}, "))
    by_reference = "env: [{name: HF_TOKEN, valueFrom: {secretKeyRef: {name: hub, key: token}}}]"
    make(recipe, PODS.replace("options: {", f"options: {{{by_reference}, "))


def test_workers_and_scheduler_say_that_they_are_well_where_prometheus_asks(recipe: Path) -> None:
    found = find_containers(make(recipe)[1])
    for name, port in {"worker": 8788, "scheduler": 8787}.items():
        words = found[name]["args"]
        assert words[words.index("--dashboard-address") + 1] == f":{port}"
        assert {"name": "http-dashboard", "containerPort": port, "protocol": "TCP"} in found[name]["ports"]
        assert found[name]["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http-dashboard"}


def write_kubectl(folder: Path, monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    """Put a `kubectl` on the path that records what it is given, and then does this."""
    path = folder / "bin" / "kubectl"
    path.parent.mkdir()
    path.write_text(KUBECTL.format(folder=folder, then=then))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")


def submit(*more: str) -> int:
    return execute(["submit", "recipe.yml", "s3://b/out", "--cluster", "pods.yml", *more])


@pytest.mark.usefixtures("recipe")
def test_kubectl_applies_what_a_dry_run_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pods.yml").write_text(PODS.replace("options: {", "options: {name: mine, "))
    write_kubectl(tmp_path, monkeypatch, "echo daskjob.kubernetes.dask.org/mine created")
    assert submit("--dry-run") == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "applied").exists()
    assert submit() == 0
    assert (tmp_path / "arguments").read_text() == "create -f -\n"
    applied = (tmp_path / "applied").read_text()
    name = next(yaml.safe_load_all(applied))["metadata"]["name"]
    assert re.sub("mine-[0-9a-f]{8}", name, printed) == applied
    assert capsys.readouterr().out.startswith(f"kubernetes job {name} merges into s3://b/out\n")


@pytest.mark.usefixtures("recipe")
def test_a_kubectl_that_fails_or_is_not_there_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_kubectl(tmp_path, monkeypatch, "echo 'error: no matches for kind \"DaskJob\"' >&2; exit 1")
    assert submit() != 0
    said = capsys.readouterr().err
    assert said == 'mergemill: error: kubectl create -f -: failed: error: no matches for kind "DaskJob"\n'
    (tmp_path / "bin" / "kubectl").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert submit() != 0
    said = capsys.readouterr().err
    assert said == "mergemill: error: kubectl: is not installed here; see --dry-run for what it would be given\n"
