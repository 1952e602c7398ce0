"""The values that the engine's face takes and gives, by name: for annotations."""

from mergemill.engine.plan.cost import Cost
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import AnyRecipe, ClusterFile, Recipe
from mergemill.engine.runs.diff import Diff, OnPart, TensorDiff
from mergemill.engine.runs.driver import Driver
from mergemill.engine.runs.inspect import Inspection
from mergemill.engine.runs.options import RunKeywords, RunOptions
from mergemill.engine.runs.status import Status
from mergemill.engine.runs.verify import Verified
from mergemill.engine.runs.worker.accelerator import DEVICES
from mergemill.engine.runs.worker.options import WorkerKeywords, WorkerOptions

__all__ = [
    "DEVICES",
    "AnyRecipe",
    "ClusterFile",
    "Cost",
    "Diff",
    "Driver",
    "Inspection",
    "OnPart",
    "Plan",
    "Recipe",
    "RunKeywords",
    "RunOptions",
    "Status",
    "TensorDiff",
    "Verified",
    "WorkerKeywords",
    "WorkerOptions",
]
