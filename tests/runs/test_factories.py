"""What goes to the class of each kind of cluster, as far as that can be seen without the cluster."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from mergemill.engine.errors import ClusterError
from mergemill.engine.recipe import load_cluster, parse_cluster
from mergemill.engine.runs.clusters import factories
from mergemill.engine.runs.clusters.factories import FACTORIES, make_arguments, start_cluster

LIMIT = 5 << 30
EXTRAS = {
    "ssh": ("asyncssh", "ssh"),
    "slurm": ("dask_jobqueue", "jobqueue"),
    "kubernetes": ("dask_kubernetes", "kubernetes"),
    "gateway": ("dask_gateway", "gateway"),
    "cuda": ("dask_cuda", "cuda"),
    "cloudprovider": ("dask_cloudprovider", "cloudprovider"),
    "coiled": ("coiled", "coiled"),
}


@pytest.mark.parametrize("kind", EXTRAS)
def test_a_package_that_is_missing_is_named_with_its_extra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, extra = EXTRAS[kind]
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ClusterError, match=rf"{kind}.yml: kind {kind}: .*; install mergemill\[{extra}\]"):
        start_cluster(load_cluster(kind), LIMIT).__enter__()


@pytest.mark.parametrize("kind", ["slurm", "pbs", "lsf", "sge"])
def test_the_script_of_a_job_is_sound(kind: str, tmp_path: Path) -> None:
    import dask_jobqueue

    file = load_cluster(kind)
    cls = getattr(dask_jobqueue, FACTORIES[kind].name)
    arguments = make_arguments(file, LIMIT)
    factories._check_options(file, cls, kind)
    arguments.pop("scheduler_options")
    job = cls.job_cls("tcp://127.0.0.1:1", name="worker", config_name=kind, **arguments)
    script = job.job_script()
    assert f"--nthreads {file.threads}" in script
    assert "export OMP_NUM_THREADS=1" in script
    assert "export DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE=0.9" in script
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=True)
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(checker), "-S", "warning", "-s", "bash", str(tmp_path / "job.sh")], capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")


def test_options_of_the_file_join_ours_or_stand_over_them() -> None:
    text = "kind: slurm\nworkers: 1\nthreads: 2\noptions:\n  cores: 4\n  job_script_prologue: [module load python]\n"
    arguments = make_arguments(parse_cluster(text + "  scheduler_options: {host: 127.0.0.1}\n"), LIMIT)
    assert arguments["cores"] == 4
    assert arguments["job_script_prologue"][-1] == "module load python"
    assert len(arguments["job_script_prologue"]) > 1
    assert arguments["scheduler_options"] == {"dashboard_address": ":0", "host": "127.0.0.1"}


def test_what_kubernetes_is_given_makes_a_cluster_that_its_own_schema_takes() -> None:
    import jsonschema
    import yaml
    from dask_kubernetes.operator import make_cluster_spec

    text = "kind: kubernetes\nworkers: 3\nthreads: 2\noptions: {image: mill, env: {AWS_REGION: here}}\n"
    given = make_arguments(parse_cluster(text), LIMIT)
    given.pop("quiet")
    spec = json.loads(json.dumps(make_cluster_spec(**given)))
    place = "deployment/helm/dask-kubernetes-operator/crds/daskcluster.yaml"
    crd = yaml.safe_load(resources.files("dask_kubernetes.operator").joinpath(place).read_text("utf-8"))
    jsonschema.validate(spec, crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    worker = spec["spec"]["worker"]
    assert worker["replicas"] == 3
    (container,) = worker["spec"]["containers"]
    assert container["image"] == "mill"
    assert container["args"][:6] == ["dask", "worker", "--nthreads", "2", "--memory-limit", str(LIMIT)]
    assert container["resources"]["limits"]["memory"] == str(LIMIT)
    environ = {each["name"]: each["value"] for each in container["env"]}
    assert environ["AWS_REGION"] == "here"
    assert environ["OMP_NUM_THREADS"] == "1"


def test_every_option_of_the_examples_is_one_of_the_class() -> None:
    for kind in ("local", "ssh", "slurm", "pbs", "lsf", "sge", "kubernetes"):
        file = load_cluster(kind)
        factories._check_options(file, factories._find_class(file, FACTORIES[kind], kind), kind)


def test_an_option_that_is_misspelt_is_one_error_and_names_the_nearest() -> None:
    file = parse_cluster("kind: slurm\nworkers: 1\noptions: {wallime: 1}\n", name="mine.yml")
    with pytest.raises(
        ClusterError, match=r"mine.yml: options: SLURMCluster takes no 'wallime'; did you mean 'walltime'"
    ):
        start_cluster(file, LIMIT).__enter__()


def test_a_gateway_that_does_not_answer_is_one_error() -> None:
    text = "kind: gateway\nworkers: 1\noptions: {address: 'http://127.0.0.1:1', worker_cores: 2}\n"
    with pytest.raises(ClusterError, match="GatewayCluster could not be started") as caught:
        start_cluster(parse_cluster(text, name="mine.yml"), LIMIT).__enter__()
    assert "\n" not in str(caught.value)
