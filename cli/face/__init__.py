"""mergemill for Python: merge model checkpoints that outgrow one machine.

>>> import mergemill  # doctest: +SKIP
>>> mergemill.merge("recipe.yml", "merged", memory="2GiB", progress=True)  # doctest: +SKIP

The folder `cli/face` is the package `mergemill`: what people call, as the commands beside it are what they type. Its
names are some of the engine's face, and the same objects; each is imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergemill.engine import abort as abort
    from mergemill.engine import attach as attach
    from mergemill.engine import cancel as cancel
    from mergemill.engine import errors as errors
    from mergemill.engine import events as events
    from mergemill.engine import inspect as inspect
    from mergemill.engine import load_cluster as load_cluster
    from mergemill.engine import load_recipe as load_recipe
    from mergemill.engine import make_plan as make_plan
    from mergemill.engine import make_raw_plan as make_raw_plan
    from mergemill.engine import merge as merge
    from mergemill.engine import merge_state_dicts as merge_state_dicts
    from mergemill.engine import merge_tensors as merge_tensors
    from mergemill.engine import methods as methods
    from mergemill.engine import run as run
    from mergemill.engine import status as status
    from mergemill.engine import values as values
    from mergemill.engine import verify as verify

    __version__: str

__all__ = [
    "__version__",
    "abort",
    "attach",
    "cancel",
    "errors",
    "events",
    "inspect",
    "load_cluster",
    "load_recipe",
    "make_plan",
    "make_raw_plan",
    "merge",
    "merge_state_dicts",
    "merge_tensors",
    "methods",
    "run",
    "status",
    "values",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = _find_version() if name == "__version__" else _find_in_engine(name)
    globals()[name] = found
    return found


def _find_version() -> str:
    from importlib.metadata import version

    return version("mergemill")


def _find_in_engine(name: str) -> Any:
    from mergemill import engine

    return getattr(engine, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
