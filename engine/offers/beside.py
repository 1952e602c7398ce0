"""What stands beside a quantised weight: its scales, and what inference alone needs, which goes with the weight."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.config import CONFIG_DTYPES
from mergemill.engine.checkpoint.weights import HEADER_THREADS
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.storage.ranges import read_into
from mergemill.engine.tensors.expressions import Expression, Stored
from mergemill.engine.tensors.numbers import NUMBER_DTYPES

MOST_SMALL_BYTES = 4096  # of a tensor that is read for the plan

# Of activations and of the cache: a model of plain weights has no use for them.
_ACTIVATIONS = (
    "input_scale",
    "input_scale_ub",
    "input_zero_point",
    "input_global_scale",
    "input_scale_inv",
    "input_scales",
    "activation_scale",
    "activation_scale_inv",
    "output_scale",
    "output_zero_point",
    "pre_quant_scale_inv",
)
_CACHE = ("q_scale", "k_scale", "v_scale", "prob_output_scale", "kv_cache_scaling_factor")


def find_stored(offers: Offers, name: str) -> Stored | None:
    """Return what is stored under a name, unless a format has made something of it."""
    offer = offers.get(name)
    return offer.expression if offer is not None and isinstance(offer.expression, Stored) else None


def find_dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype that a quantised model's weights have by themselves: as its config says, else bfloat16.

    (Decided on 2026-11-29: what a loader that dequantises gives them, whatever the dtype of their scales.)
    """
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            said = str(place.get(key)).removeprefix("torch.")
            found = next((dtype for dtype, word in CONFIG_DTYPES.items() if word == said and dtype != "F64"), None)
            if found is not None:
                return found
    return "BF16"


def make_offer(expression: Expression, uses: Iterable[str], name: str, offers: Offers) -> Offer:
    """Return the offer of a weight: it uses its parts, and what inference alone needs."""
    return Offer(expression, tuple(dict.fromkeys((*uses, *_iter_activations(name, offers)))))


def replace_offers(offers: Offers, made: Mapping[str, Offer]) -> Offers:
    """Return the offers with those that were made, and without what these use."""
    used = {name for offer in made.values() for name in offer.uses}
    left = {name: offer for name, offer in offers.items() if name not in used or name in made}
    return dict(sorted({**left, **made}.items()))


def is_activation(name: str) -> bool:
    """Whether a tensor is of no use for weights that are not quantised."""
    return name.endswith((*_ACTIVATIONS, *_CACHE))


def check_numbers(name: str, stored: Stored, checkpoint: Checkpoint) -> None:
    """Raise `PlanError` for scales or zero points that are no numbers."""
    if stored.dtype not in NUMBER_DTYPES:
        raise refuse(checkpoint, name, f"is stored as {stored.dtype}, which no scale is")


def refuse(checkpoint: Checkpoint, name: str, why: str) -> PlanError:
    """Return the error of a quantised tensor that is not what its format says."""
    return PlanError(f"{checkpoint.ref}: tensor {name} {why}; is the model damaged, or of another format?")


def _iter_activations(name: str, offers: Offers) -> Iterator[str]:
    stem = name.removesuffix(".weight")
    joint = "." if name.endswith(".weight") else "_"
    module, _, last = stem.rpartition(".")
    beside = [f"{stem}{joint}{each}" for each in (*_ACTIVATIONS, *_CACHE)]
    if last in ("q_proj", "k_proj", "v_proj", "qkv_proj", "kv_b_proj", "query_key_value"):
        own = f"{last[0]}_scale"  # of the cache, which has one for each layer
        beside += [f"{module}.{each}" for each in ((own,) if last in ("q_proj", "v_proj") else _CACHE)]
    yield from (each for each in beside if each in offers)


def read_said(checkpoint: Checkpoint, names: Sequence[str]) -> Mapping[str, bytes]:
    """Return the bytes of small tensors that say what stands nowhere else; `PlanError` for one that is not small.

    They are the only data that a plan reads, several at a time, since each waits for its storage.
    """

    def read(name: str) -> bytes:
        stored = checkpoint.tensors[name]
        if stored.nbytes > MOST_SMALL_BYTES:
            raise refuse(checkpoint, name, f"has {stored.nbytes} bytes; such a tensor has at most {MOST_SMALL_BYTES}")
        data = bytearray(stored.nbytes)
        read_into(stored.read_from or stored.file, stored.offset_bytes, memoryview(data), checkpoint.storage)
        return bytes(data)

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))
