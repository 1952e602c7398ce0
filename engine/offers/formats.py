"""The formats and layouts that are read, in the order in which they are applied.

A format is one file and one line here. It takes the offers of what it knows, and gives others in their place: values
and scales become one expression that dequantises, and the scales are offered no more.
"""

from collections.abc import Mapping

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.family import Family
from mergemill.engine.checkpoint.weights import StoredTensor
from mergemill.engine.offers.adapters import offer_adapted
from mergemill.engine.offers.bitsandbytes import offer_bitsandbytes
from mergemill.engine.offers.fp4 import offer_fp4
from mergemill.engine.offers.gguf import offer_gguf
from mergemill.engine.offers.gptq import offer_gptq
from mergemill.engine.offers.mxfp4 import offer_mxfp4
from mergemill.engine.offers.offer import Asked, Format, Offer, Offers
from mergemill.engine.offers.packed import offer_packed
from mergemill.engine.offers.scaled import offer_scaled
from mergemill.engine.offers.ties import leave_copies, offer_ties
from mergemill.engine.tensors.expressions import Expression, Stored
from mergemill.engine.tensors.permuted import Permuted

# Of quantised weights: values and scales as one. They come first: everything after is told of numbers alone.
QUANTIZED: tuple[Format, ...] = (
    offer_gguf,
    offer_bitsandbytes,
    offer_gptq,
    offer_packed,
    offer_mxfp4,
    offer_fp4,
    offer_scaled,
)
FORMATS: tuple[Format, ...] = (offer_adapted, leave_copies, offer_ties)


def open_offers(
    checkpoints: Mapping[str, Checkpoint], family: Family, made: Mapping[str, Offers], *, quantized: bool = False
) -> Mapping[str, Offers]:
    """Return what each checkpoint of a merge offers, by the name of the model; what is `made` is stored nowhere.

    quantized: whether what is quantised is left as it is stored, to be copied.
    """
    offers = {model: made.get(model) or offer_stored(checkpoint) for model, checkpoint in checkpoints.items()}
    for each in FORMATS if quantized else (*QUANTIZED, *FORMATS):
        names = {name: None for found in offers.values() for name in found}  # in the order of the models
        offers = {model: each(found, Asked(checkpoints[model], family, names)) for model, found in offers.items()}
    return offers


def offer_stored(checkpoint: Checkpoint) -> Offers:
    """Return what is stored as it is."""
    return {name: Offer(express(stored), (name,)) for name, stored in checkpoint.tensors.items()}


def express(tensor: StoredTensor) -> Expression:
    """Return a stored tensor as an expression."""
    shape = tensor.shape if tensor.axes is None else tuple(tensor.shape[axis] for axis in tensor.axes)
    stored = Stored(tensor.file, tensor.offset_bytes, tensor.dtype, shape, tensor.read_from)
    return stored if tensor.axes is None else Permuted(stored, tensor.axes)
