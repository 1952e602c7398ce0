"""Drivers as jobs of a real SLURM."""

import json
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs.merging import hash_output, make_recipe
from servers.slurm import PARTITION, Slurm

from mergemill.cli.main import execute
from mergemill.cli.status import say_resume
from mergemill.engine import attach, cancel, load_recipe, make_plan, run, status
from mergemill.engine.errors import ClusterError, PlanError
from mergemill.engine.recipe import parse_cluster
from mergemill.engine.runs.jobs import make_job, submit_job

WAIT_S = 90.0
SMALL = ("--seed", "7", "--shard-size", "tensor")  # many parts
SLOW = """import sys
sys.path.insert(0, {tests!r})
from runs.merging import slow_down
slow_down({slow_s})
"""


@pytest.fixture
def recipe(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "it's a recipe.yml"
    path.write_text(make_recipe("ties", family).text)
    return path


def write_cluster(folder: Path, name: str, *directives: str, slow_s: float = 0.0) -> Path:
    """Write a cluster file whose workers' jobs have these directives, and whose slabs take so much longer."""
    options: dict[str, Any] = {
        "queue": PARTITION,
        "log_directory": str(folder / "jobs"),
        "local_directory": str(folder / "dask"),
        "scheduler_options": {"host": "127.0.0.1"},
        "job_extra_directives": list(directives),
    }
    if slow_s:
        (folder / "slow.py").write_text(SLOW.format(tests=str(Path(__file__).parents[1]), slow_s=slow_s))
        options["worker_extra_args"] = ["--preload", str(folder / "slow.py")]
    driver = {"memory": "512MiB", "walltime": "00:10:00", "prologue": ["export TOLD=here"]}
    values = {"kind": "slurm", "workers": 1, "memory": "256MiB", "driver": driver, "options": options}
    (folder / name).write_text(json.dumps(values))
    return folder / name


def wait_for(what: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.2)


def test_a_driver_in_slurm_is_seen_cancelled_while_it_waits_and_resumed_to_the_same_bytes(
    slurm: Slurm, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("dask_jobqueue")
    out = tmp_path / "out"
    late, now = write_cluster(tmp_path, "late.yml", "--begin=now+1hour"), write_cluster(tmp_path, "now.yml")
    assert execute(["submit", recipe.name, "out", "--cluster", late.name]) == 0
    said = capsys.readouterr().out
    number = said.split()[2]
    assert said.startswith(f"slurm job {number} merges into out\n")
    wait_for(lambda: (out / ".mergemill" / "driver.json").exists())
    seen = status(out)
    assert seen.state == "running"
    assert seen.driver is not None
    assert (seen.driver.job, seen.driver.started) == (f"slurm {number}", None)
    assert cancel(out, wait_s=WAIT_S).state == "unfinished"
    wait_for(lambda: number not in slurm.list_jobs())
    assert "cancelled by" in (tmp_path / f"mergemill-{number}.log").read_text()

    assert execute(["submit", recipe.name, "out", "--cluster", now.name]) == 0
    before = recipe.read_text()
    recipe.write_text("what is edited later: reaches nobody")
    assert attach(out, wait_s=WAIT_S).redone_parts > 0
    recipe.write_text(before)
    run(make_plan(load_recipe(recipe)), tmp_path / "expected", workers=0)
    assert hash_output(out) == hash_output(tmp_path / "expected")


def submit_slowly(folder: Path) -> str:
    """Submit a slow merge into `out`, and return its job's number once a few parts are done."""
    write_cluster(folder, "slow.yml", slow_s=0.15)
    assert execute(["submit", "it's a recipe.yml", "out", "--cluster", "slow.yml", *SMALL]) == 0
    wait_for(lambda: (folder / "out" / ".mergemill" / "driver.json").exists())
    wait_for(lambda: status(folder / "out").parts_done >= 3)
    seen = status(folder / "out")
    assert seen.driver is not None
    assert seen.parts_done < seen.parts
    return seen.driver.job.removeprefix("slurm ")


def check_bytes(folder: Path, recipe: Path) -> None:
    """Fail unless `out` is what a merge by threads of this process gives."""
    run(make_plan(load_recipe(recipe), seed=7, shard_size="tensor"), folder / "expected", workers=0)
    assert hash_output(folder / "out") == hash_output(folder / "expected")


def test_a_running_job_that_is_requeued_resumes_by_itself(slurm: Slurm, recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("dask_jobqueue")
    number = submit_slowly(tmp_path)
    write_cluster(tmp_path, "slow.yml")  # what the next driver reads
    slurm.call("scontrol", "requeue", number)
    wait_for(lambda: slurm.list_jobs().get(number) == "PENDING")
    left = status(tmp_path / "out")
    slurm.call("scontrol", "update", f"JobId={number}", "StartTime=now")  # else 2 min later, once credentials are old
    assert 0 < attach(tmp_path / "out", wait_s=WAIT_S).redone_parts <= left.parts - left.parts_done
    check_bytes(tmp_path, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["SIGTERM", "cancel"])
def test_a_job_that_is_ended_half_way_says_how_to_go_on_and_does(
    slurm: Slurm, recipe: Path, tmp_path: Path, end: str
) -> None:
    pytest.importorskip("dask_jobqueue")
    number = submit_slowly(tmp_path)
    if end == "SIGTERM":
        slurm.call("scancel", "--batch", "--signal=TERM", number)  # as before its walltime
    else:
        assert execute(["cancel", "out"]) == 0
    wait_for(lambda: number not in slurm.list_jobs())
    left = status(tmp_path / "out")
    assert left.state == "unfinished"
    assert left.driver is not None
    assert left.driver.how == ("interrupted" if end == "SIGTERM" else "cancelled")
    resume = say_resume(left)
    words = "'it'\"'\"'s a recipe.yml' out --cluster slow.yml --seed 7 --shard-size tensor"
    assert resume == f"cd {tmp_path} && mergemill submit {words}"
    assert f"go on with: {resume}" in (tmp_path / f"mergemill-{number}.log").read_text()
    write_cluster(tmp_path, "slow.yml")
    assert execute(shlex.split(resume.partition(" && mergemill ")[2])) == 0
    assert 0 < attach(tmp_path / "out", wait_s=WAIT_S).redone_parts <= left.parts - left.parts_done
    check_bytes(tmp_path, recipe)


def test_the_driver_is_told_of_the_device(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cuda", "--device-memory", "8GiB"]
    cluster = write_cluster(tmp_path, "slurm.yml").name
    assert execute(["submit", recipe.name, "out", "--cluster", cluster, *words, "--dry-run"]) == 0
    assert f" {' '.join(words)} &" in capsys.readouterr().out


def test_the_script_is_one_that_bash_can_read_and_stops_before_its_time(recipe: Path, tmp_path: Path) -> None:
    file = parse_cluster(write_cluster(tmp_path, "slurm.yml").read_text())
    more = {"cluster": "slurm", "arguments": ["--seed", "7"], "folder": tmp_path}
    script = make_job(load_recipe(recipe), "an out", file, **more).text
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = script.splitlines()
    for option in ("--requeue", "--signal=B:TERM@120", "--mem=512M", "--time=00:10:00", f"--partition={PARTITION}"):
        assert f"#SBATCH {option}" in lines
    assert "export TOLD=here" in lines
    assert any(line.endswith("'an out' --cluster slurm --seed 7 &") for line in lines)


def test_other_clusters_and_missing_programs_are_one_clear_error(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = load_recipe(recipe)
    local = parse_cluster("{kind: local, workers: 2}", name="local.yml")
    with pytest.raises(PlanError, match=r"^local\.yml: no driver is run .* kind local; submit takes slurm and kuber"):
        make_job(made, "out", local, cluster="local", folder=tmp_path)
    file = parse_cluster(write_cluster(tmp_path, "slurm.yml").read_text())
    job = make_job(made, "out", file, cluster="slurm", folder=tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"^sbatch: is not installed here; see --dry-run"):
        submit_job(job)


@pytest.mark.parametrize("url", ["s3://bucket/own.py", "https://host/own.py", "file://elsewhere/own.py"])
def test_methods_at_a_url_are_refused_before_anything_is_submitted(
    url: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["submit", str(recipe), "/out", "--cluster", "slurm", "--dry-run", "--methods", url]) == 2
    said, noted = capsys.readouterr()
    assert said == ""
    assert noted.count("\n") == 1
    assert url.removeprefix("file://elsewhere") in noted


def test_methods_at_a_file_url_are_the_file(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cluster", "slurm", "--dry-run", "--methods", f"file://{tmp_path}/own.py"]
    assert execute(["submit", str(recipe), "/out", *words]) == 0
    assert f"--methods {tmp_path}/own.py" in capsys.readouterr().out
