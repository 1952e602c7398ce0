"""The suite's entries of the methods on whole matrices."""

import numpy as np
import torch
from methods.entry import Entry, Expected, as_arrays, certain, make_deltas, take_arguments
from methods.harness import Task
from oracles import matrices


def find_eps(task: Task) -> float:
    """Return the rounding of the dtype that the task is accumulated in."""
    wide = any(tensor.dtype == torch.float64 for tensor in task.inputs)
    return float(np.finfo(np.float64 if wide else np.float32).eps)


def expect_tsv(task: Task) -> Expected:
    arguments = take_arguments(task.settings)
    return certain(matrices.tsv(as_arrays(task)[0], make_deltas(task), eps=find_eps(task), **arguments))


def expect_iso_c(task: Task) -> Expected:
    arguments = take_arguments(task.settings)
    return certain(matrices.iso_c(as_arrays(task)[0], make_deltas(task), eps=find_eps(task), **arguments))


def expect_wudi(task: Task) -> Expected:
    return certain(matrices.wudi(as_arrays(task)[0], make_deltas(task), **take_arguments(task.settings)))


ENTRIES: dict[str, Entry] = {
    "tsv": Entry(
        models=3,
        variants=({}, {"lambda": 0.4}, {"lambda": -1.5}),
        oracle=expect_tsv,
        symmetric=True,
        everywhere=False,
    ),
    "iso_c": Entry(
        models=3,
        variants=({}, {"lambda": 0.4}, {"lambda": -1.5}),
        oracle=expect_iso_c,
        symmetric=True,
        everywhere=False,
    ),
    "wudi": Entry(
        models=3,
        variants=({}, {"ridge": 0.1}, {"ridge": 1e-8, "lambda": 0.4}),
        oracle=expect_wudi,
        symmetric=True,
        everywhere=False,
    ),
}
