"""The suite's entries of linear, slerp and passthrough."""

import oracles
from methods.entry import Entry, Expected, as_arrays, certain
from methods.harness import Task


def expect_linear(task: Task) -> Expected:
    return certain(oracles.linear(as_arrays(task), **task.settings))


def expect_slerp(task: Task) -> Expected:
    base, other = as_arrays(task)
    return certain(oracles.slerp(base, other, **task.settings))


def expect_passthrough(task: Task) -> Expected:
    (tensor,) = as_arrays(task)
    return certain(oracles.passthrough(tensor, scale=task.settings["scale"][0]))


ENTRIES: dict[str, Entry] = {
    "linear": Entry(
        models=3,
        variants=(
            {"weight": (0.5, 0.3, 0.2)},
            {"weight": (1.0, 2.0, 3.0), "normalize": True},
            {"weight": (1.0, -0.5, 0.0), "normalize": False},
            {"weight": (1.0, -0.5, 0.1), "normalize": True},
            {"weight": (0.0, 0.0, 0.0), "normalize": False},
        ),
        oracle=expect_linear,
        symmetric=True,
        equal={"weight": (0.7, 0.2, 1.1)},
    ),
    "fisher": Entry(  # as it is without importances; with them: tests/plan/test_importance.py
        models=3,
        variants=({"weight": (0.5, 0.3, 0.2)}, {"weight": (1.0, 2.0, 0.0)}),
        oracle=expect_linear,
        symmetric=True,
        equal={"weight": (0.7, 0.2, 1.1)},
    ),
    "regmean": Entry(
        models=3,
        variants=({"weight": (0.5, 0.3, 0.2)}, {"weight": (1.0, 2.0, 0.0)}),
        oracle=lambda task: certain(oracles.linear(as_arrays(task), weight=task.settings["weight"])),
        symmetric=True,
        equal={"weight": (0.7, 0.2, 1.1)},
    ),
    "slerp": Entry(
        models=2,
        variants=({"t": 0.3}, {"t": 0.0}, {"t": 1.0}, {"t": 0.5}, {"t": 1.4}),
        oracle=expect_slerp,
        symmetric=False,
        equal={"t": 0.3},
    ),
    "passthrough": Entry(
        models=1,
        variants=({"scale": (0.7,)}, {"scale": (None,)}, {"scale": (0.0,)}, {"scale": (-3.0,)}),
        oracle=expect_passthrough,
        symmetric=True,
        equal={},
    ),
}
