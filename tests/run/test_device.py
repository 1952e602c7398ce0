"""Merging on a device, one that is simulated: the same bytes as the CPU, within a promise of memory."""

from pathlib import Path

import pytest
import torch
from methods.harness import Mill, bits_of, make_values
from methods.suite import ENTRIES, make_task
from simulated import SimulatedPlace, whole_matrices_too

from mergemill.engine.methods.catalogue import find_methods
from mergemill.engine.run.workplace import Workplace
from mergemill.engine.tensors.slabs import BLOCK

METHODS = tuple(name for name, method in find_methods().items() if method.reads != "matrix")
SMALL = (37, 29)
WAYS = ((BLOCK, 1, True), (BLOCK, 2, False))  # slab, parts, whether inputs are kept
KINDS = (
    (torch.float32, (2 * BLOCK + 4099,), "BF16"),
    (torch.bfloat16, (BLOCK + 4099,), None),
    (torch.float16, SMALL, "F16"),
    (torch.float64, (700, 99), "F64"),
    (torch.float8_e4m3fn, (300, 7), "F8_E4M3"),
    (torch.float32, (0, 5), "F32"),
    (torch.float32, (1,), "F32"),
    (torch.float32, (), "F32"),
)


def mills(folder: Path) -> tuple[Mill, Mill]:
    """Return one that merges on the CPU and one that merges on a device."""
    here, there = Mill(folder), Mill(folder)
    for workplace in (there._keeping, there._streaming):
        workplace.device = SimulatedPlace(1 << 30, 1)
    return here, there


@pytest.mark.parametrize("name", METHODS)
def test_a_device_gives_the_bytes_of_the_cpu(name: str, tmp_path: Path) -> None:
    here, there = mills(tmp_path)
    for kind, shape, out in KINDS:
        for variant in ENTRIES[name].variants if shape == SMALL else (None,):
            task = make_task(name, make_values(shape, dtype=kind), variant)
            expected = bits_of(here.merge(task, out=out))
            for slab, parts, keep in WAYS[: 1 if len(shape) == 2 else 2]:
                merged = there.merge(task, out=out, slab=slab, parts=parts, keep=keep)
                assert bits_of(merged) == expected, (kind, shape, out, variant, slab, parts, keep)
