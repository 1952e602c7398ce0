"""The SLURM of the tests is a real one: it queues, runs and cancels, and listens on the loopback only."""

import time
from pathlib import Path

import psutil
from servers.slurm import PARTITION, Slurm


def test_a_job_runs_and_is_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/sh\necho $SLURM_JOB_ID > {tmp_path}/number\nexec sleep 60\n")
    number = slurm.call("sbatch", "--parsable", "-p", PARTITION, "-o", "/dev/null", str(script)).strip()
    deadline = time.monotonic() + 20
    while not (tmp_path / "number").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (tmp_path / "number").read_text().strip() == number
    assert slurm.list_jobs() == {number: "RUNNING"}
    slurm.cancel_all()
    assert slurm.list_jobs() == {}


def test_it_listens_on_the_loopback_only(slurm: Slurm) -> None:
    every = psutil.process_iter(["cmdline"])
    ours = [process for process in every if str(slurm.folder) in " ".join(process.info["cmdline"] or ())]
    assert {process.name() for process in ours} >= {"slurmctld", "slurmd", "munged"}
    heard = [each.laddr.ip for process in ours for each in process.net_connections("inet") if each.status == "LISTEN"]
    assert heard
    assert set(heard) == {"127.0.0.1"}
