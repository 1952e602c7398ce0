"""A script: merge one matrix with each matrix method and print, as JSON, what it took beside its inputs, in bytes.

Run as ``python measure_matrix.py FOLDER ROWS COLUMNS DTYPE MODELS``, with FOLDER for scratch files.
"""

import ctypes
import dataclasses
import json
import mmap
import sys
from pathlib import Path

import numpy as np
import torch
from methods.harness import Mill, Task, fill_settings, make_values

from mergemill.engine.methods.catalogue import get_method, get_step
from mergemill.engine.methods.steps import Stepped
from mergemill.engine.runs.worker.process import keep_freed_pages
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.rounds import finish_rounds
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace


def express(mill: Mill, name: str, shape: tuple[int, int], dtype: torch.dtype, models: int) -> Merged:
    """Return the merge of matrices; of "svc", after task arithmetic."""
    method = get_method("task_arithmetic" if name == "svc" else name)
    given = {"weight": (1.0,) * models} if name == "svc" else {}
    inputs = tuple(make_values(shape, dtype=dtype, count=models + 1))
    expression = mill.express(Task(method.name, inputs, fill_settings(method, given, models)))
    if name != "svc":
        return expression
    kernel = Stepped(method, ((get_step("svc"), {"alpha": 1.0}),))
    place = expression.place._replace(block=kernel.block(shape, expression.settings))
    return dataclasses.replace(expression, kernel=kernel, place=place)


def measure(expression: Merged) -> dict[str, int]:
    """Return what the kernel allocated at most, and what it promised."""
    size, kernel = expression.place.size, expression.kernel
    ready = finish_rounds(expression.rounds(), (), lambda asked: ())  # none of them gathers anything
    room = sum(source.slab_bytes(size, expression.dtype) for source in expression.inputs)
    arena = np.frombuffer(mmap.mmap(-1, room), np.uint8)
    arena.fill(0)
    ctypes.CDLL(None).malloc_trim(0)  # pages freed by an earlier method would hide what this one takes
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    ready.slab(Span(0, size), Workspace(arena), expression.dtype)
    promised = (kernel.extra_slabs + kernel.extra_slabs_each * len(expression.inputs)) * size * 8
    return {"took": read_status("VmHWM") - before, "promised": promised}


def read_status(key: str) -> int:
    """Return a size that the kernel keeps of this process, in bytes."""
    (found,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(found.split()[1]) << 10


def main(folder: Path, shape: tuple[int, int], dtype: torch.dtype, models: int) -> None:
    """Print the bytes of every method by name."""
    torch.set_num_threads(1)
    keep_freed_pages()  # as a worker does
    mill = Mill(folder)
    found = {}
    for name in ("wudi", "iso_c", "svc", "cart", "star", "tsv", "iso_cts", "dc_merge", "orthomerge"):
        measure(express(mill, name, (60, 90), dtype, models))
        found[name] = measure(express(mill, name, shape, dtype, models))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3])), getattr(torch, sys.argv[4]), int(sys.argv[5]))
