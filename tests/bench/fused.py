"""Whole merges of one bfloat16 tensor, all passes, from the page cache: fused native loops against torch, one thread.

Run as ``PYTHONPATH=tests python tests/bench/fused.py``; ns an output element, the least of several merges.
"""

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from methods.harness import Mill, Task, fill_settings, make_values

from mergemill.engine.conformance.mill import cut_pieces
from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.plan.values import OutputTensor, Part
from mergemill.engine.runs.tasks.task import merge_part
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.tensors import native

SHAPE = (2048, 4096)
MERGES = 3
HALF = {"weight": (0.5, 0.5), "density": (0.5, 0.5)}
METHODS: dict[str, Mapping[str, Any]] = {
    "linear": {"weight": (0.5, 0.5)},
    "slerp": {"t": 0.4},
    "task_arithmetic": {"weight": (0.5, 0.5)},
    "ties": HALF,
    "dare_ties": HALF,
    "della": HALF,
    "breadcrumbs": HALF,
    "sce": {"select_topk": 0.5},
}


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    sys.stdout.write("| method | fused ns | torch ns |\n|---|---|---|\n")
    with tempfile.TemporaryDirectory() as folder:
        for name in METHODS:
            fused = measure(name, Path(folder))
            with patch.object(native, "load", lambda: None):
                plain = measure(name, Path(folder))
            sys.stdout.write(f"| {name} | {fused:.1f} | {plain:.1f} |\n")


def measure(name: str, folder: Path) -> float:
    """Return ns an element of the output."""
    method, mill = get_method(name), Mill(folder)
    inputs = make_values(SHAPE, dtype=torch.bfloat16, count=3 if method.takes_deltas else 2)
    expression = mill.express(Task(name, tuple(inputs), fill_settings(method, METHODS[name], 2)))
    (piece,) = cut_pieces(OutputTensor("tensor", "BF16", expression), parts=1)
    part = Part(0, 0, 0, 2 * piece.span.size, (piece,))
    workplace = Workplace(1 << 30, threads=1)
    taken_s = []
    for _ in range(MERGES):
        started = time.perf_counter()
        merge_part(part, "shard", lambda offset, data: None, {}, workplace)
        taken_s.append(time.perf_counter() - started)
    return min(taken_s) / inputs[0].numel() * 1e9


if __name__ == "__main__":
    main()
