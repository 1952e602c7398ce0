"""Hosts as network namespaces of this machine: a bridge, and a cable to each that can be cut.

Needs root and iproute2. They share the disk, as hosts share an NFS; addresses are only theirs. All names are new ones,
and all that was made is removed.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BRIDGE = "br0"  # in a namespace of its own


def find_skip_reason() -> str | None:
    """Return what is missing; None where namespaces can be made."""
    if shutil.which("ip") is None:
        return "needs `ip` of iproute2"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    name = f"mmtry{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "needs a kernel that makes network namespaces"
    run("netns", "del", name)
    return None


@dataclass(frozen=True)
class Host:
    """A host, and its cable to the bridge."""

    name: str
    address: str
    bridge: str  # the namespace of the bridge
    cable: str  # its end at the bridge

    @property
    def command(self) -> Sequence[str]:
        """What a command on this host begins with."""
        return ("ip", "netns", "exec", self.name)

    def cut(self) -> None:
        """Pull the cable."""
        run("-n", self.bridge, "link", "set", self.cable, "down")

    def heal(self) -> None:
        """Put the cable in again."""
        run("-n", self.bridge, "link", "set", self.cable, "up")


@contextlib.contextmanager
def make_hosts(count: int) -> Iterator[list[Host]]:
    """Make so many hosts that reach each other, and nothing else."""
    token = secrets.token_hex(3)
    bridge = f"mm{token}br"
    with contextlib.ExitStack() as stack:
        _add(stack, bridge)
        run("-n", bridge, "link", "add", BRIDGE, "type", "bridge")
        run("-n", bridge, "link", "set", BRIDGE, "up")
        hosts = [Host(f"mm{token}h{i}", f"10.77.0.{i + 1}", bridge, f"cable{i}") for i in range(count)]
        for host in hosts:
            _add(stack, host.name)
            run("-n", bridge, "link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            run("-n", bridge, "link", "set", host.cable, "master", BRIDGE, "up")
            run("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("-n", host.name, "link", "set", device, "up")
        yield hosts


def run(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _add(stack: contextlib.ExitStack, name: str) -> None:
    run("netns", "add", name)
    stack.callback(run, "netns", "del", name)  # with its cables
