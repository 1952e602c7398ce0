"""What is asked of real workers before a merge: room beside Dask's own limit, and remote storage within their reach."""

import os
from pathlib import Path

import pytest
from clusters import start_cluster
from runs.buckets import new_place, put_family
from runs.merging import plan_merge
from servers.s3 import S3

from mergemill.engine import run
from mergemill.engine.errors import ClusterError
from mergemill.engine.recipe import parse_cluster
from mergemill.engine.runs.clusters.factories import make_arguments
from mergemill.engine.runs.clusters.preflight import DASK_PAUSE, PAUSE, PROCESS_BYTES, make_limit

WITHOUT = """
import os, sys
for name in [name for name in os.environ if name.startswith("AWS_")]:
    del os.environ[name]
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_ENDPOINT_URL"] = {url!r}
os.environ["HOME"] = "/nonexistent"
"""
NO_DRIVER = "import sys\nsys.modules['boto3'] = None\n"


def test_a_limit_of_dask_that_has_no_room_for_the_promise_is_named_with_one_that_has(
    family: Path, tmp_path: Path
) -> None:
    plan = plan_merge("linear", family)
    with start_cluster(tmp_path, "--memory-limit", "1GiB", count=1) as own:
        with pytest.raises(ClusterError) as caught:
            run(plan, tmp_path / "out", scheduler=own.address, memory="900MiB")
        assert not (tmp_path / "out").exists()
        run(plan, tmp_path / "out", scheduler=own.address, memory="400MiB")
    message = str(caught.value)
    usable = int(DASK_PAUSE * 1024)
    enough = -(-(900 + (PROCESS_BYTES >> 20)) // DASK_PAUSE)
    assert f"Dask stops it at {usable} MiB, 900 MiB are promised" in message
    assert f"--memory {usable - (PROCESS_BYTES >> 20)}MiB, or a memory limit of {enough:.0f} MiB" in message
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize("promise_bytes", [256 << 20, 4 << 30, 64 << 30, 500 << 30])
def test_workers_that_are_started_have_room(promise_bytes: int) -> None:
    assert PAUSE * make_limit(promise_bytes) >= promise_bytes + PROCESS_BYTES
    slurm = make_arguments(parse_cluster("kind: slurm\nworkers: 1\n"), make_limit(promise_bytes))
    assert slurm["memory"] == make_limit(promise_bytes)
    assert f"export DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE={PAUSE}" in slurm["job_script_prologue"]


def test_workers_without_credentials_or_driver_are_named_and_no_secret_is_said(
    seaweed: S3, family: Path, tmp_path: Path
) -> None:
    models, out = put_family(seaweed, family), new_place(seaweed)
    plan = plan_merge("linear", models.url)
    (tmp_path / "without.py").write_text(WITHOUT.format(url=seaweed.url))
    with start_cluster(tmp_path, "--preload", str(tmp_path / "without.py"), count=1) as own:
        for place in (str(tmp_path / "out"), out.url):
            with pytest.raises(ClusterError) as caught:
                run(plan, place, scheduler=own.address, memory="256MiB")
            message = str(caught.value)
            assert message.count("no credentials; set AWS_PROFILE") == 1 + (place == out.url)
            assert seaweed.secret_key not in message
            assert seaweed.access_key not in message
    assert not (tmp_path / "out").exists()
    assert out.read() == {}
    (tmp_path / "no_driver.py").write_text(NO_DRIVER)
    (tmp_path / "other").mkdir()
    with (
        start_cluster(tmp_path / "other", "--preload", str(tmp_path / "no_driver.py"), count=1) as own,
        pytest.raises(ClusterError, match=r"boto3 is not installed; install mergemill\[s3\]"),
    ):
        run(plan, tmp_path / "out", scheduler=own.address, memory="256MiB")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == seaweed.secret_key  # here they are all the time
