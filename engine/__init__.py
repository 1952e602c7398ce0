"""mergemill's engine: plan a merge from headers, run it out of core on Dask, verify what came out.

>>> from mergemill.engine import load_recipe, make_plan, run  # doctest: +SKIP
>>> run(make_plan(load_recipe("recipe.yml")), "out")  # doctest: +SKIP
"""

from mergemill.engine.errors import MergemillError
from mergemill.engine.methods.catalogue import find_coefficients, find_methods, find_steps
from mergemill.engine.methods.contract import Density, PerModel, Within, merge_method
from mergemill.engine.methods.own import find_all_methods, open_methods
from mergemill.engine.plan.cost import estimate_cost
from mergemill.engine.plan.make import make_plan
from mergemill.engine.plan.sizes import format_size
from mergemill.engine.recipe import load_recipe, recipe_schema
from mergemill.engine.run.describe import describe_plan
from mergemill.engine.run.drive import run
from mergemill.engine.run.events import Committed, PartFinished, Started
from mergemill.engine.run.in_memory import merge_state_dicts, merge_tensors
from mergemill.engine.run.inspect import inspect
from mergemill.engine.run.merge import merge
from mergemill.engine.run.output import abort_output as abort
from mergemill.engine.run.verify import verify

__all__ = [
    "Committed",
    "Density",
    "MergemillError",
    "PartFinished",
    "PerModel",
    "Started",
    "Within",
    "abort",
    "describe_plan",
    "estimate_cost",
    "find_all_methods",
    "find_coefficients",
    "find_methods",
    "find_steps",
    "format_size",
    "inspect",
    "load_recipe",
    "make_plan",
    "merge",
    "merge_method",
    "merge_state_dicts",
    "merge_tensors",
    "open_methods",
    "recipe_schema",
    "run",
    "verify",
]
