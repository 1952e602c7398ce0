"""The formats and layouts that are read, in the order in which they are applied.

A format is one file and one line, here or in `quantized.py`. It takes the offers of what it knows, and gives others in
their place: values and scales become one expression that dequantises, and the scales are offered no more.
"""

from collections.abc import Iterable, Mapping

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.family import Family
from mergemill.engine.checkpoint.weights import StoredTensor
from mergemill.engine.offers.offer import Asked, Format, Offer, Offers
from mergemill.engine.offers.ties import leave_copies, offer_ties
from mergemill.engine.tensors.expressions import Expression, Stored

_PLAIN = ("F64", "F32", "F16", "BF16")  # a model that stores nothing else holds no codes


def offer_adapted(offers: Offers, asked: Asked) -> Offers:
    """Return the offers with the changes of adapters made."""
    if not asked.checkpoint.changes:
        return offers
    from mergemill.engine.offers import adapters  # which few merges need

    return adapters.offer_adapted(offers, asked)


FORMATS: tuple[Format, ...] = (offer_adapted, leave_copies, offer_ties)


def open_offers(
    checkpoints: Mapping[str, Checkpoint], family: Family, made: Mapping[str, Offers], *, quantized: bool = False
) -> Mapping[str, Offers]:
    """Return what each checkpoint of a merge offers, by the name of the model; what is `made` is stored nowhere.

    quantized: whether what is quantised is left as it is stored, to be copied; of GGUF files nothing is.
    """
    quantized = quantized and not any(checkpoint.gguf for checkpoint in checkpoints.values())
    offers = {model: made.get(model) or offer_stored(checkpoint) for model, checkpoint in checkpoints.items()}
    for each in FORMATS if quantized else (*_list_quantized(checkpoints.values()), *FORMATS):
        names = {name: None for found in offers.values() for name in found}  # in the order of the models
        offers = {model: each(found, Asked(checkpoints[model], family, names)) for model, found in offers.items()}
    return offers


def _list_quantized(checkpoints: Iterable[Checkpoint]) -> tuple[Format, ...]:
    """Return the formats of quantised weights, which come first: everything after is told of numbers alone."""
    if not any(map(_may_be_quantized, checkpoints)):
        return ()
    from mergemill.engine.offers.quantized import QUANTIZED  # which merges of plain weights do without

    return QUANTIZED


def _may_be_quantized(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.gguf) or any(tensor.dtype not in _PLAIN for tensor in checkpoint.tensors.values())


def offer_stored(checkpoint: Checkpoint) -> Offers:
    """Return what is stored as it is."""
    return {name: Offer(express(stored), (name,)) for name, stored in checkpoint.tensors.items()}


def express(tensor: StoredTensor) -> Expression:
    """Return a stored tensor as an expression."""
    shape = tensor.shape if tensor.axes is None else tuple(tensor.shape[axis] for axis in tensor.axes)
    stored = Stored(tensor.file, tensor.offset_bytes, tensor.dtype, shape, tensor.read_from)
    if tensor.axes is None:
        return stored
    from mergemill.engine.tensors.permuted import Permuted  # which only pickles need

    return Permuted(stored, tensor.axes)
