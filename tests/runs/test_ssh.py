"""Merges by workers that a real SSH server on this machine starts, by way of asyncssh."""

import json
import sys
from pathlib import Path

import psutil
import pytest
from runs.merging import hash_output, plan_merge
from servers.ssh import Ssh

from mergemill.engine import run
from mergemill.engine.errors import ClusterError
from mergemill.engine.recipe import ClusterFile, parse_cluster
from mergemill.engine.runs.events import Event, Started

HOST = "127.0.0.1"


def make_cluster(**connect: object) -> ClusterFile:
    options = {
        "hosts": [HOST, HOST, HOST],
        "connect_options": connect,
        "remote_python": sys.executable,
        "scheduler_options": {"host": HOST, "port": 0, "dashboard_address": ":0"},
        "worker_options": {"host": HOST},
    }
    return parse_cluster(json.dumps({"kind": "ssh", "threads": 2, "memory": "256MiB", "options": options}), name="ssh")


def find_ours() -> set[psutil.Process]:
    """Return the processes that Dask has started by SSH."""
    return {
        each for each in psutil.process_iter(["cmdline"]) if "distributed.cli.dask_spec" in (each.info["cmdline"] or ())
    }


@pytest.mark.slow
def test_workers_on_ssh_hosts_write_the_same_bytes_and_are_gone(ssh: Ssh, family: Path, tmp_path: Path) -> None:
    before = find_ours()
    plan = plan_merge("ties", family)
    run(plan, tmp_path / "here", workers=0)
    events: list[Event] = []
    run(plan, tmp_path / "out", cluster=make_cluster(**ssh.options), on_event=events.append)
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "here")
    (started,) = (event for event in events if isinstance(event, Started))
    assert (started.threads, started.warnings) == (2, ())
    assert started.workers in (1, 2)  # that had come by then
    _, left = psutil.wait_procs(find_ours() - before, timeout=20)
    assert left == []


def test_a_key_that_the_host_does_not_take_is_one_error(ssh: Ssh, family: Path, tmp_path: Path) -> None:
    wrong = ssh.options | {"client_keys": [str(ssh.folder / "host")]}
    with pytest.raises(ClusterError, match=r"could not be started: .*Permission denied") as caught:
        run(plan_merge("linear", family), tmp_path / "out", cluster=make_cluster(**wrong))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()
