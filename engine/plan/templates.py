"""Which chat template the output has."""

from collections.abc import Mapping

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.vocabulary import read_object
from mergemill.engine.plan.token_warnings import find_template
from mergemill.engine.recipe import Recipe
from mergemill.engine.tokens.reading import TOKENIZER_CONFIG_NAME
from mergemill.engine.tokens.templates import TEMPLATES, check_template, choose_most


def choose_template(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], *, where: str) -> str | None:
    """Return the chat template that is written; None where the vocabulary's source keeps its own, or nobody has one.

    Raises `PlanError` for what is no Jinja.
    """
    asked = recipe.chat_template
    if asked is None:
        return None
    if asked == "auto":
        found = {model: text for model, each in checkpoints.items() if (text := _find(each)) is not None}
        template = choose_most(found)
    else:
        template = TEMPLATES.get(asked, asked)
    if template is not None:
        check_template(template, where, given=asked != "auto")
    return template


def _find(checkpoint: Checkpoint) -> str | None:
    named = TOKENIZER_CONFIG_NAME in checkpoint.files
    return find_template(checkpoint, None, read_object(checkpoint, TOKENIZER_CONFIG_NAME) if named else {})
