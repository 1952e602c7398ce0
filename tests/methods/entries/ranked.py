"""The suite's entries of the methods that rank elements."""

from functools import partial
from typing import Any

import numpy as np
import oracles
import torch
from methods.entry import Entry, Expected, as_arrays, certain, doubt_signs, make_deltas, take_arguments
from methods.harness import Task
from oracles import Bools, ranked
from tensors.masks import random_mask

WEIGHTS = (1.0, 0.6, 0.3)


def expect_breadcrumbs(task: Task, *, consensus: bool) -> Expected:
    deltas, settings = make_deltas(task), task.settings
    values = ranked.breadcrumbs(as_arrays(task)[0], deltas, consensus=consensus, **take_arguments(settings))
    if not consensus:
        return certain(values)
    chosen = zip(deltas, settings["density"], settings["gamma"], strict=True)
    return Expected(values, doubt_signs(task, deltas, [ranked.find_inner(*each) for each in chosen]))


def expect_sce(task: Task) -> Expected:
    deltas = make_deltas(task)
    kind, topk = find_kind(task), task.settings["select_topk"]
    values = ranked.sce(as_arrays(task)[0], deltas, kind=kind, select_topk=topk)
    together = np.abs(np.sum(deltas, axis=0))
    largest = np.sum(np.abs(deltas), axis=0)
    return Expected(values, (together < 1e-6 * largest) & (largest > 0))


def expect_arcee_fusion(task: Task) -> Expected:
    (delta,), (base, other) = make_deltas(task), as_arrays(task)
    return certain(ranked.arcee_fusion(base, delta, other, kind=find_kind(task)))


def expect_pcb(task: Task) -> Expected:
    return certain(
        ranked.pcb(as_arrays(task)[0], make_deltas(task), kind=find_kind(task), **take_arguments(task.settings))
    )


def find_kind(task: Task) -> np.dtype[Any]:
    """Return the dtype in which the engine computes."""
    wide = any(tensor.dtype == torch.float64 for tensor in task.inputs)
    return np.dtype(np.float64 if wide else np.float32)


def expect_della(task: Task, *, consensus: bool) -> Expected:
    deltas, masks = make_deltas(task), make_magpruned(task)
    oracle = oracles.dare_ties if consensus else oracles.dare_linear
    arguments = take_arguments(task.settings, "density", "epsilon")
    values = oracle(as_arrays(task)[0], deltas, masks=masks, **arguments)
    return Expected(values, doubt_signs(task, deltas, masks)) if consensus else certain(values)


def make_magpruned(task: Task) -> list[Bools]:
    """Return what each model of della keeps."""
    chosen = zip(make_deltas(task), task.settings["density"], task.settings["epsilon"], task.places, strict=True)
    return [
        random_mask(
            delta.size,
            ranked.find_probabilities(delta, density, epsilon).ravel(),
            seed=task.seed,
            model=model,
            tensor=task.tensor,
        ).reshape(delta.shape)
        for delta, density, epsilon, model in chosen
    ]


BREADCRUMBS = (
    {"weight": WEIGHTS, "density": (0.5, 0.3, 0.9), "gamma": (0.01, 0.1, 0.05), "rescale": True, "normalize": True},
    {"weight": WEIGHTS, "density": (0.5, 0.5, 0.5), "lambda": 0.7},
    {"weight": (1.0, -0.5, 0.3), "density": (0.9, 0.9, 0.9), "gamma": (0.0, 0.05, 0.3), "lambda": -1.3},
    {"weight": WEIGHTS, "density": (0.0, 1.0, 0.5), "gamma": (0.5, 0.5, 1.0), "rescale": True},
    {"weight": WEIGHTS, "density": (1e-9, 1e-4, 1e-3), "gamma": (0.3, 1e-3, 1e-9), "rescale": True},
    {"weight": WEIGHTS},
    {"weight": (0.0, 0.0, 0.0), "density": (0.5, 0.5, 0.5), "normalize": True},
)
DELLA = (
    {"weight": WEIGHTS, "density": (0.5, 0.3, 0.8), "epsilon": (0.2, 0.1, 0.15), "rescale": True, "normalize": True},
    {"weight": WEIGHTS, "density": (0.5, 0.5, 0.5), "rescale": False, "normalize": False, "lambda": 0.7},
    {"weight": (1.0, -0.5, 0.3), "density": (0.6, 0.4, 0.5), "epsilon": (0.0, -0.3, 0.39), "normalize": True},
    {"weight": WEIGHTS, "density": (0.0, 1.0, 0.5), "rescale": True, "normalize": False, "lambda": -1.3},
    {"weight": WEIGHTS, "density": (1.0, 1.0, 1.0)},
    {"weight": WEIGHTS, "density": (1e-4, 1e-3, 1e-9), "epsilon": (5e-5, 1e-4, 0.0), "rescale": True},
)
EVENLY = {"weight": (1.0, 1.0, 1.0), "normalize": True}
NO_EPSILON = {"epsilon": (0.0, 0.0, 0.0)}
ENTRIES: dict[str, Entry] = {
    "breadcrumbs": Entry(
        models=3,
        variants=BREADCRUMBS,
        oracle=partial(expect_breadcrumbs, consensus=False),
        symmetric=True,
        equal=EVENLY,
    ),
    "breadcrumbs_ties": Entry(
        models=3,
        variants=BREADCRUMBS,
        oracle=partial(expect_breadcrumbs, consensus=True),
        symmetric=True,
        equal=EVENLY,
    ),
    "sce": Entry(
        models=3,
        variants=({"select_topk": 0.3}, {"select_topk": 1.0}, {"select_topk": 0.0}, {"select_topk": 1e-4}),
        oracle=expect_sce,
        symmetric=True,
        equal={},
    ),
    "della": Entry(
        models=3,
        variants=DELLA,
        oracle=partial(expect_della, consensus=True),
        symmetric=False,
        random=True,
        even=NO_EPSILON,
        equal=EVENLY,
    ),
    "della_linear": Entry(
        models=3,
        variants=DELLA,
        oracle=partial(expect_della, consensus=False),
        symmetric=False,
        random=True,
        even=NO_EPSILON,
        equal=EVENLY,
    ),
    "arcee_fusion": Entry(
        models=2,
        variants=({},),
        oracle=expect_arcee_fusion,
        symmetric=False,
        equal={},
    ),
    "pcb": Entry(
        models=3,
        variants=({"ratio": 0.1}, {"ratio": 1.0, "lambda": 1.0}, {"ratio": 0.0}, {"ratio": 0.5, "lambda": -0.3}),
        oracle=expect_pcb,
        symmetric=True,
    ),
}
