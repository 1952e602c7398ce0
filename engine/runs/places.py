"""The places of several merges that are run one after the other, looked at before the first of them writes anything."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Unpack

from mergemill.engine.errors import OutputError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.options import RunKeywords, RunOptions
from mergemill.engine.runs.outputs.output import check_held, find_output
from mergemill.engine.runs.worker.workers import choose_workers
from mergemill.engine.storage.same import holds_place
from mergemill.engine.storage.urls import parse_place


def check_places(plans: Sequence[tuple[str | Path, Plan]], **options: Unpack[RunKeywords]) -> None:
    """Raise `OutputError` where one of several merges would write over another, or over what any of them reads.

    plans: each with its place, in the order in which they are run; options: those of `run`. Nothing is written. Of one
    merge alone nothing is asked, as `run` looks before it writes.
    """
    asked = RunOptions(**options)
    placed = [(parse_place(place, OutputError), plan) for place, plan in plans]
    for (one, _), (other, _) in combinations(placed, 2):
        _check_apart(one, other)
    for place, plan in placed if placed[1:] else ():
        output = find_output(place, choose_workers(plan, asked).storage, public=asked.public)
        output.check(plan)
        check_held(output, plan, [each for _, each in placed], overwrite=asked.overwrite)


def _check_apart(one: str, other: str) -> None:
    """Raise `OutputError` where two places are one, however they are written, or one lies in the other."""
    if holds_place(one, other) and holds_place(other, one):
        also = "" if one == other else f", which is {one}"
        raise OutputError(f"{other}{also}: a stage and another merge would both be written there; keep it elsewhere")
    for outer, inner in ((one, other), (other, one)):
        if holds_place(outer, inner):
            raise OutputError(
                f"{inner}: lies in {outer}, where another merge of the recipe goes; choose a place beside it"
            )
