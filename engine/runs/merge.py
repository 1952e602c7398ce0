"""From a recipe file to a checkpoint in one call."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

from mergemill.engine.methods.own import GivenMethods
from mergemill.engine.plan.draft import SHARD_SIZE
from mergemill.engine.plan.make import make_plan
from mergemill.engine.recipe import AnyRecipe, GivenRecipe, load_document
from mergemill.engine.recipe.stages import list_kept
from mergemill.engine.runs.events import Committed
from mergemill.engine.runs.options import RunKeywords, RunOptions
from mergemill.engine.runs.places import check_places
from mergemill.engine.runs.running import run_as


def merge(
    recipe: GivenRecipe,
    out: str | Path,
    *,
    seed: int = 0,
    shard_size: str | int = SHARD_SIZE,
    methods: Sequence[GivenMethods] = (),
    round_stages: bool = False,
    keep_stages: str | None = None,
    **options: Unpack[RunKeywords],
) -> Committed:
    """Merge what `recipe` (a value, a path, a mapping or YAML text) describes into the folder `out`.

    The parameters are those of `make_plan` and `run`, and so are the errors. keep_stages: a folder into which all
    stages are merged too, below their names; where a stage says `keep`, that place holds.
    """
    asked = RunOptions(**options)
    asked = replace(asked, cluster=asked.find_cluster())  # read once
    given = load_document(recipe)
    storage = asked.find_storage()
    plan = partial(
        make_plan, seed=seed, shard_size=shard_size, methods=methods, storage=storage, round_stages=round_stages
    )
    asked_for: list[tuple[str | Path, AnyRecipe]] = [*list_kept(given, keep_stages), (out, given)]
    plans = [(place, plan(each)) for place, each in asked_for]  # all of them, before anything is written
    check_places(plans, **options)
    return [run_as(each, place, asked) for place, each in plans][-1]
