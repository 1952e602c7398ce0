"""What all planners of models begin with: what they are asked for, and the models themselves, opened by headers."""

import difflib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mergemill.engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mergemill.engine.errors import Absent, CheckpointError, PlanError
from mergemill.engine.methods.own import GivenMethods
from mergemill.engine.plan.stages import StageModel
from mergemill.engine.recipe import ModelRef
from mergemill.engine.recipe.stages import names_stage
from mergemill.engine.storage.store import Storage

MODELS_AT_ONCE = 8  # that are opened


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a plan is asked for beside its recipe."""

    seed: int
    methods: Sequence[GivenMethods]
    storage: Mapping[str, Mapping[str, Any]]
    round_stages: bool


Stages = Mapping[str, StageModel]  # by name


def open_models(
    refs: Mapping[str, ModelRef], storage: Storage, stages: Mapping[str, StageModel], where: str
) -> Mapping[str, Checkpoint]:
    """Open all models at once, since each waits for its storage several times; a stage is there already."""

    def open_one(ref: ModelRef) -> Checkpoint:
        if names_stage(ref, stages, where=where):
            return stages[ref.path].checkpoint
        try:
            return open_checkpoint(ref.path, ref.revision, storage)
        except Absent as error:
            if near := difflib.get_close_matches(ref.path, stages, n=1):
                raise CheckpointError(f"{error}; did you mean the stage {near[0]!r}?") from error
            raise

    with ThreadPoolExecutor(min(len(refs), MODELS_AT_ONCE)) as pool:
        return dict(zip(refs, pool.map(open_one, refs.values()), strict=True))


def warn_of_overrides(refs: Mapping[str, ModelRef], *, where: str) -> list[str]:
    """Return a warning for each model of which a recipe for mergekit says which list of weights to read it by."""
    return [
        f"{where}: {ref}: override_architecture says nothing here: the names of its tensors are read from its files"
        for ref in refs.values()
        if ref.override_architecture is not None
    ]


def check_kinds(checkpoints: Mapping[str, Checkpoint], where: str) -> None:
    """Raise `PlanError` for what is no one model."""
    for model, checkpoint in checkpoints.items():
        if checkpoint.is_pipeline:
            raise PlanError(f"{where}: {model} is a pipeline of diffusers; its components are merged with --raw")
