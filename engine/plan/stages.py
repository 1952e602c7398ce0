"""Stages: the draft of one merge as a model of the next, which is written nowhere.

A stage is a checkpoint in all respects but its bytes: its tensors are the expressions that would be written, its config
the one that its output would have, and its other files are its donor's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergemill.engine.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from mergemill.engine.checkpoint.config import parse_config
from mergemill.engine.checkpoint.weights import StoredTensor
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.plan.draft import Draft
from mergemill.engine.plan.small_files import Inputs
from mergemill.engine.plan.values import OutputTensor
from mergemill.engine.recipe import Recipe
from mergemill.engine.storage.ranges import Pin
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.unwritten import Unwritten


@dataclass(frozen=True, slots=True)
class StageModel:
    """A stage that is planned, as a model."""

    checkpoint: Checkpoint  # its tensors lie nowhere
    offers: Offers
    stored: Mapping[str, Checkpoint]  # the models that it is made from
    draft: Draft


def make_stage(stage: Recipe, draft: Draft, inputs: Inputs, *, rounded: bool, where: str) -> StageModel:
    """Return a stage as a model; rounded: its tensors are cast to the dtypes that it would have been written in."""
    if draft.scaling is not None:
        raise PlanError(
            f"{where}: {draft.scaling.method.name} needs the norms of all task vectors first, which a stage cannot "
            f"have yet; merge this stage alone first, and name the folder"
        )
    if stage.guard is not None:
        raise PlanError(f"{where}: a guard looks at what is written, which of a stage is nothing; leave its guard out")
    config_text = next((file.data for file in draft.files if file.name == CONFIG_NAME and file.data is not None), b"")
    checkpoint = replace(
        inputs.donor,
        ref=str(stage.name),
        path=f"stage {stage.name}",
        tensors={tensor.name: _place_nowhere(tensor, str(stage.name)) for tensor in draft.tensors},
        config=parse_config(config_text, where=where) if config_text else {},
        config_text=config_text,
        pins={file.name: file.copied for file in draft.files if file.copied is not None},
    )
    offers = {tensor.name: _offer(tensor, rounded=rounded) for tensor in draft.tensors}
    return StageModel(checkpoint, offers, inputs.stored, draft)


def find_offers(checkpoints: Mapping[str, Checkpoint], stages: Mapping[str, StageModel]) -> Mapping[str, Offers]:
    """Return what the stages among a merge's models offer, by the name of the model."""
    by_path = {stage.checkpoint.path: stage.offers for stage in stages.values()}
    return {model: by_path[each.path] for model, each in checkpoints.items() if each.path in by_path}


def list_stored(checkpoints: Mapping[str, Checkpoint], stages: Mapping[str, StageModel]) -> Mapping[str, Checkpoint]:
    """Return the models that a merge's models are made from: each itself, and of a stage its own."""
    by_path = {stage.checkpoint.path: stage.stored for stage in stages.values()}
    return {
        name: each
        for model, found in checkpoints.items()
        for name, each in by_path.get(found.path, {model: found}).items()
    }


def add_stages(draft: Draft, stages: Mapping[str, StageModel], unused: Sequence[str], *, where: str) -> Draft:
    """Return the draft of the result with what its stages read and warn of.

    unused: the names of stages that nothing needs, which are not planned.
    """
    drafts = {name: stage.draft for name, stage in stages.items()}
    names = {stage.checkpoint.path for stage in stages.values()}
    read = [replace(used, model=f"{name}: {used.model}") for name, each in drafts.items() for used in each.sources]
    code = [file for each in drafts.values() for file in each.origin.code]
    return replace(
        draft,
        origin=replace(draft.origin, code=tuple(dict.fromkeys([*draft.origin.code, *code]))),
        sources=[
            replace(each, read_bytes=0, is_stage=True) if each.path in names else each
            for each in (*read, *draft.sources)
        ],
        warnings=(
            *(warning for each in drafts.values() for warning in each.warnings),
            *(f"{where}: nothing needs the stage {name}, which is not merged" for name in unused),
            *(
                f"{where}: {name} is the stage, not the folder of that name, which is ./{name}"
                for name in stages
                if Path(name).exists()
            ),
            *draft.warnings,
        ),
    )


def _offer(tensor: OutputTensor, *, rounded: bool) -> Offer:
    return Offer(Unwritten(tensor.expression, tensor.dtype, rounded), (tensor.name,))


def _place_nowhere(tensor: OutputTensor, stage: str) -> StoredTensor:
    size_bytes = tensor.expression.size * item_bytes(tensor.dtype)
    return StoredTensor(tensor.name, tensor.dtype, tensor.expression.shape, Pin(f"stage {stage}", 0, ""), 0, size_bytes)
