"""The suite's entries of the methods that rank elements."""

from functools import partial

from methods.entry import Entry, Expected, as_arrays, certain, doubt_signs, make_deltas, take_arguments
from methods.harness import Task
from oracles import ranked

WEIGHTS = (1.0, 0.6, 0.3)


def expect_breadcrumbs(task: Task, *, consensus: bool) -> Expected:
    deltas, settings = make_deltas(task), task.settings
    values = ranked.breadcrumbs(as_arrays(task)[0], deltas, consensus=consensus, **take_arguments(settings))
    if not consensus:
        return certain(values)
    chosen = zip(deltas, settings["density"], settings["gamma"], strict=True)
    return Expected(values, doubt_signs(task, deltas, [ranked.find_inner(*each) for each in chosen]))


BREADCRUMBS = (
    {"weight": WEIGHTS, "density": (0.5, 0.3, 0.9), "gamma": (0.01, 0.1, 0.05), "rescale": True, "normalize": True},
    {"weight": WEIGHTS, "density": (0.5, 0.5, 0.5), "lambda": 0.7},
    {"weight": (1.0, -0.5, 0.3), "density": (0.9, 0.9, 0.9), "gamma": (0.0, 0.05, 0.3), "lambda": -1.3},
    {"weight": WEIGHTS, "density": (0.0, 1.0, 0.5), "gamma": (0.5, 0.5, 1.0), "rescale": True},
    {"weight": WEIGHTS, "density": (1e-9, 1e-4, 1e-3), "gamma": (0.3, 1e-3, 1e-9), "rescale": True},
    {"weight": WEIGHTS},
    {"weight": (0.0, 0.0, 0.0), "density": (0.5, 0.5, 0.5), "normalize": True},
)
EVENLY = {"weight": (1.0, 1.0, 1.0), "normalize": True}
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
}
