"""mergemill's engine: plan a merge from headers, run it out of core on Dask, verify what came out.

>>> from mergemill.engine import load_recipe, make_plan, run  # doctest: +SKIP
>>> run(make_plan(load_recipe("recipe.yml")), "out")  # doctest: +SKIP

The names here are the engine's one face: the command line and the package `mergemill` import nothing else of it. Words
that belong together are in one namespace: `errors`, `events`, `jobs`, `methods`, `reports`, `searches`, `values`. Each
name is imported from its place when it is first asked for: planning needs no Dask, an abort no NumPy.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from mergemill.engine.errors import UnfitSystem

if sys.platform in ("win32", "cygwin"):  # which `engine/storage/system.py` says the reasons for
    raise UnfitSystem(
        "mergemill does not run on Windows itself, only on Linux and macOS; on Windows it runs in WSL: "
        "see https://learn.microsoft.com/windows/wsl/install, and install it there"
    )

if TYPE_CHECKING:
    from mergemill.engine import errors as errors
    from mergemill.engine import methods as methods
    from mergemill.engine import reports as reports
    from mergemill.engine.evaluation.evaluating import evaluate as evaluate
    from mergemill.engine.evaluation.transplants import judge_transplants as judge_transplants
    from mergemill.engine.methods.contract import PerModel as PerModel
    from mergemill.engine.methods.contract import merge_method as merge_method
    from mergemill.engine.plan.convert import make_convert_plan as make_convert_plan
    from mergemill.engine.plan.cost import estimate_cost as estimate_cost
    from mergemill.engine.plan.make import make_plan as make_plan
    from mergemill.engine.plan.raw import make_raw_plan as make_raw_plan
    from mergemill.engine.plan.sizes import format_size as format_size
    from mergemill.engine.plan.transplant import list_transplanted as list_transplanted
    from mergemill.engine.plan.transplant import make_transplant_plan as make_transplant_plan
    from mergemill.engine.recipe import list_clusters as list_clusters
    from mergemill.engine.recipe import load_cluster as load_cluster
    from mergemill.engine.recipe import load_document as load_document
    from mergemill.engine.recipe import load_recipe as load_recipe
    from mergemill.engine.recipe import make_recipe as make_recipe
    from mergemill.engine.recipe import read_recipe as read_recipe
    from mergemill.engine.recipe import recipe_schema as recipe_schema
    from mergemill.engine.recipe import writers as writers
    from mergemill.engine.recipe.adapters import names_adapters as names_adapters
    from mergemill.engine.recipe.adapters import parse_adapters as parse_adapters
    from mergemill.engine.recipe.stages import list_kept as list_kept
    from mergemill.engine.runs import events as events
    from mergemill.engine.runs import jobs as jobs
    from mergemill.engine.runs import values as values
    from mergemill.engine.runs.abort import abort as abort
    from mergemill.engine.runs.access import load_storage as load_storage
    from mergemill.engine.runs.attach import attach as attach
    from mergemill.engine.runs.cancel import cancel as cancel
    from mergemill.engine.runs.combine import make_adapter_plan as make_adapter_plan
    from mergemill.engine.runs.describe import check_output as check_output
    from mergemill.engine.runs.describe import describe_plan as describe_plan
    from mergemill.engine.runs.diff import diff as diff
    from mergemill.engine.runs.environment import describe_environment as describe_environment
    from mergemill.engine.runs.environment import describe_slowness as describe_slowness
    from mergemill.engine.runs.extract import make_lora_plan as make_lora_plan
    from mergemill.engine.runs.in_memory import merge_state_dicts as merge_state_dicts
    from mergemill.engine.runs.in_memory import merge_tensors as merge_tensors
    from mergemill.engine.runs.inspect import inspect as inspect
    from mergemill.engine.runs.merge import merge as merge
    from mergemill.engine.runs.pace import format_time as format_time
    from mergemill.engine.runs.places import check_places as check_places
    from mergemill.engine.runs.progress import find_terminal as find_terminal
    from mergemill.engine.runs.progress import open_lines as open_lines
    from mergemill.engine.runs.progress import open_terminal as open_terminal
    from mergemill.engine.runs.push import push as push
    from mergemill.engine.runs.running import run as run
    from mergemill.engine.runs.status import status as status
    from mergemill.engine.runs.verify import list_code as list_code
    from mergemill.engine.runs.verify import verify as verify
    from mergemill.engine.search import searches as searches

_PLACES = {
    "PerModel": "methods.contract",
    "abort": "runs.abort",
    "attach": "runs.attach",
    "cancel": "runs.cancel",
    "check_output": "runs.describe",
    "check_places": "runs.places",
    "describe_environment": "runs.environment",
    "describe_plan": "runs.describe",
    "describe_slowness": "runs.environment",
    "diff": "runs.diff",
    "errors": "",
    "estimate_cost": "plan.cost",
    "evaluate": "evaluation.evaluating",
    "events": "runs",
    "find_terminal": "runs.progress",
    "format_size": "plan.sizes",
    "format_time": "runs.pace",
    "inspect": "runs.inspect",
    "jobs": "runs",
    "judge_transplants": "evaluation.transplants",
    "list_clusters": "recipe",
    "list_code": "runs.verify",
    "list_kept": "recipe.stages",
    "list_transplanted": "plan.transplant",
    "load_cluster": "recipe",
    "load_document": "recipe",
    "load_recipe": "recipe",
    "load_storage": "runs.access",
    "make_adapter_plan": "runs.combine",
    "make_convert_plan": "plan.convert",
    "make_lora_plan": "runs.extract",
    "make_plan": "plan.make",
    "make_raw_plan": "plan.raw",
    "make_recipe": "recipe",
    "make_transplant_plan": "plan.transplant",
    "merge": "runs.merge",
    "merge_method": "methods.contract",
    "merge_state_dicts": "runs.in_memory",
    "merge_tensors": "runs.in_memory",
    "methods": "",
    "names_adapters": "recipe.adapters",
    "open_lines": "runs.progress",
    "open_terminal": "runs.progress",
    "parse_adapters": "recipe.adapters",
    "push": "runs.push",
    "read_recipe": "recipe",
    "recipe_schema": "recipe",
    "reports": "",
    "run": "runs.running",
    "searches": "search",
    "status": "runs.status",
    "values": "runs",
    "verify": "runs.verify",
    "writers": "recipe",
}
"""Where a name is; the namespaces are modules of a room."""

_NAMESPACES = ("errors", "events", "jobs", "methods", "reports", "searches", "values", "writers")

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = ".".join(filter(None, [__name__, _PLACES[name]]))
    found = (
        importlib.import_module(f"{place}.{name}")
        if name in _NAMESPACES
        else getattr(importlib.import_module(place), name)
    )
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
