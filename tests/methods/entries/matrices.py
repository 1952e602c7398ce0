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


def expect_iso_cts(task: Task) -> Expected:
    arguments = take_arguments(task.settings)
    return certain(matrices.iso_cts(as_arrays(task)[0], make_deltas(task), eps=find_eps(task), **arguments))


def expect_star(task: Task) -> Expected:
    arguments = take_arguments(task.settings)
    return certain(matrices.star(as_arrays(task)[0], make_deltas(task), eps=find_eps(task), **arguments))


def expect_cart(task: Task) -> Expected:
    return certain(matrices.cart(as_arrays(task), **take_arguments(task.settings)))


def expect_dc_merge(task: Task) -> Expected:
    arguments = take_arguments(task.settings)
    return certain(matrices.dc_merge(as_arrays(task)[0], make_deltas(task), eps=find_eps(task), **arguments))


def expect_orthomerge(task: Task) -> Expected:
    return certain(matrices.orthomerge(as_arrays(task)[0], make_deltas(task), **take_arguments(task.settings)))


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
    "iso_cts": Entry(
        models=3,
        variants=({}, {"common": 0.0, "lambda": 0.4}, {"common": 1.0}),
        oracle=expect_iso_cts,
        symmetric=True,
        wide_rounding=5e-14,  # what joins nearly dependent directions is less exact in float64
        everywhere=False,
    ),
    "star": Entry(
        models=3,
        variants=({}, {"eta": 0.1, "lambda": 0.4}, {"eta": 1.0, "lambda": -0.7}),
        oracle=expect_star,
        symmetric=True,
        equal={"eta": 1.0},
        wide_rounding=5e-14,  # a truncated spectrum is scaled up, with its rounding
        everywhere=False,
    ),
    "cart": Entry(
        models=3,
        variants=({}, {"rank": 0.3, "lambda": -0.5}, {"rank": 1.0}),
        oracle=expect_cart,
        symmetric=True,
        equal={},
        everywhere=False,
    ),
    "dc_merge": Entry(
        models=3,
        variants=({}, {"density": 0.2, "lambda": 0.4}, {"density": 1.0}),
        oracle=expect_dc_merge,
        symmetric=True,
        wide_rounding=5e-14,  # as that of Iso-CTS
        everywhere=False,
    ),
    "orthomerge": Entry(
        models=3,
        variants=({}, {"lambda": 1.0}, {"lambda": -0.5}),
        oracle=expect_orthomerge,
        symmetric=True,
        wide_rounding=1e-12,  # random models are turned by nearly half a turn: large Cayley transforms
        everywhere=False,
    ),
}
