"""TLS: one folder of Dask's configuration has the certificates and the settings of mergemill."""

import os
import shutil
import subprocess
from pathlib import Path

import dask
import pytest
import yaml
from deployments import DEPLOY


def test_certificates_and_settings_are_one_configuration(tmp_path: Path) -> None:
    if shutil.which("openssl") is None and not os.environ.get("CI"):
        pytest.skip("openssl is not installed")
    (tmp_path / "deploy").symlink_to(DEPLOY)
    text = (DEPLOY / "README.md").read_text().partition("\n## TLS\n")[2]
    lines = text.partition("```sh\n")[2].splitlines()[:2]
    assert [line.split()[0] for line in lines] == ["deploy/tls/make_certificates.sh", "cp"]
    subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=tmp_path, check=True, capture_output=True)
    found = dask.config.collect(paths=[str(tmp_path / "certificates")], env={})["distributed"]
    assert found["comm"].pop("tls")["ca-file"] == str(tmp_path / "certificates" / "ca.pem")
    assert found["comm"].pop("require-encryption")
    assert found["comm"].pop("default-scheme") == "tls"
    assert found == yaml.safe_load((DEPLOY / "dask" / "mergemill.yaml").read_text())["distributed"]
