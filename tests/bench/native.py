"""The native loops against the torch operations that they stand for: ns an element on slabs in cache, one thread.

Run as ``python tests/bench/native.py``; each figure is the least of many calls.
"""

import sys
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from mergemill.engine.methods.linear import linear
from mergemill.engine.methods.task_vectors import add_agreeing_deltas, add_deltas
from mergemill.engine.methods.trim import Trim, apply_trims
from mergemill.engine.tensors import native
from mergemill.engine.tensors.cut import Cut
from mergemill.engine.tensors.digits import Digits
from mergemill.engine.tensors.exact import sum_absolute, sum_products
from mergemill.engine.tensors.histograms import search_keys
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.random import drop_with_probability
from mergemill.engine.tensors.select import magnitudes
from mergemill.engine.tensors.slabs import SLAB

CALLS = 100
PLACE = Place("tensor", (SLAB,), 0, (0,))

Slabs = list[Tensor]
LOOPS: dict[str, Callable[[Slabs], object]] = {
    "weighted mean of two": lambda x: linear(x[:2], weight=(0.5, 0.3)),
    "base + two task vectors": lambda x: add_deltas(x[0], x[1:], (0.5, 0.3), lambda_=1.0, normalize=False),
    "base + two, signs elected": lambda x: add_agreeing_deltas(x[0], x[1:], (0.5, 0.3), lambda_=1.0, normalize=True),
    "trim to a threshold": lambda x: apply_trims(x[:1], [Trim(Cut(0.5, 0, 0, 9, 0), 1.0)], PLACE),
    "random mask": lambda x: drop_with_probability(x[0], PLACE, 0, 0.5),
    "histogram of a select": lambda x: next(search_keys([(9,)], Digits("F32", False), magnitudes))(x[:1], PLACE),
    "exact sum of |x|": lambda x: sum_absolute(x[0]),
    "exact inner product": lambda x: sum_products(x[0], x[1]),
}


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    sys.stdout.write("| loop | native ns | torch ns |\n|---|---|---|\n")
    for name, loop in LOOPS.items():
        ours = measure(loop)
        with patch.object(native, "load", lambda: None):
            theirs = measure(loop)
        sys.stdout.write(f"| {name} | {ours:.2f} | {theirs:.2f} |\n")


def measure(loop: Callable[[Slabs], object]) -> float:
    """Return ns an element; the slabs are overwritten, and filled again between the calls."""
    source = [torch.randn(SLAB, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    slabs = [tensor.clone() for tensor in source]
    taken_s = []
    for _ in range(CALLS):
        for slab, tensor in zip(slabs, source, strict=True):
            slab.copy_(tensor)
        started = time.perf_counter()
        loop(slabs)
        taken_s.append(time.perf_counter() - started)
    return min(taken_s) / SLAB * 1e9


if __name__ == "__main__":
    main()
