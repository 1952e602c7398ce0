"""A merge on hosts of a network of their own, network namespaces, of which one is cut off in the middle, and healed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Foreign
from runs.disturbed import SLOW
from runs.merging import finished_parts, hash_output, is_loadable, make_recipe, write_family
from servers import namespaces
from servers.namespaces import Host

from mergemill.engine import load_recipe, make_plan, run, verify

SETTINGS = {"WORKER_TTL": "8s", "ALLOWED_FAILURES": "5"}
SHARD_SIZE = "250KB"  # a part is a shard
WAIT_S = 60


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """One for the scheduler and the driver, and two for workers."""
    if missing := namespaces.find_skip_reason():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    with namespaces.make_hosts(3) as made:
        yield made


def wait_for(true: object, what: str) -> None:
    assert callable(true)
    end_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end_s, what
        time.sleep(0.05)


@pytest.mark.slow
def test_a_host_that_is_cut_off_and_comes_back_changes_no_byte(hosts: list[Host], tmp_path: Path) -> None:
    home, *others = hosts
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(make_recipe("ties", write_family(tmp_path / "models", vocab=800, layers=1)).text)
    run(make_plan(load_recipe(str(recipe)), shard_size=SHARD_SIZE), tmp_path / "here", workers=0)
    (tmp_path / "slow.py").write_text(SLOW.replace("0.05", "0.3"))
    environ = os.environ | {f"DASK_DISTRIBUTED__SCHEDULER__{name}": value for name, value in SETTINGS.items()}
    environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environ["DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP"] = "15s"
    options = ["--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path), "--preload", "slow.py"]
    cluster = Foreign(tmp_path, options, environ, (*home.command, sys.executable), home.address)
    out, log = tmp_path / "out", tmp_path / "said"
    try:
        cluster.launch_scheduler()
        wait_for(cluster.file.exists, "no scheduler")
        for host in others:
            cluster.start_worker("--host", host.address, command=(*host.command, sys.executable))
        program = ("-c", "from mergemill.cli.main import main; main()", "merge", str(recipe), str(out), "--json")
        command = [*home.command, sys.executable, *program, "--shard-size", SHARD_SIZE]
        with open(log, "wb") as said:
            driver = subprocess.Popen(
                [*command, "--scheduler", str(cluster.file)], env=environ, cwd=tmp_path, stdout=said, stderr=said
            )
        try:
            wait_for(lambda: len(finished_parts(out)) >= 3, "it does not begin")
            others[0].cut()
            assert not is_loadable(out)
            assert driver.wait(WAIT_S * 2) == 0, log.read_text()[-2000:]
        finally:
            driver.kill()
            driver.wait()
        assert hash_output(out) == hash_output(tmp_path / "here")
        others[0].heal()
        cluster.workers[0].wait(WAIT_S)  # it learns that it was given up
        assert hash_output(out) == hash_output(tmp_path / "here")
        events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"event": "started"')]
        assert events[0]["workers"] >= 1
        assert verify(out).parts == len(finished_parts(out))
    finally:
        for worker in cluster.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGKILL)
        cluster.stop()
