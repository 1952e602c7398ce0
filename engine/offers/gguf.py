"""GGUF files of llama.cpp: blocks as numbers, rows of queries and keys in Hugging Face's order, norms without the 1."""

from mergemill.engine.offers.offer import Asked, Offer, Offers
from mergemill.engine.tensors.blocks import Blocks
from mergemill.engine.tensors.expressions import Stored
from mergemill.engine.tensors.heads import Interleaved
from mergemill.engine.tensors.shifted import Offset


def offer_gguf(offers: Offers, asked: Asked) -> Offers:
    """Return the offers, with what a GGUF file holds as loaders of Hugging Face have it."""
    if not asked.checkpoint.gguf:
        return offers
    return {name: _offer(name, offer, asked) for name, offer in offers.items()}


def _offer(name: str, offer: Offer, asked: Asked) -> Offer:
    facts, expression = asked.checkpoint.gguf.get(asked.checkpoint.called.get(name, name)), offer.expression
    if facts is None or not isinstance(expression, Stored):
        return offer
    kind = facts.kind
    made = (
        expression if kind.dtype else Blocks(expression, kind.name, kind.block, kind.block_bytes, facts.shape, "BF16")
    )
    if facts.shift:
        return Offer(Offset(made, -facts.shift), offer.uses)
    return Offer(Interleaved(made, facts.heads, to_halves=True) if facts.heads else made, offer.uses)
