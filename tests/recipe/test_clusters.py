"""Cluster files: what they mean, every way to write one wrongly, and the examples that are shipped."""

from pathlib import Path

import pytest

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe import Adaptive, list_clusters, load_cluster, parse_cluster
from mergemill.engine.recipe.clusters import KINDS

KNOWN = "kind, workers, threads, memory, device, storage_options, driver, options"


def say_fault(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_cluster(text)
    return str(caught.value).removeprefix("cluster.yml:")


def test_a_cluster_file_is_a_frozen_value() -> None:
    text = (
        "kind: slurm\nworkers: {minimum: 0, maximum: 20}\nthreads: 2\nmemory: 4GiB\noptions: {queue: a, x: [{b: 1}]}\n"
    )
    cluster = parse_cluster(text)
    assert (cluster.kind, cluster.count, cluster.threads, cluster.memory) == ("slurm", 20, 2, "4GiB")
    assert cluster.workers == Adaptive(minimum=0, maximum=20)
    assert cluster.options.thaw() == {"queue": "a", "x": [{"b": 1}]}
    assert hash(cluster) == hash(parse_cluster(text))
    assert cluster == parse_cluster(text)


def test_storage_options_are_plain_values_by_scheme() -> None:
    cluster = parse_cluster("kind: local\nstorage_options: {s3: {endpoint_url: 'http://a', anonymous: true}}\n")
    assert cluster.storage == {"s3": {"endpoint_url": "http://a", "anonymous": True}}
    assert parse_cluster("kind: local\n").storage == {}


FAULTS = {
    "kind: slurm\nworkers: 1\ndriver: {memroy: 1GiB}\n": "3: unknown key 'memroy'; did you mean 'memory'?",
    "kind: slurm\nworkers: 1\ndriver: {secrets: a}\n": "3: 'secrets' must be a list of texts, not the text 'a'",
    "": f"1: the cluster file is empty; it needs kind, one of {', '.join(KINDS)}, and workers",
    "slurm\n": "1: a cluster file must be a mapping of keys to values, not the text 'slurm'",
    "workers: 3\n": "1: a cluster file needs the key 'kind'",
    "kind: slrum\nworkers: 3\n": "1: 'kind' must be a kind of cluster, not the text 'slrum'; did you mean 'slurm'?",
    "kind: 3\n": f"1: 'kind' must be a kind of cluster, not the number 3; known here: {', '.join(KINDS)}",
    "kind: slurm\nwokers: 3\n": "2: unknown key 'wokers'; did you mean 'workers'?",
    "kind: slurm\nqqq: 3\n": f"2: unknown key 'qqq'; known here: {KNOWN}",
    "kind: slurm\n": "1: a cluster file of kind slurm needs the key 'workers'",
    "kind: local\nworkers: yes\n": ("2: 'workers' must be a number or {minimum: …, maximum: …}, not the boolean true"),
    "kind: local\nworkers: 0\n": "2: 'workers' must be from 1 to 2147483647, not the number 0",
    "kind: local\nworkers:\n  minimum: 3\n  maximum: 1\n": "3: 'minimum' is 3, more than the maximum of 1",
    "kind: local\nworkers:\n  maximum: 1\n": "2: an adaptive number of workers needs the key 'minimum'",
    "kind: local\nworkers:\n  minimum:\n  maximum: 1\n": (
        "3: 'minimum' must be a whole number; nothing is written here"
    ),
    "kind: local\nworkers: {min: 1, maximum: 3}\n": "2: unknown key 'min'; did you mean 'minimum'?",
    "kind: local\nthreads: two\n": "2: 'threads' must be a whole number, not the text 'two'",
    "kind: local\nmemory: 4\n": "2: 'memory' must be text, not the number 4; put it in quotes",
    "kind: ssh\nworkers: 3\n": (
        "2: 'workers' has no place in kind ssh: there is a worker for each of options.hosts after the first"
    ),
    "kind: cuda\nworkers: {minimum: 0, maximum: 2}\n": ("2: 'workers' must be a number in kind cuda: none come or go"),
    "kind: gateway\nworkers: 3\nthreads: 2\n": (
        "3: 'threads' has no place in kind gateway: they are an option of your gateway, such as worker_cores"
    ),
    "kind: cloudprovider\nworkers: 3\n": (
        "1: 'options' needs the option 'provider' in kind cloudprovider, a class such as aws.FargateCluster"
    ),
    "kind: cloudprovider\nworkers: 3\noptions:\n  provider: Fargate\n": (
        "3: 'options' needs the option 'provider' in kind cloudprovider, a class such as aws.FargateCluster"
    ),
    "kind: local\noptions: [1]\n": "2: 'options' must be a mapping of names to values, not a list",
    "kind: local\nkind: ssh\n": "2: the key 'kind' is already given in line 1",
}


@pytest.mark.parametrize(("text", "message"), FAULTS.items())
def test_a_bad_cluster_file_is_told_in_one_line(text: str, message: str) -> None:
    assert say_fault(text) == message


def test_a_secret_is_refused_without_being_said() -> None:
    fault = say_fault("kind: local\nstorage_options: {s3: {secret: hunter2}}\n")
    assert "2: 'secret' may be a secret, and a cluster file is passed on, and sent to every worker" in fault
    assert "hunter2" not in fault


def test_a_file_is_known_by_its_ending_and_anything_else_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("kind: local\nworkers: 3\n")
    assert load_cluster(tmp_path / "mine.yml").count == 3
    assert load_cluster("local").name == "local.yml"
    with pytest.raises(RecipeError, match="slrum: no cluster is called so; did you mean 'slurm'"):
        load_cluster("slrum")
    with pytest.raises(RecipeError, match=r"none\.yml: cannot be read: No such file"):
        load_cluster(tmp_path / "none.yml")


def test_every_kind_has_an_example_that_is_shipped() -> None:
    assert list_clusters() == sorted(KINDS)
    assert [load_cluster(name).kind for name in list_clusters()] == sorted(KINDS)
