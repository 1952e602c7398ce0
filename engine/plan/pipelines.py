"""The output of a merge of pipelines: each component in its folder, in files called as diffusers and transformers do.

``model_index.json`` is written last: without it no loader takes the folder for a pipeline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergemill.engine.checkpoint.checkpoint import Checkpoint, read_file
from mergemill.engine.checkpoint.pipeline import PIPELINE_NAME, read_components
from mergemill.engine.checkpoint.weights import DIFFUSERS_STEM
from mergemill.engine.errors import PlanError
from mergemill.engine.plan.draft import Draft
from mergemill.engine.plan.index import make_index
from mergemill.engine.plan.small_files import copy_pipeline_files
from mergemill.engine.plan.values import OutputTensor, Shard, SmallFile
from mergemill.engine.storage.ranges import join

_OF_TRANSFORMERS = "model"


def check_pipelines(checkpoints: Mapping[str, Checkpoint], where: str) -> bool:
    """Return whether the models are pipelines; `PlanError` where some are."""
    others = [model for model, each in checkpoints.items() if not each.is_pipeline]
    if others and len(others) < len(checkpoints):
        pipeline = next(model for model, each in checkpoints.items() if each.is_pipeline)
        raise PlanError(
            f"{where}: {pipeline} is a pipeline of diffusers and {others[0]} is none; merge pipelines with each other, "
            f"or their components, such as {pipeline}/unet"
        )
    return not others


def write_as_pipeline(draft: Draft, donor: Checkpoint) -> Draft:
    """Return the draft with its tensors in the folders of their components, and the donor's other files."""
    copied, seal = copy_pipeline_files(donor)
    libraries = read_components(read_file(donor, PIPELINE_NAME), where=join(donor.path, PIPELINE_NAME))
    stems = {
        name: f"{name}/{DIFFUSERS_STEM if library == 'diffusers' else _OF_TRANSFORMERS}"
        for name, library in libraries.items()
    }
    return replace(
        draft,
        tensors=[tensor._replace(stem=stems[tensor.name.partition("/")[0]]) for tensor in draft.tensors],
        files=(*copied, *draft.files),
        indices=make_indices,
        seal=lambda shards, tensors: seal,
    )


def make_indices(shards: Sequence[Shard], tensors: Sequence[OutputTensor]) -> tuple[SmallFile, ...]:
    """Return the index of each component that has several shards; one alone is found by its name."""
    made = []
    for stem in dict.fromkeys(tensor.stem for tensor in tensors):
        own = [shard for shard in shards if shard.name.startswith(f"{stem}-")]
        if own:
            index = make_index(own, [tensor for tensor in tensors if tensor.stem == stem])
            made.append(SmallFile(f"{stem}.safetensors.index.json", index.encode(), None))
    return tuple(made)
