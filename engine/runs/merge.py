"""From a recipe file to a checkpoint in one call."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from mergemill.engine.methods.own import GivenMethods
from mergemill.engine.plan.draft import SHARD_SIZE
from mergemill.engine.plan.make import make_plan
from mergemill.engine.recipe import GivenRecipe
from mergemill.engine.runs.events import Committed
from mergemill.engine.runs.options import RunKeywords, RunOptions
from mergemill.engine.runs.running import run_as


def merge(
    recipe: GivenRecipe,
    out: str | Path,
    *,
    seed: int = 0,
    shard_size: str | int = SHARD_SIZE,
    methods: Sequence[GivenMethods] = (),
    round_stages: bool = False,
    **options: Unpack[RunKeywords],
) -> Committed:
    """Merge what `recipe` (a value, a path, a mapping or YAML text) describes into the folder `out`.

    The parameters are those of `make_plan` and `run`, and so are the errors.
    """
    asked = RunOptions(**options)
    asked = replace(asked, cluster=asked.find_cluster())  # read once
    plan = make_plan(
        recipe,
        seed=seed,
        shard_size=shard_size,
        methods=methods,
        storage=asked.find_storage(),
        round_stages=round_stages,
    )
    return run_as(plan, out, asked)
