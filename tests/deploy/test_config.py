"""Dask's configuration: only keys that Dask knows, with values of their kind, and what mergemill sets itself."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import distributed
import pytest
import yaml
from dask.utils import parse_timedelta
from deployments import DEPLOY, need_module, read_yaml

from mergemill.engine.recipe import load_cluster
from mergemill.engine.runs.clusters.cluster import _CONFIG
from mergemill.engine.runs.clusters.factories import make_arguments

DASK = DEPLOY / "dask" / "mergemill.yaml"
JOBQUEUE = DEPLOY / "slurm" / "jobqueue.yaml"
FREE = ("distributed.nanny.pre-spawn-environ", "distributed.nanny.environ")  # names of the user's choice


def iter_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys that hold a value, dotted."""
    if not isinstance(value, Mapping) or path in FREE:
        yield path, value
        return
    for name, inner in value.items():
        yield from iter_leaves(inner, f"{path}.{name}" if path else str(name))


def read_defaults(package: str, name: str) -> dict[str, Any]:
    """Return the defaults that a package brings."""
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    return dict(iter_leaves(yaml.safe_load((Path(found.origin).parent / name).read_text())))


def find_unknown(config: Any, known: Mapping[str, Any]) -> list[str]:
    """Return the keys of a configuration that are not known."""
    return [key for key, _ in iter_leaves(config) if key not in known]


def find_invalid(config: Any) -> list[str]:
    """Return what Dask's own schema has against a configuration."""
    need_module("jsonschema", "jsonschema")
    import jsonschema

    schema = yaml.safe_load((Path(distributed.__file__).parent / "distributed-schema.yaml").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(config)]


def test_dask_knows_every_key() -> None:
    (config,) = read_yaml(DASK)
    assert find_unknown(config, read_defaults("distributed", "distributed.yaml")) == []
    assert find_invalid(config) == []


@pytest.mark.parametrize(
    ("right", "wrong"), [("worker-saturation", "worker-saturaton"), ("pause", "pauze"), ("terminate", "kill")]
)
def test_an_unknown_key_is_found(right: str, wrong: str) -> None:
    config = yaml.safe_load(DASK.read_text().replace(f"{right}:", f"{wrong}:"))
    (unknown,) = find_unknown(config, read_defaults("distributed", "distributed.yaml"))
    assert unknown.endswith(wrong)


def test_a_value_of_the_wrong_kind_is_found() -> None:
    config = yaml.safe_load(DASK.read_text().replace("allowed-failures: 5", "allowed-failures: many"))
    assert find_invalid(config) != []


def test_the_file_says_what_mergemill_sets_itself() -> None:
    given = dict(iter_leaves(read_yaml(DASK)[0]))
    silent = "distributed.scheduler.worker-ttl"  # across a network a little later than on one machine
    assert {key: given[key] for key in _CONFIG} == {**_CONFIG, silent: given[silent]}
    assert parse_timedelta(_CONFIG[silent]) <= parse_timedelta(given[silent]) <= 60


def test_the_nanny_sets_at_least_what_dask_sets() -> None:
    (key,) = FREE[:1]
    defaults = read_defaults("distributed", "distributed.yaml")[key]
    assert defaults.items() <= dict(iter_leaves(read_yaml(DASK)[0]))[key].items()


def test_jobqueue_knows_every_key_of_its_configuration() -> None:
    need_module("dask_jobqueue", "dask-jobqueue")
    known = read_defaults("dask_jobqueue", "jobqueue.yaml")
    (config,) = read_yaml(JOBQUEUE)
    assert find_unknown(config, known) == []
    commented = yaml.safe_load(JOBQUEUE.read_text().replace("    # ", "    "))
    assert find_unknown(commented, known) == []
    assert len(dict(iter_leaves(commented))) == len(dict(iter_leaves(config))) + 3
    config["jobqueue"]["slurm"]["memmory"] = "4GiB"
    assert find_unknown(config, known) == ["jobqueue.slurm.memmory"]


def make_script(config: Mapping[str, Any], folder: Path) -> str:
    """Return the script of a worker's job of `--cluster slurm`, for a configuration of Dask."""
    need_module("dask_jobqueue", "dask-jobqueue")
    import dask
    from dask_jobqueue.slurm import SLURMJob

    given = make_arguments(load_cluster("slurm"), 9 << 30)
    assert given.pop("scheduler_options")
    logs = "jobqueue.slurm.log-directory"  # is made
    with dask.config.set(dict(config) | {logs: str(folder / config[logs])}):
        return str(SLURMJob(scheduler="tcp://127.0.0.1:1", name="worker", **given).job_script())


def list_jobqueue() -> dict[str, Any]:
    """Return the settings of jobqueue.yaml, with those that are commented out."""
    return dict(iter_leaves(yaml.safe_load(JOBQUEUE.read_text().replace("    # ", "    "))))


@pytest.mark.parametrize("key", list_jobqueue())
def test_each_key_for_jobqueue_acts_beside_the_cluster_file(key: str, tmp_path: Path) -> None:
    config = list_jobqueue()
    other = {int: 7, str: "another", list: ["--another"]}[type(config[key])]
    assert make_script(config, tmp_path) == make_script(config, tmp_path)
    assert make_script(config, tmp_path) != make_script(config | {key: other}, tmp_path)


@pytest.mark.parametrize("key", ["queue", "walltime", "cores", "processes", "memory", "worker-extra-args"])
def test_keys_that_the_cluster_file_overrides_are_not_for_jobqueue(key: str, tmp_path: Path) -> None:
    config = list_jobqueue()
    assert f"jobqueue.slurm.{key}" not in config
    assert make_script(config, tmp_path) == make_script(config | {f"jobqueue.slurm.{key}": 3}, tmp_path)


def test_a_job_has_what_the_cluster_file_and_jobqueue_say(tmp_path: Path) -> None:
    lines = make_script(list_jobqueue(), tmp_path)
    for part in ("-J mergemill", "-p normal", "--mem=9G", "--cpus-per-task=4", "--qos=low", "--lifetime 55m"):
        assert part in lines
    for part in ("--death-timeout 300", "--interface ib0", "--local-directory /scratch", "OMP_NUM_THREADS=1"):
        assert part in lines
