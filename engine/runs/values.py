"""The values that the engine's face takes and gives, by name: for annotations.

Each is imported from its place when it is first asked for: a merge needs neither `diff` nor `inspect`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergemill.engine.plan.cost import Cost as Cost
    from mergemill.engine.plan.values import Plan as Plan
    from mergemill.engine.recipe import AnyRecipe as AnyRecipe
    from mergemill.engine.recipe import ClusterFile as ClusterFile
    from mergemill.engine.recipe import Recipe as Recipe
    from mergemill.engine.recipe.adapters import AdapterRecipe as AdapterRecipe
    from mergemill.engine.runs.diff import OnPart as OnPart
    from mergemill.engine.runs.differences import Diff as Diff
    from mergemill.engine.runs.differences import TensorDiff as TensorDiff
    from mergemill.engine.runs.driver import Driver as Driver
    from mergemill.engine.runs.inspect import Inspection as Inspection
    from mergemill.engine.runs.options import RunKeywords as RunKeywords
    from mergemill.engine.runs.options import RunOptions as RunOptions
    from mergemill.engine.runs.progress import Advance as Advance
    from mergemill.engine.runs.status import Status as Status
    from mergemill.engine.runs.verify import Verified as Verified
    from mergemill.engine.runs.worker.accelerator import DEVICES as DEVICES
    from mergemill.engine.runs.worker.options import WorkerKeywords as WorkerKeywords
    from mergemill.engine.runs.worker.options import WorkerOptions as WorkerOptions

_PLACES = {
    "AdapterRecipe": "recipe.adapters",
    "Advance": "runs.progress",
    "DEVICES": "runs.worker.accelerator",
    "AnyRecipe": "recipe",
    "ClusterFile": "recipe",
    "Cost": "plan.cost",
    "Diff": "runs.differences",
    "Driver": "runs.driver",
    "Inspection": "runs.inspect",
    "OnPart": "runs.diff",
    "Plan": "plan.values",
    "Recipe": "recipe",
    "RunKeywords": "runs.options",
    "RunOptions": "runs.options",
    "Status": "runs.status",
    "TensorDiff": "runs.differences",
    "Verified": "runs.verify",
    "WorkerKeywords": "runs.worker.options",
    "WorkerOptions": "runs.worker.options",
}

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"mergemill.engine.{_PLACES[name]}"), name)
    globals()[name] = found
    return found
