"""The suite's entries of the methods that know their inputs' inner products."""

from methods.entry import Based, Entry, Expected, as_arrays, certain, make_deltas, take_arguments
from methods.harness import Task
from oracles import gram


def expect_multislerp(task: Task) -> Expected:
    inputs = make_deltas(task) if task.has_base else as_arrays(task)
    return certain(gram.multislerp(inputs, **task.settings) + (as_arrays(task)[0] if task.has_base else 0.0))


def expect_karcher(task: Task) -> Expected:
    return certain(gram.karcher(as_arrays(task), **task.settings))


def expect_nuslerp(task: Task) -> Expected:
    a, b = make_deltas(task) if task.has_base else as_arrays(task)
    axis = None
    if not task.settings["nuslerp_flatten"] and a.ndim:
        axis = 0 if task.settings["nuslerp_row_wise"] else -1
    arc = gram.nuslerp(a, b, weight=task.settings["weight"], axis=axis)
    return certain(arc + (as_arrays(task)[0] if task.has_base else 0.0))


def expect_model_stock(task: Task) -> Expected:
    return certain(gram.model_stock(as_arrays(task)[0], make_deltas(task), **task.settings))


def expect_geometric_median(task: Task) -> Expected:
    median = gram.geometric_median(make_deltas(task), **take_arguments(task.settings, "lambda"))
    return certain(as_arrays(task)[0] + task.settings["lambda"] * median)


THREE = (1.0, 0.6, 0.3)
ENTRIES: dict[str, Entry] = {
    "multislerp": Entry(
        models=3,
        variants=(
            {"weight": THREE},
            Based(weight=THREE),
            {"weight": THREE, "normalize_weights": False},
            Based(weight=(1.0, -0.5, 0.2), normalize_weights=False, eps=1e-3),
            {"weight": (0.0, 1.0, 0.0)},
        ),
        oracle=expect_multislerp,
        symmetric=True,
        equal={"weight": THREE},
    ),
    "karcher": Entry(
        models=3,
        variants=({}, {"max_iter": 0}, {"max_iter": 1, "tol": 1e-9}, {"max_iter": 50, "tol": 1e-12}, {"tol": 0.3}),
        oracle=expect_karcher,
        symmetric=True,
        equal={},
    ),
    "nuslerp": Entry(
        models=2,
        variants=(
            {"weight": (0.7, 0.3)},
            Based(weight=(0.7, 0.3)),
            {"weight": (0.7, 0.3), "nuslerp_flatten": False},
            Based(weight=(0.2, 0.3), nuslerp_flatten=False),
            {"weight": (0.7, 0.3), "nuslerp_flatten": False, "nuslerp_row_wise": True},
            Based(weight=(1.0, 3.0), nuslerp_flatten=False, nuslerp_row_wise=True),
            {"weight": (1.0, -1.0)},
            {"weight": (1.5, -0.5), "nuslerp_row_wise": True},
        ),
        oracle=expect_nuslerp,
        symmetric=True,
        equal={"weight": (0.7, 0.3)},
    ),
    "model_stock": Entry(
        models=3,
        variants=({}, {"filter_wise": True}),
        oracle=expect_model_stock,
        symmetric=True,
        equal={},
    ),
    "geometric_median": Entry(
        models=3,
        variants=(
            {"weight": THREE, "lambda": 0.7},  # with lambda 1 the base makes no difference
            {},
            {"weight": (5.0, 1.0, 1.0)},
            {"weight": (0.0, 1.0, 1.0), "max_iter": 3},
            {"max_iter": 0, "weight": THREE},
            {"tol": 0.1, "weight": THREE},
        ),
        oracle=expect_geometric_median,
        symmetric=True,
        equal={"weight": THREE},
    ),
}
