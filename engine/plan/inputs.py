"""What an input must be before anything is planned with it: numbers, all of them there, and a model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.config import says_tied
from mergemill.engine.checkpoint.factors import find_factors
from mergemill.engine.checkpoint.family import Family, find_ties, is_vocabulary, split_layer
from mergemill.engine.checkpoint.quantized import find_quantization, find_unread, read_settings
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.beside import is_activation
from mergemill.engine.offers.offer import Offers, find_by_names
from mergemill.engine.plan.filters import iter_parameters
from mergemill.engine.plan.policy import Policies
from mergemill.engine.plan.stacks import Stack
from mergemill.engine.recipe import Recipe


def check_inputs(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], offers: Mapping[str, Offers], family: Family, *, where: str
) -> None:
    """Raise `PlanError` for a model that cannot be merged as it is stored."""
    check_models(checkpoints, offers, family, copied=keeps_quantized(recipe, checkpoints), where=where)


def check_models(
    checkpoints: Mapping[str, Checkpoint], offers: Mapping[str, Offers], family: Family, *, copied: bool, where: str
) -> None:
    """Raise `PlanError` for a model that cannot be read as it is stored; copied: what is quantised is only copied."""
    factors = find_by_names(offers, find_factors)
    for model, checkpoint in checkpoints.items():
        check_input(checkpoint, offers[model], family, where, copied=copied, factors=factors[model])


def check_input(
    checkpoint: Checkpoint,
    offers: Offers,
    family: Family,
    where: str,
    *,
    copied: bool = False,
    factors: Sequence[str] | None = None,
) -> None:
    """Raise `PlanError` for a model that is not whole, or no numbers unless it is `copied` as it is stored.

    factors: those of adapters among its names, where they are known.
    """
    _check_factors(checkpoint, find_factors(offers) if factors is None else factors, where)
    _check_empty(checkpoint, family, where)
    if not copied:
        _check_quantized(checkpoint, offers, where)


def check_heads(
    stacks: Sequence[Stack],
    checkpoints: Mapping[str, Checkpoint],
    family: Family,
    policies: Policies,
    *,
    where: str,
) -> None:
    """Raise `PlanError` for a model without a head whose config says that its embedding is none.

    Such a model is cut short, or is no language model: its embedding would be merged into the others' heads.
    """
    tails = {str(source.model): None for stack in stacks for source in stack.stretches[-1].sources}
    found = {name for model in tails for name in checkpoints[model].tensors if _may_be_tied(name, family)}
    heads = {name for name in found if policies.find(name).action == "merge"}
    for model in tails:
        tensors, config = checkpoints[model].tensors, checkpoints[model].config
        lacking = sorted(heads - tensors.keys()) if says_tied(config) is False else []
        stand_in = next(iter(find_ties(lacking, tensors, family).items()), None)
        if stand_in is not None:
            raise PlanError(
                f"{where}: {model} stores no {stand_in[0]}, and its config says that {stand_in[1]} does not stand for "
                f"it (tie_word_embeddings is false); is the model whole? If it is tied, its config must say true"
            )


def warn_of_missing_head(donor: Checkpoint, names: Sequence[str], family: Family, *, where: str) -> Iterator[str]:
    """Yield a warning where the output, as its inputs, is to have a head of its own and has none."""
    architectures = donor.config.get("architectures")
    generates = isinstance(architectures, list) and any(str(each).endswith("ForCausalLM") for each in architectures)
    if generates and says_tied(donor.config) is False and not any(_may_be_tied(name, family) for name in names):
        yield (
            f"{where}: {donor.ref} has no head, though its config says that the embedding is none "
            f"(tie_word_embeddings is false); loaders will make up a random one"
        )


def _may_be_tied(name: str, family: Family) -> bool:
    return split_layer(name) is None and any(fnmatchcase(name, tied) for tied, _ in family.ties)


def _check_factors(checkpoint: Checkpoint, factors: Sequence[str], where: str) -> None:
    if not factors:
        return
    more = f" and {len(factors) - 1} more" if len(factors) > 1 else ""
    inside = len(factors) < len(checkpoint.tensors)
    what = "holds factors of an adapter (LoRA) that were not merged in" if inside else "is an adapter (LoRA), no model"
    raise PlanError(
        f"{where}: {checkpoint.ref}: {what}: {factors[0]}{more}. Factors cannot be merged one by one: merge them into "
        f"their model, as peft's merge_and_unload does, or give model and adapter as they were, as <model>+<adapter>"
    )


def _check_empty(checkpoint: Checkpoint, family: Family, where: str) -> None:
    """Refuse placeholders: a weight of shape [0], or a vocabulary of no rows."""
    for name, stored in checkpoint.tensors.items():
        if 0 in stored.shape and (is_vocabulary(name, family) or (stored.shape == (0,) and name.endswith(".weight"))):
            raise PlanError(
                f"{where}: {checkpoint.ref}: tensor {name} holds no data (shape {list(stored.shape)}); was it saved "
                f"under ZeRO-3? Save the model again with its weights gathered (stage3_gather_16bit_weights_on_"
                f"model_save, or zero_to_fp32.py)"
            )


def keeps_quantized(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> bool:
    """Whether what is quantised is copied as it is stored: nothing is calculated, and all models have the same way.

    The output then keeps the donor's word for it. (Decided on 2026-11-29: layers of models that are quantised in
    different ways, or of which some are not, are dequantised, since one config cannot speak for them.)
    """
    if not _copies_all(recipe) or any(checkpoint.changes for checkpoint in checkpoints.values()):
        return False
    first, *others = (read_settings(checkpoint) for checkpoint in checkpoints.values())
    return all(each == first for each in others)


def warn_of_dequantized(
    checkpoints: Mapping[str, Checkpoint], offers: Mapping[str, Offers], *, where: str
) -> Iterator[str]:
    """Yield a warning for each model that is quantised, where its tensors are written as plain numbers."""
    for model, checkpoint in checkpoints.items():
        joined = any(len(offer.uses) > 1 for offer in offers[model].values())  # as values and their scales are
        if joined and (found := find_quantization(checkpoint)):
            how = f"is quantized ({found.partition('; ')[0]})"
            yield f"{where}: {model} {how}: its weights are dequantized as they are read and written plain"


def warn_of_activations(
    checkpoints: Mapping[str, Checkpoint], offers: Mapping[str, Offers], *, where: str
) -> Iterator[str]:
    """Yield a warning for each model of which scales of activations or of the cache are left out."""
    for model in checkpoints:
        found = [use for offer in offers[model].values() for use in offer.uses[1:] if is_activation(use)]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            yield (
                f"{where}: {model}: {found[0]}{more} are left out: they scale activations or the cache, and the output "
                f"is not quantized"
            )


def _check_quantized(checkpoint: Checkpoint, offers: Offers, where: str) -> None:
    """Refuse what is quantised and of which no format has made anything."""
    if checkpoint.gguf:
        return  # a type that is not read is refused where the file is opened
    left = {name: each for name, each in checkpoint.tensors.items() if name in offers and offers[name].uses == (name,)}
    read = sum(len(offer.uses) > 1 for offer in offers.values())
    if found := find_unread(left) if read else find_quantization(replace(checkpoint, tensors=left)):
        kind, _, evidence = found.partition("; ")
        raise PlanError(
            f"{where}: {checkpoint.ref}: its weights are quantized ({kind}) and cannot be merged yet: {evidence}; "
            f"give the model as it was before that, in bfloat16 or float32"
        )


def _copies_all(recipe: Recipe) -> bool:
    """Whether the recipe calculates with no weight: what is quantised can be copied."""
    return (
        recipe.merge_method == "passthrough"
        and recipe.dtype is recipe.out_dtype is None
        and recipe.quantize is None
        and not any("scale" in parameters for parameters in iter_parameters(recipe))
    )
