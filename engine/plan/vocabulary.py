"""The output's vocabulary: which models have which, and what a recipe makes of them."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from mergemill.engine.checkpoint import same_tokenizer
from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.family import Family, is_vocabulary
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offers
from mergemill.engine.plan.renumbering import Renumbering
from mergemill.engine.recipe import ModelRef, Recipe
from mergemill.engine.tokens import read_vocabulary_of
from mergemill.engine.tokens.joining import join_vocabularies
from mergemill.engine.tokens.placing import MOST_MULTIPLE, list_ids
from mergemill.engine.tokens.writing import find_fault, find_half

_SAVE = "AutoTokenizer.from_pretrained(…).save_pretrained(…) of transformers writes one"


def make_renumbering(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    offers: Mapping[str, Offers],
    donor: str,
    family: Family,
    seed: int = 0,
) -> Renumbering | None:
    """Return how the vocabulary is made; None where nothing asks for one, or nothing is known and all agree."""
    settings, where = recipe.tokenizer, recipe.file or "recipe"
    if settings is None:
        return None
    if (settings.pad_to_multiple_of or 1) > MOST_MULTIPLE:
        raise PlanError(
            f"{where}: pad_to_multiple_of is {settings.pad_to_multiple_of}; it may be {MOST_MULTIPLE} at most"
        )
    source = str(settings.source) if isinstance(settings.source, ModelRef) else donor
    for text, token in settings.tokens.items():
        if token.force and token.source is None:
            raise PlanError(f"{where}: tokens: {text!r}: force needs a source, whose row every input is given")
    embeddings = {model: find_embedding(found, family) for model, found in offers.items()}
    rows = {model: offers[model][name].shape[0] if name else 0 for model, name in embeddings.items()}
    found = {model: read_vocabulary_of(checkpoint) for model, checkpoint in checkpoints.items()}
    if found[source] is None:
        if _agree(checkpoints, source) and not settings.tokens and not settings.pad_to_multiple_of:
            return None
        raise PlanError(f"{where}: the vocabulary of {source} {_say_unread(checkpoints[source])}")
    own = found[source]
    assert own is not None
    known = {model: each.within(rows[model]) for model, each in found.items() if each is not None}
    for model, each in found.items():
        if each is None:
            _check_unread(checkpoints[model], checkpoints[source], rows[model], known[source].size, where)
    joined = join_vocabularies(known, source, union=settings.source == "union", asked=list(settings.tokens))
    if not joined.is_source and (fault := find_fault(own)):
        raise PlanError(f"{where}: no token can be added to the vocabulary of {source}, which {fault}; {_SAVE}")
    if not joined.is_source and (half := find_half(joined)) is not None:
        model = next((model for model, each in known.items() if half in each.ids), where)
        raise PlanError(
            f"{where}: token {half!a} of {model} is half a surrogate pair, which no tokenizer.json loads with; leave "
            "it out of that model's tokenizer.json"
        )
    ids = {model: list_ids(joined, known.get(model, known[source])) for model in checkpoints}
    beyond = tuple(token for token in own.ids if token not in known[source].ids)
    return Renumbering(joined, known, ids, settings, family, embeddings[source], rows[source], where, beyond, seed)


def find_embedding(offers: Offers, family: Family) -> str:
    """Return the name of a model's embedding: of several such matrices, the first that the family names."""
    found = [name for name, offer in offers.items() if len(offer.shape) == 2 and is_vocabulary(name, family)]
    each = (name for pattern in family.vocabulary for name in found if fnmatchcase(name, pattern))
    return next(each, "")


def _agree(checkpoints: Mapping[str, Checkpoint], source: str) -> bool:
    return all(same_tokenizer(checkpoints[source], each) for model, each in checkpoints.items() if model != source)


def _say_unread(checkpoint: Checkpoint) -> str:
    held = [name for name in checkpoint.files if name.endswith((".model", ".tiktoken")) or name == "tekken.json"]
    if held:
        return f"is in {', '.join(held)} alone, which cannot be joined with others; it needs a tokenizer.json: {_SAVE}"
    return f"cannot be found: it has no tokenizer.json; {_SAVE}"


def _check_unread(model: Checkpoint, source: Checkpoint, rows: int, size: int, where: str) -> None:
    """Refuse a vocabulary that cannot be read, unless it is the source's, or there is none and it has rows for that."""
    if same_tokenizer(model, source):
        return
    said = _say_unread(model)
    if said.startswith("is in ") or rows < size:
        raise PlanError(f"{where}: the vocabulary of {model.ref} {said}")
