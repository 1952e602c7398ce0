"""An SSH server of its own for the tests: a real sshd on the loopback, with keys made for it, in a temporary folder."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from servers.processes import find_free_ports, start_on_free_ports, start_server

SETTINGS = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/client.pub
PidFile {folder}/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
"""
PRIVILEGES = Path("/run/sshd")  # which sshd wants to be there; Debian's service makes it


@dataclass(frozen=True, slots=True)
class Ssh:
    """An SSH server that runs, for the user of the tests."""

    folder: Path
    port: int

    @property
    def options(self) -> dict[str, object]:
        """How asyncssh connects to it."""
        key, known = str(self.folder / "client"), str(self.folder / "known_hosts")
        return {"port": self.port, "username": "root", "client_keys": [key], "known_hosts": known}


def find_skip_reason() -> str | None:
    """Return why sshd cannot run here, or None where it can."""
    missing = [program for program in ("sshd", "ssh-keygen") if _find(program) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install openssh-server"
    if find_spec("asyncssh") is None:
        return "asyncssh is not installed: pip install mergemill[ssh]"
    return None if os.geteuid() == 0 else "sshd lets root alone log others in"


@contextlib.contextmanager
def start_ssh(folder: Path) -> Iterator[Ssh]:
    """Start sshd with a host key and one client's key; takes less than a second."""
    PRIVILEGES.mkdir(mode=0o755, exist_ok=True)
    for name in ("host", "client"):
        command = [_find("ssh-keygen") or "", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    with start_on_free_ports(lambda: _start_once(folder)) as ssh:
        yield ssh


@contextlib.contextmanager
def _start_once(folder: Path) -> Iterator[Ssh]:
    (port,) = find_free_ports(1)
    (folder / "sshd_config").write_text(SETTINGS.format(folder=folder, port=port))
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as found:
            return found.recv(4) == b"SSH-"
        return False

    command = [_find("sshd") or "", "-D", "-e", "-f", str(folder / "sshd_config")]
    with start_server(command, folder / "sshd.out", answers):
        yield Ssh(folder, port)


def _find(program: str) -> str | None:
    """Return the path of a program, also where users do not look for it."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
