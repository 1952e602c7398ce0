"""Fixtures that several rooms share."""

import one_blas_thread  # noqa: F401  # isort: skip
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from reference.mergekit import find_skip_reason, run_mergekit
from servers.fixtures import hub, moto_server, s3_server, seaweed_server, slurm, slurm_server, ssh

__all__ = [
    "hub",
    "moto_server",
    "s3_server",
    "seaweed_server",
    "slurm",
    "slurm_server",
    "ssh",
]  # fixtures that are imported

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that the last of several processes does not end long after the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a bfloat16 checkpoint; takes a quarter of a minute. Not to be changed."""
    from smollm2 import make_smollm2

    return make_once(tmp_path_factory, "smollm2/instruct", make_smollm2)


@pytest.fixture(scope="session")
def smollm2_variants(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two fine-tunes of `smollm2`; takes half a minute. Not to be changed."""
    from smollm2 import GARDEN, HARBOUR, make_variant

    return (
        make_once(tmp_path_factory, "smollm2/harbour", lambda folder: make_variant(smollm2, folder, HARBOUR)),
        make_once(tmp_path_factory, "smollm2/garden", lambda folder: make_variant(smollm2, folder, GARDEN, seed=1)),
    )


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder of all the processes of a run of tests that the first of them to need it has made."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            making = folder.with_name(f"{folder.name}.making")
            make(making)
            making.rename(folder)
    return folder


@pytest.fixture
def mergekit() -> Callable[..., dict[str, torch.Tensor]]:
    """`run_mergekit`, or a skip that says what is missing."""
    if reason := find_skip_reason():
        pytest.skip(reason)
    return run_mergekit
