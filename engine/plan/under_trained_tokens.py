"""Under-trained tokens of the models of a transplant: their embeddings and heads are read for it when it is planned."""

import functools
from collections.abc import Iterator

import numpy as np

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.offers.offer import Offer
from mergemill.engine.storage.store import Storage
from mergemill.engine.tensors.slabs import SLAB, Span, iter_slabs, row_block
from mergemill.engine.tokens import Vocabulary
from mergemill.engine.transplants.under_trained import Floats, find_under_trained

_UNUSED = ("unused", "reserved")  # how tokens begin that were kept for later, but for what is around them


def find_bad(model: Checkpoint, vocabulary: Vocabulary, embedding: Offer, head: Offer | None) -> frozenset[int]:
    """Return the ids of a model's tokens and rows that were hardly trained."""
    rows = embedding.shape[0]
    names = {number: token for token, number in vocabulary.ids.items()}
    unused = [number for number in range(rows) if number not in names or _is_unused(names[number])]
    first = functools.partial(_iter_rows, embedding, model.storage)
    second = None if head is None else functools.partial(_iter_rows, head, model.storage)
    return frozenset(find_under_trained(first, second, unused).tolist())


def _is_unused(token: str) -> bool:
    """Whether a token says of itself that it is not used.

    >>> [_is_unused(each) for each in ("[unused5]", "<|reserved_special_token_2|>", "<unused7>", "reserved", "▁used")]
    [True, True, True, True, False]
    """
    return token.lower().lstrip("<|[▁Ġ").startswith(_UNUSED)


def _iter_rows(offer: Offer, storage: Storage) -> Iterator[Floats]:
    """Yield a matrix's rows as float64, a slab at a time."""
    from mergemill.engine.tensors.thin import settle_whole  # these are what runs need, and plans do not
    from mergemill.engine.tensors.workspace import Workspace, aligned

    matrix = offer.expression
    width, slab = matrix.shape[1], Span(0, min(matrix.size, SLAB + row_block(matrix.shape)))
    held = sum(aligned(read.size_bytes) for read in (*matrix.reads(slab), *matrix.holds(Span(0, matrix.size))))
    arena = np.empty(2 * held + 4 * matrix.slab_bytes(slab.size, "F32") + (1 << 16), np.uint8)
    with Workspace(arena, storage=storage) as work:
        ready = settle_whole(matrix, work)
        for span in iter_slabs(Span(0, matrix.size), SLAB, row_block(matrix.shape)):
            work.next_slab()
            yield ready.slab(span, work, "F32").double().numpy().reshape(-1, width)
