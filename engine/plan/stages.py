"""Stages: the draft of one merge as a model of the next, which is written nowhere.

A stage is a checkpoint in all respects but its bytes: its tensors are the expressions that would be written, its config
the one that its output would have, and its other files are its donor's.
"""

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from mergemill.engine.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from mergemill.engine.checkpoint.config import parse_config
from mergemill.engine.checkpoint.copied_files import COPIED_FILES, matches
from mergemill.engine.checkpoint.layout import TensorInfo
from mergemill.engine.checkpoint.weights import StoredTensor
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.formats import express
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.plan.draft import Draft
from mergemill.engine.plan.small_files import Inputs
from mergemill.engine.plan.values import OutputTensor, SourceUse
from mergemill.engine.recipe import AnyRecipe
from mergemill.engine.storage.ranges import Pin
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.unwritten import Unwritten


@dataclass(frozen=True, slots=True)
class StageModel:
    """A stage that is planned, as a model."""

    checkpoint: Checkpoint  # its tensors lie nowhere
    offers: Offers
    stored: Mapping[str, Checkpoint]  # the models that it is made from
    draft: Draft


def make_stage(
    stage: AnyRecipe, draft: Draft, inputs: Inputs, *, rounded: bool, where: str, shared: bool = False
) -> StageModel:
    """Return a stage as a model.

    rounded: its tensors are cast to the dtypes that it would have been written in. shared: several merges take it.
    """
    if draft.scaling is not None:
        raise PlanError(
            f"{where}: {draft.scaling.method.name} needs the norms of all task vectors first, which a stage cannot "
            f"have yet; merge this stage alone first, and name the folder"
        )
    if draft.gates is not None:
        raise PlanError(
            f"{where}: its gates are computed from prompts while it is made, which a stage is not; make it first and "
            f"name its folder, or give the gates.safetensors of an earlier one with gate_mode: file"
        )
    if stage.guard is not None:
        raise PlanError(f"{where}: a guard looks at what is written, which of a stage is nothing; leave its guard out")
    config_text = next((file.data for file in draft.files if file.name == CONFIG_NAME and file.data is not None), b"")
    checkpoint = replace(
        inputs.donor,
        ref=str(stage.name),
        path=f"stage {stage.name}",
        tensors={info.name: _place_nowhere(info, str(stage.name)) for each in draft.tensors for info in each.infos},
        called={},
        config=parse_config(config_text, where=where) if config_text else {},
        config_text=config_text,
        pins={file.name: file.copied for file in draft.files if file.copied is not None},
        made={file.name: file.data for file in draft.files if file.data is not None and _is_kept(file.name)},
        left_out=(),
        changes=(),
    )
    offers = {tensor.name: _offer(tensor, rounded=rounded, shared=shared) for tensor in draft.tensors}
    return StageModel(checkpoint, offers, inputs.stored, draft)


def _is_kept(name: str) -> bool:
    """Whether a file that is made is the model's, and not one of its merge: its tokenizer, its way to generate."""
    return matches(name, COPIED_FILES)


def find_offers(checkpoints: Mapping[str, Checkpoint], stages: Mapping[str, StageModel]) -> Mapping[str, Offers]:
    """Return what the stages among a merge's models offer, by the name of the model.

    With them goes what an adapter on a stage has stored: its factors, and tensors that take the place of the stage's.
    """
    by_path = {stage.checkpoint.path: stage for stage in stages.values()}
    found: dict[str, Offers] = {}
    for model, each in checkpoints.items():
        if (stage := by_path.get(each.path)) is not None:
            found[model] = {**_offer_beside(each, stage), **_rename(_leave_out_replaced(each, stage), each)}
    return found


def _offer_beside(model: Checkpoint, stage: StageModel) -> Offers:
    nowhere = {stored.file for stored in stage.checkpoint.tensors.values()}
    return {name: Offer(express(each), (name,)) for name, each in model.tensors.items() if each.file not in nowhere}


def _leave_out_replaced(model: Checkpoint, stage: StageModel) -> Offers:
    """Return the stage's offers without those in whose place an adapter has tensors of its own."""
    kept = {stored.file for stored in stage.checkpoint.tensors.values()}
    known = {model.called.get(name, name) for name, stored in model.tensors.items() if stored.file not in kept}
    return {name: offer for name, offer in stage.offers.items() if name not in known}


def _rename(offers: Offers, checkpoint: Checkpoint) -> Offers:
    """Return a stage's offers under the names that its tensors have in this merge."""
    names = {old: new for new, old in checkpoint.called.items()}
    return {_find_name(name, offer, names): _rename_offer(offer, names) for name, offer in offers.items()}


def _find_name(name: str, offer: Offer, names: Mapping[str, str]) -> str:
    if not offer.parts:
        return names.get(name, name)
    old = offer.parts[0].name
    start = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(name, old, strict=False)))  # in one module
    new = names.get(old, old)
    return new.removesuffix(old[start:]) + name[start:] if new.endswith(old[start:]) else name


def _rename_offer(offer: Offer, names: Mapping[str, str]) -> Offer:
    parts = tuple(info._replace(name=names.get(info.name, info.name)) for info in offer.parts)
    return offer._replace(uses=tuple(names.get(name, name) for name in offer.uses), parts=parts)


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
        sources=_count_once(
            [
                replace(each, read_bytes=0, is_stage=True) if each.path in names else each
                for each in (*read, *draft.sources)
            ],
            draft.tensors,
            list(stages.values()),
        ),
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


def _count_once(
    sources: Sequence[SourceUse], tensors: Sequence[OutputTensor], stages: Sequence[StageModel]
) -> list[SourceUse]:
    """Return the sources so that what several stages take of one model for a tensor is read by the first of them."""
    if not stages:
        return list(sources)
    models = {each.path: each for stage in stages for each in stage.stored.values()}
    urls = {(each.read_from or each.file).url: path for path in models for each in models[path].tensors.values()}
    ranges = {
        (urls[read.pin.url], tensor.name, read.offset_bytes, read.size_bytes)
        for tensor in tensors
        for read in tensor.expression.reads(Span(0, tensor.expression.size))
        if read.pin.url in urls
    }
    left, found = collections.Counter[str](), list[SourceUse]()
    for path, _, _, size_bytes in ranges:
        left[path] += size_bytes
    for source in sources:
        read_bytes = min(source.read_bytes, left[source.path]) if source.path in left else source.read_bytes
        left[source.path] -= read_bytes if source.path in left else 0
        found.append(replace(source, read_bytes=read_bytes))
    return found


def _offer(tensor: OutputTensor, *, rounded: bool, shared: bool) -> Offer:
    uses, made = tuple(info.name for info in tensor.infos), tensor.expression
    return Offer(Unwritten(made, tensor.dtype, rounded, shared and made.is_merged), uses, tensor.stored_as)


def _place_nowhere(info: TensorInfo, stage: str) -> StoredTensor:
    return StoredTensor(info.name, info.dtype, info.shape, Pin(f"stage {stage}", 0, ""), 0, info.nbytes)
