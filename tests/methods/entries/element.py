"""The suite's entries of the methods that look at each element by itself."""

from collections.abc import Sequence

import numpy as np
import oracles
from methods.entry import Entry, Expected, as_arrays, certain, doubt_signs, make_deltas, take_arguments
from methods.harness import Task
from oracles import Array, Bools, element


def expect_expo(task: Task) -> Expected:
    return certain(element.expo(as_arrays(task)[0], make_deltas(task), **task.settings))


def expect_magmax(task: Task) -> Expected:
    return certain(element.magmax(as_arrays(task)[0], make_deltas(task), **take_arguments(task.settings)))


def expect_nearswap(task: Task) -> Expected:
    return certain(element.nearswap(*as_arrays(task), **task.settings))


def expect_ram(task: Task) -> Expected:
    deltas = make_deltas(task)
    return Expected(element.ram(as_arrays(task)[0], deltas, **task.settings), doubt_changes(task, deltas))


def expect_ramplus_tl(task: Task) -> Expected:
    deltas = make_deltas(task)
    return Expected(element.ramplus_tl(as_arrays(task)[0], deltas, **task.settings), doubt_changes(task, deltas))


def doubt_changes(task: Task, deltas: Sequence[Array]) -> Bools:
    """Return where a delta is as large as epsilon but for rounding."""
    epsilon = task.settings["epsilon"]
    return np.asarray(np.any([np.abs(np.abs(d) - epsilon) <= 1e-7 * epsilon for d in deltas], axis=0))


def expect_consensus_ta(task: Task) -> Expected:
    deltas = make_deltas(task)
    merged = element.merge_linearly(deltas, weight=task.settings["weight"])
    return expect_consensus(task, merged, deltas)


def expect_consensus_ties(task: Task) -> Expected:
    deltas = make_deltas(task)
    kept = ("lambda_mask", "k", "lambda")
    merged = element.merge_by_ties(deltas, **take_arguments(task.settings, *kept))
    masks = [oracles.find_largest(x, share) for x, share in zip(deltas, task.settings["density"], strict=True)]
    certainly = expect_consensus(task, merged, deltas)
    return Expected(certainly.values, certainly.doubtful | doubt_signs(task, deltas, masks))


def expect_consensus(task: Task, merged: Array, deltas: Sequence[Array]) -> Expected:
    """Return the consensus; doubtful where a model's two sides are equal but for rounding."""
    settings = take_arguments(task.settings, "weight", "density", "normalize", "rescale")
    values = element.consensus(as_arrays(task)[0], merged, deltas, **settings)
    gaps = [
        np.abs(np.abs(d) - factor * np.abs(merged - d)) - 1e-6 * (np.abs(d) + factor * np.abs(merged))
        for d, factor in zip(deltas, settings["lambda_mask"], strict=True)
    ]
    return Expected(values, (np.array(gaps) < 0).any(0))


def expect_emr(task: Task) -> Expected:
    """The elected direction, doubtful where the deltas cancel but for rounding."""
    deltas = make_deltas(task)
    values = element.emr(as_arrays(task)[0], deltas, **take_arguments(task.settings))
    apart, together = np.sum(np.abs(deltas), axis=0), np.abs(np.sum(deltas, axis=0))
    return Expected(values, np.asarray((together < 1e-6 * apart) & (apart > 0)))


def expect_negmerge(task: Task) -> Expected:
    return certain(element.negmerge(as_arrays(task)[0], make_deltas(task), **take_arguments(task.settings)))


def expect_localize_stitch(task: Task) -> Expected:
    return certain(element.localize_stitch(as_arrays(task)[0], make_deltas(task), **take_arguments(task.settings)))


def expect_cabs(task: Task) -> Expected:
    return certain(element.cabs(as_arrays(task)[0], make_deltas(task), **take_arguments(task.settings)))


def expect_widen(task: Task) -> Expected:
    """The formula, doubtful where an element's magnitude is the threshold but for rounding."""
    deltas = make_deltas(task)
    values = element.widen(as_arrays(task)[0], deltas, **take_arguments(task.settings))
    if values.ndim == 2:
        return certain(values)
    edges = [task.settings["ratio"] * np.mean(np.abs(delta)) for delta in deltas]
    near = [np.abs(np.abs(d) - edge) <= 1e-12 * edge for d, edge in zip(deltas, edges, strict=True)]
    return Expected(values, np.asarray(np.any(near, axis=0) & (values.size > 3001)))


THREE = (1.0, 0.6, 0.3)
TIES = {"weight": THREE, "density": (0.5, 0.3, 0.9)}
ENTRIES: dict[str, Entry] = {
    "expo": Entry(
        models=3,
        variants=({"weight": (1.5, 0.4, 0.3)}, {"weight": (1.0, -0.5, 0.0)}, {"weight": (0.0, 0.0, 0.0)}),
        oracle=expect_expo,
        symmetric=True,
        equal={"weight": (0.5, 0.2, 0.3)},
    ),
    "magmax": Entry(
        models=3,
        variants=({}, {"lambda": 1.0}, {"lambda": 0.0}, {"lambda": -1.3}),
        oracle=expect_magmax,
        symmetric=False,
        equal={"lambda": 1.0},
    ),
    "nearswap": Entry(
        models=1,
        variants=({"t": 0.05}, {"t": 0.0}, {"t": 1e-7}, {"t": 1e9}, {"t": -0.1}),
        oracle=expect_nearswap,
        symmetric=False,
        equal={"t": 1e30},
    ),
    "ram": Entry(
        models=3,
        variants=({"epsilon": 0.1}, {}, {"epsilon": 0.0}, {"epsilon": 1e9}),
        oracle=expect_ram,
        symmetric=True,
        equal={"epsilon": 0.0},
    ),
    "ramplus_tl": Entry(
        models=3,
        variants=(
            {"epsilon": 0.2, "r": 0.5, "alpha": 3.0},
            {"epsilon": 0.1, "r": 0.5, "alpha": 0.3},
            {},
            {"epsilon": 0.0, "r": -1.0, "alpha": 10.0},
            {"epsilon": 0.2, "r": 1.0, "alpha": 100.0},
        ),
        oracle=expect_ramplus_tl,
        symmetric=True,
        equal={"epsilon": 0.0},
    ),
    "consensus_ta": Entry(
        models=3,
        variants=(
            {"weight": THREE},
            {"weight": THREE, "lambda_mask": (0.3, 0.9, 1.7), "k": 1, "lambda": 0.7},
            {"weight": (1.0, -0.5, 0.2), "k": 3},
            {"weight": THREE, "k": 0},
            {"weight": THREE, "k": 4},
            {"weight": THREE, "lambda_mask": (0.0, 0.0, 0.0), "lambda": -0.4},
        ),
        oracle=expect_consensus_ta,
        symmetric=True,
        equal={"weight": (0.5, 0.2, 0.3)},
    ),
    "consensus_ties": Entry(
        models=3,
        variants=(
            TIES,
            {**TIES, "lambda_mask": (0.3, 0.9, 1.7), "k": 1, "lambda": 0.7},
            {**TIES, "normalize": False, "rescale": True},
            {"weight": (1.0, -0.5, 0.2), "density": (1.0, 0.4, 0.0), "k": 3},
            {"weight": THREE, "k": 0},
            {"weight": THREE, "k": 4},
        ),
        oracle=expect_consensus_ties,
        symmetric=True,
        equal={"weight": (0.5, 0.2, 0.3)},
    ),
    "emr": Entry(
        models=3,
        variants=({}, {"lambda": 0.4}, {"lambda": -1.3}),
        oracle=expect_emr,
        symmetric=True,
        equal={},
    ),
    "negmerge": Entry(
        models=3,
        variants=({}, {"lambda": 0.4}, {"lambda": -1.3}),
        oracle=expect_negmerge,
        symmetric=True,
        equal={"lambda": -1.0},
    ),
    "localize_stitch": Entry(
        models=3,
        variants=(
            {},
            {"density": (0.5, 0.3, 0.9), "lambda": 0.7},
            {"density": (1.0, 0.4, 0.0)},
            {"density": (1e-9, 1e-4, 1e-3), "lambda": -0.5},
        ),
        oracle=expect_localize_stitch,
        symmetric=True,
        equal={"density": (1.0, 1.0, 1.0)},
    ),
    "cabs": Entry(
        models=3,
        variants=(
            {"weight": THREE},
            {"weight": THREE, "n": 3, "m": 10, "lambda": 0.7},
            {"weight": (1.0, -0.5, 0.0), "n": 16, "m": 16},
            {"weight": THREE, "n": 0, "m": 7},
        ),
        oracle=expect_cabs,
        symmetric=False,
        equal={"n": 256, "m": 256},
    ),
    "widen": Entry(
        models=3,
        variants=({}, {"ratio": 0.5, "calibration": 0.7}, {"ratio": 3.0}),
        oracle=expect_widen,
        symmetric=True,
    ),
}
