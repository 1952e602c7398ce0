"""A cluster that talks TLS: the same bytes, and who has no certificate of its authority is refused."""

import dataclasses
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import dask
import pytest
from clusters import Foreign, start_cluster
from runs.merging import hash_output, plan_merge

from mergemill.engine import run
from mergemill.engine.errors import ClusterError

SCRIPT = Path(__file__).parents[2] / "deploy" / "tls" / "make_certificates.sh"
TLS = "distributed.comm.tls"

if shutil.which("openssl") is None and not os.environ.get("CI"):
    pytest.skip("openssl is not installed", allow_module_level=True)


@dataclasses.dataclass(frozen=True)
class Secured:
    """A cluster that talks TLS, and the folder of its certificates."""

    cluster: Foreign
    folder: Path


def make_certificates(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the script of deploy/."""
    return subprocess.run([SCRIPT, folder, *more], capture_output=True, text=True, check=False)


def client_of(folder: Path, authority: Path | None = None) -> Mapping[str, str]:
    """Return the settings of a client with the certificates of a folder."""
    return {
        f"{TLS}.ca-file": str((authority or folder) / "ca.pem"),
        f"{TLS}.client.cert": str(folder / "client.pem"),
        f"{TLS}.client.key": str(folder / "client-key.pem"),
    }


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Scheduler and workers as processes, told of TLS by the file that the script wrote."""
    folder = tmp_path_factory.mktemp("tls")
    done = make_certificates(folder / "certificates")
    assert done.returncode == 0, done.stderr
    config = {"DASK_CONFIG": str(folder / "certificates" / "dask.yaml")}
    with (
        dask.config.set(client_of(folder / "certificates")),
        start_cluster(folder, environ=config) as cluster,
    ):
        yield Secured(cluster, folder / "certificates")


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of another authority."""
    folder = tmp_path_factory.mktemp("another") / "certificates"
    assert make_certificates(folder, "30").returncode == 0
    return folder


def test_a_merge_over_tls_has_the_same_bytes(secured: Secured, family: Path, tmp_path: Path) -> None:
    plan = plan_merge("ties", family)
    run(plan, tmp_path / "here", workers=0, threads=1)
    assert secured.cluster.address.startswith("tls://127.0.0.1:")
    with dask.config.set(client_of(secured.folder)):
        run(plan, tmp_path / "address", scheduler=secured.cluster.address, memory="64MiB")
        run(plan, tmp_path / "file", scheduler=str(secured.cluster.file), memory="64MiB")
    assert hash_output(tmp_path / "address") == hash_output(tmp_path / "file") == hash_output(tmp_path / "here")


def refuse(secured: Secured, family: Path, out: Path, address: str | None = None) -> str:
    """Return the one line that a merge is refused with; nothing was written."""
    with pytest.raises(ClusterError) as error:
        run(plan_merge("linear", family), out, scheduler=address or secured.cluster.address, memory="64MiB")
    assert not out.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_plain_client_is_refused(secured: Secured, family: Path, tmp_path: Path) -> None:
    address = secured.cluster.address.replace("tls://", "tcp://")
    text = refuse(secured, family, tmp_path / "out", address)
    assert text.startswith(f"{address}: the connection was closed at once; a scheduler that talks TLS is tls://…")


def test_a_client_that_trusts_another_authority_is_refused(
    secured: Secured, another: Path, family: Path, tmp_path: Path
) -> None:
    with dask.config.set(client_of(another)):
        text = refuse(secured, family, tmp_path / "out")
    assert "its certificate and the one of this client are not of one authority" in text
    assert f"CA_FILE={another / 'ca.pem'}" in text


def test_a_client_with_a_certificate_of_another_authority_is_refused(
    secured: Secured, another: Path, family: Path, tmp_path: Path
) -> None:
    """It trusts the scheduler, which does not trust it."""
    with dask.config.set(client_of(another, authority=secured.folder)):
        text = refuse(secured, family, tmp_path / "out")
    assert "its certificate and the one of this client are not of one authority" in text


@pytest.mark.parametrize("by_file", [False, True])
def test_without_certificates_the_error_says_what_to_set(
    secured: Secured, family: Path, tmp_path: Path, by_file: bool
) -> None:
    scheduler = str(secured.cluster.file) if by_file else secured.cluster.address
    with dask.config.set({f"{TLS}.ca-file": None, f"{TLS}.client.cert": None, f"{TLS}.client.key": None}):
        text = refuse(secured, family, tmp_path / "out", scheduler)
    assert text == (
        f"{scheduler}: talks TLS, and Dask is told of no certificate here; "
        "set DASK_DISTRIBUTED__COMM__TLS__CA_FILE and DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT, "
        "and DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY (or DASK_CONFIG to a file with distributed.comm.tls)"
    )


def test_a_certificate_that_is_not_there_is_named(secured: Secured, family: Path, tmp_path: Path) -> None:
    with dask.config.set({**client_of(secured.folder), f"{TLS}.client.key": str(tmp_path / "gone.pem")}):
        text = refuse(secured, family, tmp_path / "out")
    assert f"{tmp_path}/gone.pem, which DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY names, cannot be read" in text


def test_keys_are_for_their_owner_alone(secured: Secured) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in secured.folder.iterdir()}
    assert {name for name in modes if name.endswith("-key.pem")} == {
        f"{role}-key.pem" for role in ("ca", "scheduler", "worker", "client")
    }
    assert {mode for name, mode in modes.items() if name.endswith("-key.pem")} == {0o600}
    assert stat.S_IMODE(secured.folder.stat().st_mode) == 0o700


def test_certificates_are_of_the_authority(secured: Secured) -> None:
    for role in ("scheduler", "worker", "client"):
        files = [secured.folder / "ca.pem", secured.folder / f"{role}.pem"]
        subprocess.run(["openssl", "verify", "-x509_strict", "-CAfile", *files], check=True, capture_output=True)


def test_certificates_are_never_overwritten(another: Path) -> None:
    before = {path: path.read_bytes() for path in another.iterdir()}
    done = make_certificates(another)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is there already; nothing was changed" in done.stderr
    assert {path: path.read_bytes() for path in another.iterdir()} == before
    assert list(another.parent.iterdir()) == [another]


@pytest.mark.parametrize("days", ["0", "-1", "soon"])
def test_days_that_are_none_are_refused(days: str, tmp_path: Path) -> None:
    done = make_certificates(tmp_path / "certificates", days)
    assert done.returncode == 2
    assert f"DAYS is '{days}'" in done.stderr
    assert list(tmp_path.iterdir()) == []
