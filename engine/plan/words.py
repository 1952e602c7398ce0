"""Tokenizer, chat template and ids of an output: decided together, told together."""

from collections.abc import Iterator, Sequence
from itertools import chain

from mergemill.engine.plan.renumbering import Renumbering
from mergemill.engine.plan.small_files import Inputs
from mergemill.engine.plan.templates import choose_template
from mergemill.engine.plan.token_warnings import warn_of_files, warn_of_ids
from mergemill.engine.plan.tokenizer_files import TokenizerFiles, make_tokenizer_files, warn_of_left_out
from mergemill.engine.plan.values import OutputTensor, SmallFile
from mergemill.engine.recipe import ModelRef, Recipe


def make_words(
    recipe: Recipe, inputs: Inputs, tensors: Sequence[OutputTensor], renumbering: Renumbering | None, *, where: str
) -> TokenizerFiles:
    """Return what becomes of the files of tokenizers."""
    settings = recipe.tokenizer
    named = settings is not None and isinstance(settings.source, ModelRef)
    source = inputs.models[str(settings.source)] if settings is not None and named else inputs.donor
    shapes = {tensor.name: tensor.expression.shape for tensor in tensors}
    rows = shapes[renumbering.embedding][0] if renumbering is not None and renumbering.embedding in shapes else None
    template = choose_template(recipe, inputs.models, where=where)
    return make_tokenizer_files(inputs.donor, source, renumbering, rows, template)


def warn_of_words(
    files: Sequence[SmallFile], words: TokenizerFiles, inputs: Inputs, renumbering: Renumbering | None, *, where: str
) -> Iterator[str]:
    """Yield what of it is not as one might think."""
    if renumbering is None:
        yield from warn_of_ids(inputs.donor, inputs.models, where=where)
    else:
        yield from chain(renumbering.warn(), warn_of_left_out(words, where=where))
    yield from warn_of_files(files, words, inputs.donor, renumbering, where=where)
