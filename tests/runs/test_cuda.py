"""On a real GPU: the bytes of the CPU, within the promise. Skipped where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from methods.harness import Mill, bits_of, make_values
from methods.suite import ENTRIES, make_task
from models import read_tensors
from runs.merging import hash_output
from runs.test_device import KINDS, MATRIX_METHODS, METHODS, PROMISE, SMALL, plan_merge

from mergemill.engine import run
from mergemill.engine.runs.worker.accelerator import _BESIDE_BYTES, _SLACK, open_device
from mergemill.engine.tensors.slabs import BLOCK, SLAB

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


def make_mills(folder: Path) -> tuple[Mill, Mill]:
    """Return one that merges on the CPU and one that merges on the GPU."""
    here, there = Mill(folder), Mill(folder)
    for workplace in (there._keeping, there._streaming):
        workplace.device = open_device("cuda", PROMISE, 1)
    return here, there


@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_gives_the_bytes_of_the_cpu(name: str, tmp_path: Path) -> None:
    here, there = make_mills(tmp_path)
    for kind, shape, out in KINDS:
        for variant in ENTRIES[name].variants if shape == SMALL else (None,):
            task = make_task(name, make_values(shape, dtype=kind), variant)
            merged = there.merge(task, out=out, slab=BLOCK)
            assert bits_of(merged) == bits_of(here.merge(task, out=out)), (kind, shape, out, variant)


@pytest.mark.parametrize("name", ["linear", "model_stock", "ties"])
def test_lanes_are_used_again_while_others_are_on_their_way(name: str, tmp_path: Path) -> None:
    here, there = make_mills(tmp_path)
    task = make_task(name, make_values((20 * SLAB + 4099,)))
    torch.cuda.empty_cache()
    held_bytes = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    for out in ("BF16", "F32"):
        assert bits_of(there.merge(task, out=out, slab=SLAB, keep=False)) == bits_of(here.merge(task, out=out)), out
    place = there._streaming.device
    assert place is not None
    assert place.peak_bytes < 128 << 20  # 450 MiB would be all slabs at once
    assert torch.cuda.max_memory_reserved() - held_bytes <= _SLACK * place.peak_bytes + _BESIDE_BYTES


@pytest.mark.parametrize("name", MATRIX_METHODS)
def test_matrix_methods_on_a_gpu_are_within_the_stated_error(name: str, tmp_path: Path) -> None:
    here, there = make_mills(tmp_path)
    for shape in ((400, 240), (240, 400)):
        task = make_task(name, make_values(shape))
        torch.testing.assert_close(there.merge(task), here.merge(task), rtol=1e-5, atol=1e-6)


def test_a_merge_on_a_gpu_writes_the_same_files_within_its_promise(family: Path, tmp_path: Path) -> None:
    plan = plan_merge(family)
    run(plan, tmp_path / "cpu", workers=0, threads=2)
    torch.cuda.empty_cache()
    allocated_bytes, held_bytes = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for name in ("cuda", "again"):
        torch.cuda.reset_peak_memory_stats()
        run(plan, tmp_path / name, workers=0, threads=2, device="cuda", device_memory="256MiB")
        assert hash_output(tmp_path / name) == hash_output(tmp_path / "cpu")
        assert 0 < torch.cuda.max_memory_allocated() - allocated_bytes <= 256 << 20
        assert torch.cuda.max_memory_reserved() - held_bytes <= _SLACK * (256 << 20) + 2 * _BESIDE_BYTES


MERGE = """
import sys
from pathlib import Path

from runs.test_device import plan_merge

from mergemill.engine import run

family, out = map(Path, sys.argv[1:])
run(plan_merge(family, "tsv"), out, workers=0, threads=2, device="cuda")
"""


def test_two_threads_of_a_new_process_decompose_at_once(family: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MERGE, str(family), str(tmp_path / "cuda")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    run(plan_merge(family, "tsv"), tmp_path / "cpu", workers=0, threads=2)
    here, there = (read_tensors(tmp_path / name) for name in ("cpu", "cuda"))
    assert there.keys() == here.keys()
    for name, values in here.items():  # bfloat16: an ulp, where float32 differs in its last bits
        torch.testing.assert_close(there[name], values, rtol=1e-2, atol=1e-5)


def test_each_gpu_has_a_worker_process(family: Path, tmp_path: Path) -> None:
    plan = plan_merge(family)
    run(plan, tmp_path / "cpu", workers=0, threads=2)
    run(plan, tmp_path / "processes", workers=torch.cuda.device_count(), device="cuda")
    assert hash_output(tmp_path / "processes") == hash_output(tmp_path / "cpu")
