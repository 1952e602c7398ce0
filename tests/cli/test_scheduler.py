"""The command on a Dask cluster that is there already."""

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import start_cluster

from mergemill.engine.runs.clusters import connect


def test_a_merge_on_a_cluster_is_stopped_and_resumed(
    models: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    out = tmp_path / "out"
    with start_cluster(tmp_path) as own:
        arguments = ["merge", models / "ties.yml", out, "--shard-size", "tensor", "--scheduler", own.address, "--json"]
        process = start(*arguments, cwd=models)
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "started":
                assert (event["workers"], event["threads"]) == (2, 2)
            if event.get("parts_done") == 5:
                break
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        resume = shlex.split(err.partition("go on with: mergemill ")[2])
        process = start(*resume, cwd=models)
        done, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    committed = json.loads(done.splitlines()[-1])
    assert 0 < committed["redone_parts"] <= 111 - 5
    assert (out / "model.safetensors.index.json").exists()


def test_a_merge_that_waits_for_a_first_worker_heeds_signals(
    models: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    out = tmp_path / "out"
    with start_cluster(tmp_path, count=0) as own:
        process = start("merge", models / "ties.yml", out, "--scheduler", own.address, "--json", cwd=models)
        assert process.stdout is not None
        events = (json.loads(line) for line in process.stdout)
        waiting = next(event for event in events if event["event"] == "waiting")
        assert waiting == {"event": "waiting", "cluster": own.address, "waited_s": 0.0, "missing": "worker"}
        process.terminate()
        _, err = process.communicate(timeout=60)  # and not only when nobody waits any more
    assert process.returncode == 143
    assert "terminated before the first part" in err
    assert not out.exists()


def test_the_environment_may_name_it(
    mergemill: Callable[..., tuple[int, str, str]], here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "CONNECT_S", 1)
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:1")
    code, out, err = mergemill("merge", "ties.yml", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "tcp://127.0.0.1:1: no Dask scheduler answers there" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--scheduler", "--scheduler-file"])
def test_its_file_may_name_it_whatever_the_file_is_called(
    option: str,
    mergemill: Callable[..., tuple[int, str, str]],
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connect, "CONNECT_S", 1)
    file = tmp_path / "scheduler"
    file.write_text(json.dumps({"address": "tls://127.0.0.1:1"}))
    code, _, err = mergemill("merge", "ties.yml", tmp_path / "out", option, file)
    assert code == 1
    assert f"{file}: talks TLS, and Dask is told of no certificate here" in err
    file.write_text("nothing of the kind")
    code, _, err = mergemill("merge", "ties.yml", tmp_path / "out", option, file)
    assert code == 1
    assert f"{file}: no Dask scheduler answers there" in err
    assert not (tmp_path / "out").exists()
