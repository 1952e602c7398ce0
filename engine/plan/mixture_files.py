"""The small files of a mixture: the base's config as a mixture's, its tokenizer, the recipe and the card."""

from collections.abc import Sequence

from mergemill.engine.checkpoint.card import Card, make_card
from mergemill.engine.checkpoint.checkpoint import CONFIG_NAME
from mergemill.engine.checkpoint.config import CONFIG_DTYPES, REMOVED, dtype_changes, make_config
from mergemill.engine.checkpoint.copied_files import copied_files
from mergemill.engine.checkpoint.quantized import QUANTIZATION_FILES, find_keys
from mergemill.engine.plan.architectures import Architecture, Sizes, make_changes
from mergemill.engine.plan.small_files import (
    CARD_NAME,
    RECIPE_NAME,
    Inputs,
    copy_file,
    find_library,
    find_loader,
    find_main_dtype,
    tell_commits,
    write_recipe,
)
from mergemill.engine.plan.values import OutputTensor, SmallFile
from mergemill.engine.recipe import Mixture

SOURCE = 'Jiang et al., "Mixtral of Experts", arXiv:2401.04088.'


def make_mixture_files(
    mixture: Mixture,
    architecture: Architecture,
    inputs: Inputs,
    tensors: Sequence[OutputTensor],
    sizes: Sizes,
) -> tuple[SmallFile, ...]:
    """Return the files in the order in which they are written, before the index."""
    donor = inputs.donor
    changes = make_changes(architecture, donor.config, sizes) | dict.fromkeys(find_keys(donor.config), REMOVED)
    if (dtype := CONFIG_DTYPES.get(find_main_dtype(tensors))) is not None:
        changes |= dtype_changes(donor.config, dtype)
    made = {
        CARD_NAME: _make_card(mixture, architecture, inputs, tensors, sizes).encode(),
        CONFIG_NAME: make_config(donor.config_text, changes),
        RECIPE_NAME: write_recipe(mixture).encode(),
    }
    names = sorted({*copied_files(donor.files)} - {*QUANTIZATION_FILES})
    copied = [copy_file(name, donor) for name in names]
    return (*copied, *(SmallFile(name, data, None) for name, data in made.items()))


def _make_card(
    mixture: Mixture, architecture: Architecture, inputs: Inputs, tensors: Sequence[OutputTensor], sizes: Sizes
) -> str:
    title = " + ".join(name.rstrip("/").rsplit("/", 1)[-1] for name in inputs.models)
    chosen, shared = mixture.experts_per_token * mixture.granularity, f", {sizes.shared} shared" if sizes.shared else ""
    method = f"A mixture of {sizes.experts} experts{shared}, of which {chosen} work on a token ({architecture.name})"
    return make_card(
        Card(
            title=f"{title} (mixture of experts)",
            method_title=f"{method}; gates: {mixture.gate_mode}",
            method_source=SOURCE,
            models=list(inputs.stored),
            recipe_text=write_recipe(mixture),
            dtypes=sorted({tensor.dtype for tensor in tensors}),
            tensor_count=len(tensors),
            parameter_count=sum(tensor.expression.size for tensor in tensors),
            about="A mixture of experts, made of models with mergemill.",
            terms=inputs.terms,
            commits=tell_commits(inputs.stored),
            loader=find_loader(inputs.donor)
            if architecture.name != "deepseek"
            else "",  # which only its own code loads
            library=find_library(inputs.donor),
        )
    )
