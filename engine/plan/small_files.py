"""The small files of the output: config, tokenizer, generation config, model card and recipe."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergemill.engine.checkpoint.card import Card, make_card
from mergemill.engine.checkpoint.checkpoint import CONFIG_NAME, Checkpoint, check_file
from mergemill.engine.checkpoint.config import (
    CONFIG_DTYPES,
    REMOVED,
    Changes,
    dtype_changes,
    layer_changes,
    make_config,
    says_tied,
    tie_changes,
)
from mergemill.engine.checkpoint.family import Family, choose_family, find_tie, is_head
from mergemill.engine.checkpoint.later import later_changes, list_later
from mergemill.engine.checkpoint.needed import Needed
from mergemill.engine.checkpoint.pipeline import PIPELINE_NAME
from mergemill.engine.checkpoint.quantized import QUANTIZATION_FILES, find_keys
from mergemill.engine.checkpoint.terms import CARD_NAME as CARD_NAME
from mergemill.engine.checkpoint.terms import Terms, read_terms
from mergemill.engine.methods.contract import Method
from mergemill.engine.methods.own import MethodsFile
from mergemill.engine.plan.inputs import keeps_quantized
from mergemill.engine.plan.stacks import Stack
from mergemill.engine.plan.tokenizer_files import TokenizerFiles
from mergemill.engine.plan.values import OutputTensor, SmallFile
from mergemill.engine.recipe import AnyRecipe, Recipe
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.quantizing import Quantized

RECIPE_NAME = "recipe.yml"
GATES_NAME = "gates.safetensors"  # of a mixture whose routers are not drawn at random
_AT_COMMIT = re.compile(r"hf://[^/@]+/[^/@]+@(?P<commit>[0-9a-f]{40})")


@dataclass(frozen=True, slots=True)
class Inputs:
    """The models of a merge, by their names."""

    models: Mapping[str, Checkpoint]
    stored: Mapping[str, Checkpoint]  # those that are stored somewhere: of a stage, the models that it is made from
    donor: Checkpoint  # of config and tokenizer
    terms: Mapping[str, Terms]  # of those that are stored


def make_inputs(models: Mapping[str, Checkpoint], stored: Mapping[str, Checkpoint], donor: Checkpoint) -> Inputs:
    """Return the models of a merge with what their cards say, which is read here."""
    return Inputs(models, stored, donor, {model: read_terms(each) for model, each in stored.items()})


def make_files(
    recipe: Recipe,
    method: Method,
    inputs: Inputs,
    stacks: Sequence[Stack],
    tensors: Sequence[OutputTensor],
    needed: Needed,
    words: TokenizerFiles,
    code: Sequence[MethodsFile] = (),
) -> tuple[SmallFile, ...]:
    """Return the files in the order in which they are written, before the index.

    The user's own methods are among them, so that the recipe works from there, and that the plan's digest covers them.
    Where what is quantised is not copied as it is, nothing says any more that it were.
    """
    donor, quantized = inputs.donor, keeps_quantized(recipe, inputs.models)
    made = {file.name: file.text.encode() for file in code}
    made[RECIPE_NAME] = write_recipe(recipe).encode()
    made[CARD_NAME] = _card(recipe, method, inputs, tensors, code).encode()
    if donor.config_text:
        changes = _config_changes(donor, inputs.models, choose_family(donor.config), stacks, tensors)
        changes |= words.changes
        if not quantized:
            changes |= dict.fromkeys(find_keys(donor.config), REMOVED)
        made[CONFIG_NAME] = make_config(donor.config_text, changes)
    made |= words.made
    said = set() if quantized else {*donor.files}.intersection(QUANTIZATION_FILES)
    found = {**dict.fromkeys(needed.present, donor), **dict(words.list_copied(donor))}
    kept = set(QUANTIZATION_FILES).intersection(donor.files) if quantized else set()
    names = sorted({*found, *kept} - said - made.keys())
    copied = [copy_file(name, found.get(name, donor)) for name in names]
    files = [SmallFile(name, data, None) for name, data in sorted(made.items())]
    return (*copied, *files)


def copy_file(name: str, model: Checkpoint) -> SmallFile:
    """Return one of a model's files, to be written as it is: copied, or written where it lies nowhere."""
    if name in model.made:
        return SmallFile(name, model.made[name], None)
    return SmallFile(name, None, check_file(model, name))


def copy_pipeline_files(pipeline: Checkpoint) -> tuple[tuple[SmallFile, ...], SmallFile]:
    """Return the files of a pipeline beside its components' weights, and the one that names these, which is last."""
    names = [name for name in pipeline.files if "/" in name]
    copied = tuple(SmallFile(name, None, check_file(pipeline, name)) for name in names)
    return copied, SmallFile(PIPELINE_NAME, None, check_file(pipeline, PIPELINE_NAME))


def make_raw_files(
    recipe: Recipe,
    method: Method,
    inputs: Inputs,
    tensors: Sequence[OutputTensor],
    code: Sequence[MethodsFile],
) -> tuple[SmallFile, ...]:
    """Return the files of a merge of dictionaries of tensors: recipe and card alone, and the user's own methods."""
    made = {file.name: file.text for file in code}
    made[RECIPE_NAME] = write_recipe(recipe)
    made[CARD_NAME] = _card(recipe, method, inputs, tensors, code)
    return tuple(SmallFile(name, text.encode(), None) for name, text in sorted(made.items()))


def warn_of_missing_files(needed: Needed, donor: str, *, where: str) -> list[str]:
    """Return a warning for each file that the donor's configs name and its folder lacks: so will the output."""
    return [f"{where}: {donor} names {name} and does not have it; nor will the output" for name in needed.missing]


def write_recipe(recipe: AnyRecipe) -> str:
    """Return the recipe as its file had it, or as JSON, which is YAML too, where it came from Python."""
    return recipe.text or json.dumps(recipe.model_dump(mode="json", exclude_none=True), indent=2) + "\n"


def _config_changes(
    donor: Checkpoint,
    checkpoints: Mapping[str, Checkpoint],
    family: Family,
    stacks: Sequence[Stack],
    tensors: Sequence[OutputTensor],
) -> Changes:
    changes: Changes = {}
    for stack in (stack for stack in stacks if not stack.whole):
        layers = [(checkpoints[model].config, layer) for model, layer in stack.givers(donor.ref)]
        changes |= layer_changes(donor.config, family, stack.name, layers)
    if list_later(donor.tensors, donor.config, family) - {tensor.name for tensor in tensors}:
        changes |= later_changes(donor.config)
    dtype = CONFIG_DTYPES.get(find_main_dtype(tensors))
    if dtype is not None:
        changes |= dtype_changes(donor.config, dtype)
    if any(_was_tied(tensor.name, donor, family) for tensor in tensors):
        changes |= tie_changes(donor.config, tied=False)
    return changes


def find_main_dtype(tensors: Sequence[OutputTensor]) -> str:
    """Return the dtype in which most of the bytes are written of what is not quantised."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if not isinstance(tensor.expression, Quantized):
            sizes[tensor.dtype] += _size(tensor) * item_bytes(tensor.dtype)
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype), default="")


def _was_tied(name: str, donor: Checkpoint, family: Family) -> bool:
    """Whether the output stores a head for which the donor used its embedding.

    A tied donor may store a copy of its embedding as its head; that is no offer, so what is written is a head.
    """
    if not is_head(name, family) or find_tie(name, donor.tensors, family) is None:
        return False
    return name not in donor.tensors or says_tied(donor.config) is True


def tell_commits(stored: Mapping[str, Checkpoint]) -> Mapping[str, str]:
    """Return the commits at which models of the Hub were read, by the models."""
    found = {model: _AT_COMMIT.match(each.path) for model, each in stored.items()}
    return {model: match["commit"] for model, match in found.items() if match}


def find_library(donor: Checkpoint) -> str:
    """Return which library loads the output; empty where nobody can say."""
    return "diffusers" if donor.is_pipeline else "transformers" if donor.config else ""


def find_loader(donor: Checkpoint) -> str:
    """Return the class of transformers that loads a language model; empty for what is none."""
    named = donor.config.get("architectures")
    generates = isinstance(named, list) and any(str(each).endswith("ForCausalLM") for each in named)
    return "AutoModelForCausalLM" if generates else ""


def _card(
    recipe: Recipe,
    method: Method,
    inputs: Inputs,
    tensors: Sequence[OutputTensor],
    code: Sequence[MethodsFile],
) -> str:
    title = " + ".join(name.rstrip("/").rsplit("/", 1)[-1] for name in inputs.models)
    card = Card(
        title=f"{title} ({method.name})",
        method_title=method.title.removesuffix("."),
        method_source=method.source,
        models=list(inputs.stored),
        recipe_text=write_recipe(recipe),
        code={file.name: file.sha256 for file in code},
        terms=inputs.terms,
        commits=tell_commits(inputs.stored),
        loader=find_loader(inputs.donor),
        library=find_library(inputs.donor),
        dtypes=sorted({each.dtype for tensor in tensors for each in tensor.stored_as or (tensor,)}),
        tensor_count=sum([len(tensor.stored_as) or 1 for tensor in tensors]),
        parameter_count=sum(map(_size, tensors)),
    )
    return make_card(card)


def _size(tensor: OutputTensor) -> int:
    expression = tensor.expression
    return expression.inner.size if isinstance(expression, Quantized) else expression.size
