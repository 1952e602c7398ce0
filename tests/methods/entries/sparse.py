"""The suite's entries of task arithmetic and of the sparse methods that were first."""

import oracles
from methods.entry import Entry, Expected, as_arrays, certain, doubt_signs, make_deltas, make_masks, take_arguments
from methods.harness import Settings, Task


def expect_task_arithmetic(task: Task) -> Expected:
    return certain(oracles.task_arithmetic(as_arrays(task)[0], make_deltas(task), **take_arguments(task.settings)))


def expect_ties(task: Task) -> Expected:
    deltas = make_deltas(task)
    values = oracles.ties(as_arrays(task)[0], deltas, **take_arguments(task.settings))
    masks = [oracles.find_largest(x, share) for x, share in zip(deltas, task.settings["density"], strict=True)]
    return Expected(values, doubt_signs(task, deltas, masks))


def expect_dare_linear(task: Task) -> Expected:
    arguments = take_arguments(task.settings, "density")
    return certain(oracles.dare_linear(as_arrays(task)[0], make_deltas(task), masks=make_masks(task), **arguments))


def expect_dare_ties(task: Task) -> Expected:
    arguments, deltas, masks = take_arguments(task.settings, "density"), make_deltas(task), make_masks(task)
    values = oracles.dare_ties(as_arrays(task)[0], deltas, masks=masks, **arguments)
    return Expected(values, doubt_signs(task, deltas, masks))


WEIGHTS = (1.0, 0.6, 0.3)
SPARSE = (
    {"weight": WEIGHTS, "density": (0.5, 0.3, 0.9), "rescale": True, "normalize": True},
    {"weight": WEIGHTS, "density": (0.3, 0.3, 0.3), "rescale": False, "normalize": False},
    {
        "weight": (1.0, -0.5, 0.3),
        "density": (0.5, 0.5, 0.5),
        "rescale": True,
        "normalize": False,
        "lambda": 0.7,
    },
    {
        "weight": (0.0, 1.0, -2.0),
        "density": (0.3, 1.0, 0.5),
        "rescale": False,
        "normalize": True,
        "lambda": -1.3,
    },
    {"weight": WEIGHTS, "density": (0.0, 1.0, 0.5), "rescale": True, "normalize": True},
    {"weight": WEIGHTS, "density": (0.0, 0.0, 0.0)},
    {"weight": WEIGHTS, "density": (1.0, 1.0, 1.0)},
    {"weight": WEIGHTS, "density": (1e-9, 1e-4, 1e-3), "rescale": True},
    {"weight": (0.0, 0.0, 0.0), "density": (0.5, 0.5, 0.5), "normalize": True},
    {"weight": WEIGHTS, "density": (0.5, 0.5, 0.5), "lambda": 0.0},
)
EVENLY: Settings = {"weight": (1.0, 1.0, 1.0), "normalize": True}
ENTRIES: dict[str, Entry] = {
    "task_arithmetic": Entry(
        models=3,
        variants=(
            {"weight": WEIGHTS, "normalize": False, "lambda": 0.7},
            {"weight": WEIGHTS, "normalize": True},
            {"weight": (1.0, -0.5, 0.0), "normalize": True, "lambda": -0.5},
            {"weight": (1.0, -0.5, -0.5), "normalize": True},
            {"weight": (0.0, 0.0, 0.0), "normalize": True},
        ),
        oracle=expect_task_arithmetic,
        symmetric=True,
        equal=EVENLY,
    ),
    "ties": Entry(
        models=3,
        variants=SPARSE,
        oracle=expect_ties,
        symmetric=True,
        equal=EVENLY,
    ),
    "dare_linear": Entry(
        models=3,
        variants=SPARSE,
        oracle=expect_dare_linear,
        symmetric=False,
        random=True,
        equal=EVENLY,
    ),
    "dare_ties": Entry(
        models=3,
        variants=SPARSE,
        oracle=expect_dare_ties,
        symmetric=False,
        random=True,
        equal=EVENLY,
    ),
}
