"""Fixtures that lend the servers to a test run: those of S3 start at their first use, once; a Hub for each test.

A conftest takes them over by importing their names. Where `CI` is set, a server that is missing fails the test.
"""

import os
from collections.abc import Iterator

import pytest
from servers import moto, seaweed
from servers import slurm as slurms
from servers import ssh as sshs
from servers.hub import Hub, start_hub
from servers.s3 import S3
from servers.slurm import Slurm
from servers.ssh import Ssh

BUCKET = "models"


@pytest.fixture(scope="session")
def seaweed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """SeaweedFS with the bucket `models`, on the temporary disk."""
    _need(seaweed.find_skip_reason())
    with seaweed.start_seaweed(tmp_path_factory.mktemp("seaweed"), BUCKET) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """moto with the bucket `models`, in memory."""
    _need(moto.find_skip_reason())
    with moto.start_moto(tmp_path_factory.mktemp("moto"), BUCKET) as server:
        yield server


@pytest.fixture(scope="session", params=["seaweed", "moto"])
def s3_server(request: pytest.FixtureRequest) -> S3:
    """SeaweedFS and then moto: the test runs on both."""
    server: S3 = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub of this test's own, without repositories."""
    with start_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="session")
def slurm_server() -> Iterator[Slurm]:
    """SLURM with one node and the queue `normal`."""
    _need(slurms.find_skip_reason())
    with slurms.start_slurm() as running:
        yield running


@pytest.fixture
def slurm(slurm_server: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """SLURM, found by the programs of this process through the environment; it is left without jobs."""
    for name, value in slurm_server.make_environ().items():
        monkeypatch.setenv(name, value)
    yield slurm_server
    slurm_server.cancel_all()


@pytest.fixture(scope="session")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    """An SSH server that lets root in by a key."""
    _need(sshs.find_skip_reason())
    with sshs.start_ssh(tmp_path_factory.mktemp("ssh")) as running:
        yield running


def _need(missing: str | None) -> None:
    """Skip, or in CI fail, the test that needs what is missing."""
    if missing and os.environ.get("CI"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
