"""Fixtures that several rooms share."""

import one_blas_thread  # noqa: F401  # isort: skip
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

    return make_smollm2(tmp_path_factory.mktemp("smollm2") / "instruct")


@pytest.fixture(scope="session")
def smollm2_variants(smollm2: Path) -> tuple[Path, Path]:
    """Two fine-tunes of `smollm2`; takes half a minute. Not to be changed."""
    from smollm2 import GARDEN, HARBOUR, make_variant

    harbour = make_variant(smollm2, smollm2.with_name("harbour"), HARBOUR)
    return harbour, make_variant(smollm2, smollm2.with_name("garden"), GARDEN, seed=1)


@pytest.fixture
def mergekit() -> Callable[..., dict[str, torch.Tensor]]:
    """`run_mergekit`, or a skip that says what is missing."""
    if reason := find_skip_reason():
        pytest.skip(reason)
    return run_mergekit
