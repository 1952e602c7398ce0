"""The two models of a transplant, open: what they store for their vocabularies, and which tensor is which."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mergemill.engine.checkpoint.config import says_tied
from mergemill.engine.checkpoint.family import Family, choose_family, is_vocabulary, may_be_tied, split_layer
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.formats import open_offers
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.recipe import parse_reference
from mergemill.engine.storage.store import make_storage
from mergemill.engine.tokens import Vocabulary, read_vocabulary_of
from mergemill.engine.transplants.mp_rope import Rotary

_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class VocabularyTensor:
    """A tensor of the model with a row for each token."""

    name: str
    model: Offer
    donor: Offer | None  # the donor's, with the rows that show which tokens are like which; None: it has none
    donor_rows: int  # of its embedding
    is_head: bool
    is_bias: bool


@dataclass(frozen=True, slots=True)
class VocabularyPlaces:
    """A model's vocabulary tensors by what they are."""

    embedding: Offer
    embedding_name: str
    head: Offer | None
    head_name: str
    biases: Mapping[str, Offer]


@dataclass(frozen=True, slots=True)
class Pair:
    """The model, and the donor of the tokenizer."""

    model: Checkpoint
    donor: Checkpoint
    offers: Offers  # of the model
    sites: tuple[VocabularyTensor, ...]  # the embedding first
    model_vocabulary: Vocabulary
    donor_vocabulary: Vocabulary
    model_places: VocabularyPlaces
    donor_places: VocabularyPlaces
    model_bad: frozenset[int] = frozenset()  # rows that were hardly trained, where these are asked for
    donor_bad: frozenset[int] = frozenset()


def open_pair(model: str, donor: str, storage: Mapping[str, Mapping[str, Any]]) -> Pair:
    """Open both; `PlanError`, or another `InputError`, says what is not as a transplant needs it."""
    reached = make_storage(storage)
    checkpoints = [_open(ref, reached) for ref in (model, donor)]
    offers = [_offer(each, quantized=number == 0) for number, each in enumerate(checkpoints)]
    vocabularies = [_read_vocabulary(each) for each in checkpoints]
    places = [_find_places(*each) for each in zip(checkpoints, offers, strict=True)]
    sites = tuple(_make_sites(places[0], places[1], checkpoints))
    return Pair(
        checkpoints[0], checkpoints[1], offers[0], sites, vocabularies[0], vocabularies[1], places[0], places[1]
    )


def find_rotary(pair: Pair) -> tuple[Rotary, Rotary]:
    """Return how the positions of donor and model turn their heads; `PlanError` where a config does not say it."""
    sites = pair.sites[0]
    assert sites.donor is not None
    return (
        _read_rotary(pair.donor, sites.donor.shape[1]),
        _read_rotary(pair.model, sites.model.shape[1]),
    )


def _open(ref: str, storage: Any) -> Checkpoint:
    given = parse_reference(ref)
    if given.lora is not None:
        raise PlanError(f"{ref}: an adapter must be merged first, then the tokenizer transplanted")
    checkpoint = open_checkpoint(given.path, given.revision, storage)
    if checkpoint.is_pipeline or not checkpoint.config:
        raise PlanError(f"{ref}: is no language model with a config.json; a tokenizer is transplanted between those")
    return checkpoint


def _offer(checkpoint: Checkpoint, *, quantized: bool) -> Offers:
    name = checkpoint.ref
    return open_offers({name: checkpoint}, choose_family(checkpoint.config), {}, quantized=quantized)[name]


def _read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    found = read_vocabulary_of(checkpoint)
    if found is None or not found.tokenizer:
        raise PlanError(f"{checkpoint.ref}: has no tokenizer.json; save its tokenizer with transformers")
    return found


def _find_places(checkpoint: Checkpoint, offers: Offers) -> VocabularyPlaces:
    family = choose_family(checkpoint.config)
    found = {name: offer for name, offer in offers.items() if _is_of_vocabulary(name, family)}
    heads = {name: each for name, each in found.items() if len(each.shape) == 2 and may_be_tied(name, family)}
    embeddings = {name: each for name, each in found.items() if len(each.shape) == 2 and name not in heads}
    if says_tied(checkpoint.config):
        heads = {}  # a copy that loaders do not look at
    if len(embeddings) != 1 or len(heads) > 1:
        named = ", ".join([*embeddings, *heads]) or "none"
        raise PlanError(f"{checkpoint.ref}: needs one embedding and at most one head, and has: {named}")
    [(name, embedding)] = embeddings.items()
    for each, offer in {**embeddings, **heads}.items():
        if offer.dtype not in _FLOATS:
            raise PlanError(f"{checkpoint.ref}: {each} is {offer.dtype}; a transplant needs {', '.join(_FLOATS)}")
    biases = {each: offer for each, offer in found.items() if len(offer.shape) == 1}
    head = next(iter(heads.items()), ("", None))
    return VocabularyPlaces(embedding, name, head[1], head[0], biases)


def _is_of_vocabulary(name: str, family: Family) -> bool:
    return is_vocabulary(name, family) and split_layer(name) is None


def _make_sites(
    model: VocabularyPlaces, donor: VocabularyPlaces, checkpoints: list[Checkpoint]
) -> list[VocabularyTensor]:
    rows, own_rows = donor.embedding.shape[0], model.embedding.shape[0]
    sites = [
        VocabularyTensor(model.embedding_name, model.embedding, donor.embedding, rows, is_head=False, is_bias=False)
    ]
    if model.head is not None:
        if model.head.shape[0] != own_rows:
            raise PlanError(
                f"{checkpoints[0].ref}: {model.head_name} has {model.head.shape[0]} rows, its embedding {own_rows}; "
                "they must be the same tokens"
            )
        sites.append(
            VocabularyTensor(
                model.head_name, model.head, donor.head or donor.embedding, rows, is_head=True, is_bias=False
            )
        )
    biases = [(name, each) for name, each in model.biases.items() if each.shape[0] == own_rows]
    return sites + [VocabularyTensor(name, each, None, rows, is_head=True, is_bias=True) for name, each in biases]


def _read_rotary(checkpoint: Checkpoint, width: int) -> Rotary:
    config = checkpoint.config
    parts = [config, *(config[key] for key in ("text_config",) if isinstance(config.get(key), Mapping))]
    heads, head_width, theta = (
        next((value for part in parts if type(value := _look(part, key)) in (int, float)), None)
        for key in ("num_attention_heads", "head_dim", "rope_theta")
    )
    head_width = head_width or (width // heads if heads else None)
    if not head_width or not theta or head_width % 2 or width % head_width:
        raise PlanError(
            f"{checkpoint.ref}: mp_rope needs num_attention_heads or head_dim, and rope_theta, in its config, and rows "
            f"of {width} that are whole heads; take --method omp"
        )
    return Rotary(int(head_width), float(theta))


def _look(part: Mapping[str, Any], key: str) -> Any:
    inner = part.get("rope_parameters")
    return part.get(key) if key in part else inner.get(key) if isinstance(inner, Mapping) else None
