"""mergemill's engine: plan a merge from headers, run it out of core on Dask, verify what came out.

>>> from mergemill.engine import load_recipe, make_plan, run  # doctest: +SKIP
>>> run(make_plan(load_recipe("recipe.yml")), "out")  # doctest: +SKIP

Each name is imported from its place when it is first asked for: planning needs no Dask, an abort no NumPy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergemill.engine.errors import MergemillError as MergemillError
    from mergemill.engine.methods.catalogue import find_coefficients as find_coefficients
    from mergemill.engine.methods.catalogue import find_methods as find_methods
    from mergemill.engine.methods.catalogue import find_steps as find_steps
    from mergemill.engine.methods.contract import Density as Density
    from mergemill.engine.methods.contract import PerModel as PerModel
    from mergemill.engine.methods.contract import Within as Within
    from mergemill.engine.methods.contract import merge_method as merge_method
    from mergemill.engine.methods.own import find_all_methods as find_all_methods
    from mergemill.engine.methods.own import open_methods as open_methods
    from mergemill.engine.plan.cost import estimate_cost as estimate_cost
    from mergemill.engine.plan.make import make_plan as make_plan
    from mergemill.engine.plan.sizes import format_size as format_size
    from mergemill.engine.recipe import load_cluster as load_cluster
    from mergemill.engine.recipe import load_recipe as load_recipe
    from mergemill.engine.recipe import recipe_schema as recipe_schema
    from mergemill.engine.runs.attach import attach as attach
    from mergemill.engine.runs.cancel import cancel as cancel
    from mergemill.engine.runs.describe import describe_plan as describe_plan
    from mergemill.engine.runs.drive import run as run
    from mergemill.engine.runs.events import Committed as Committed
    from mergemill.engine.runs.events import PartFinished as PartFinished
    from mergemill.engine.runs.events import Started as Started
    from mergemill.engine.runs.events import Waiting as Waiting
    from mergemill.engine.runs.in_memory import merge_state_dicts as merge_state_dicts
    from mergemill.engine.runs.in_memory import merge_tensors as merge_tensors
    from mergemill.engine.runs.inspect import inspect as inspect
    from mergemill.engine.runs.merge import merge as merge
    from mergemill.engine.runs.outputs.output import abort as abort
    from mergemill.engine.runs.status import status as status
    from mergemill.engine.runs.verify import verify as verify

_PLACES = {
    "Committed": "runs.events",
    "Density": "methods.contract",
    "MergemillError": "errors",
    "PartFinished": "runs.events",
    "PerModel": "methods.contract",
    "Started": "runs.events",
    "Waiting": "runs.events",
    "Within": "methods.contract",
    "abort": "runs.outputs.output",
    "attach": "runs.attach",
    "cancel": "runs.cancel",
    "describe_plan": "runs.describe",
    "estimate_cost": "plan.cost",
    "find_all_methods": "methods.own",
    "find_coefficients": "methods.catalogue",
    "find_methods": "methods.catalogue",
    "find_steps": "methods.catalogue",
    "format_size": "plan.sizes",
    "inspect": "runs.inspect",
    "load_cluster": "recipe",
    "load_recipe": "recipe",
    "make_plan": "plan.make",
    "merge": "runs.merge",
    "merge_method": "methods.contract",
    "merge_state_dicts": "runs.in_memory",
    "merge_tensors": "runs.in_memory",
    "open_methods": "methods.own",
    "recipe_schema": "recipe",
    "run": "runs.drive",
    "status": "runs.status",
    "verify": "runs.verify",
}

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
