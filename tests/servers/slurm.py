"""A SLURM of its own for the tests: a real controller, one real node and munge, on the loopback, in a temporary folder.

Debian's `slurm-wlm` and `munge` have the programs; they are installed by nobody here, and run as root only.
"""

import contextlib
import functools
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from servers.processes import find_free_ports, start_on_free_ports, start_server

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue", "sinfo")
PARTITION = "normal"
CPUS = 16  # that the node claims to have: jobs of tests share what is there
WAIT_S = 60

SETTINGS = """\
ClusterName=mergemill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=64000 State=UNKNOWN
PartitionName={partition} Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, slots=True)
class Slurm:
    """A SLURM that runs; its queue is called `normal`."""

    folder: Path

    def make_environ(self) -> dict[str, str]:
        """Return the variables by which SLURM's programs find it."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *command: str) -> str:
        """Return what a program of SLURM's prints."""
        environ = os.environ | self.make_environ()
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=WAIT_S).stdout

    def list_jobs(self) -> dict[str, str]:
        """Return the state of every job that is not over, by number, such as ``RUNNING``."""
        lines = self.call("squeue", "--noheader", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def cancel_all(self) -> None:
        """Cancel all jobs, and wait until they are over."""
        deadline = time.monotonic() + WAIT_S
        while jobs := self.list_jobs():
            assert time.monotonic() < deadline, f"jobs go on: {jobs}"
            self.call("scancel", *jobs)
            time.sleep(0.2)


def find_skip_reason() -> str | None:
    """Return why SLURM cannot run here, or None where it can."""
    missing = [program for program in PROGRAMS if _find(program) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "SLURM's node runs as root only"


@contextlib.contextmanager
def start_slurm() -> Iterator[Slurm]:
    """Start munge, a controller and a node; takes 2 s. When the block ends, no job is left."""
    with start_on_free_ports(_start_once) as slurm:
        yield slurm


@contextlib.contextmanager
def _start_once() -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:  # a short path: sockets have no long ones
        folder = Path(name)
        ctld_port, slurmd_port = find_free_ports(2)
        host = socket.gethostname().partition(".")[0]
        words = {"host": host, "folder": folder, "cpus": CPUS, "partition": PARTITION}
        settings = SETTINGS.format(ctld_port=ctld_port, slurmd_port=slurmd_port, **words)
        (folder / "slurm.conf").write_text(settings)
        for below in ("state", "spool"):
            (folder / below).mkdir()
        slurm = Slurm(folder)
        with _start_munge(folder), _start_daemons(slurm, host):
            try:
                yield slurm
            finally:
                slurm.cancel_all()


@contextlib.contextmanager
def _start_munge(folder: Path) -> Iterator[None]:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    places = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
    options = [f"--{option}={folder / place}" for option, place in places.items()]
    command = [_need("munged"), "--foreground", "--force", f"--key-file={key}", *options]
    with start_server(command, folder / "munged.out", (folder / "munge.socket").exists):
        yield


@contextlib.contextmanager
def _start_daemons(slurm: Slurm, host: str) -> Iterator[None]:
    conf = str(slurm.folder / "slurm.conf")
    controller = [_need("slurmctld"), "-D", "-f", conf]
    node = [_need("slurmd"), "-D", "-f", conf, "-N", host]
    answers = functools.partial(_prints, slurm, "PartitionName", "scontrol", "show", "partition")
    is_idle = functools.partial(_prints, slurm, "idle", "sinfo", "--noheader", "--format=%T")
    with (
        start_server(controller, slurm.folder / "slurmctld.out", answers),
        start_server(node, slurm.folder / "slurmd.out", is_idle),
    ):
        yield


def _prints(slurm: Slurm, word: str, *command: str) -> bool:
    """Return whether a program succeeds and prints `word`."""
    try:
        return word in slurm.call(*command)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False


def _find(program: str) -> str | None:
    """Return the path of a program, also where users do not look for it."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _need(program: str) -> str:
    found = _find(program)
    assert found, find_skip_reason()
    return found
