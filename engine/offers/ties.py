"""Tied tensors: where a model stores none of a name that others have, the one that it uses instead stands for it.

The config's word counts. A model that says it is tied may store a copy of its embedding as its head; older loaders have
always used the embedding alone. The copy is no offer, so that the output stays tied and does not depend on which of the
models stores one. (Decided on 2026-11-29; transformers 5 takes such a head where its values differ. Headers cannot say
whether they do, so the plan tells of each that is left out.)
"""

from collections.abc import Iterator, Mapping

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.config import says_tied
from mergemill.engine.checkpoint.family import Family, find_ties, is_head
from mergemill.engine.checkpoint.weights import StoredTensor
from mergemill.engine.offers.offer import Asked, Offers


def leave_copies(offers: Offers, asked: Asked) -> Offers:
    """Return the offers without heads that are copies; it comes before `offer_ties`, which none then asks for them."""
    copies = find_copies(asked.checkpoint, asked.family)
    return {name: offer for name, offer in offers.items() if name not in copies} if copies else offers


def offer_ties(offers: Offers, asked: Asked) -> Offers:
    """Return the offers, and those of tied tensors under the names of what they stand for."""
    ties = find_ties([name for name in asked.names if name not in offers], offers, asked.family)
    return {**offers, **{name: offers[tie] for name, tie in ties.items()}}


def find_copies(checkpoint: Checkpoint, family: Family) -> Mapping[str, str]:
    """Return the heads that are stored though the config says that the model is tied, and what they are tied to.

    A head that an adapter changes or brings is none of them.
    """
    if says_tied(checkpoint.config) is not True:
        return {}
    stored, names = checkpoint.tensors, {old: new for new, old in checkpoint.called.items()}
    changed = {names.get(change.tensor, change.tensor) for change in checkpoint.changes}
    ties = find_ties([n for n in stored if is_head(n, family) and n not in changed], stored, family)
    return {head: tie for head, tie in ties.items() if _lie_together(stored[head], stored[tie])}


def warn_of_copies(checkpoints: Mapping[str, Checkpoint], family: Family, *, where: str) -> Iterator[str]:
    """Yield a warning for each head that is left out."""
    for model, checkpoint in checkpoints.items():
        for head, tie in find_copies(checkpoint, family).items():
            yield (
                f"{where}: {model} stores {head} though its config says that it is tied to {tie}, which is taken for "
                f"it; if that head is one of its own, set tie_word_embeddings: false in the model's config.json"
            )


def _lie_together(head: StoredTensor, tie: StoredTensor) -> bool:
    return head.shape == tie.shape and head.file.url.rpartition("/")[0] == tie.file.url.rpartition("/")[0]
