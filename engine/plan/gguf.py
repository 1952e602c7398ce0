"""Writing a model as one GGUF file, as llama.cpp's converter does: names, order of heads, types, settings, tokens.

Types: matrices in the one that is asked for, norms and biases in F32, as there; rows that Q8_0 does not divide stay in
F16. The model's card is written last, beside the file: the file alone would look whole before it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from mergemill.engine.checkpoint.ancestors import read_lineage
from mergemill.engine.checkpoint.checkpoint import Checkpoint, check_file
from mergemill.engine.checkpoint.gguf.families import (
    ROPE_FACTORS,
    GgufFamily,
    count_heads,
    find_family,
    find_shift,
    list_settings,
    make_rope_factors,
    to_gguf_name,
)
from mergemill.engine.checkpoint.gguf.tokens import list_tokens
from mergemill.engine.checkpoint.gguf.writing import (
    ALIGN_BYTES,
    BF16,
    F16,
    F32,
    LONGEST_NAME,
    Q8_0,
    GgufTensor,
    Value,
    make_gguf_header,
)
from mergemill.engine.checkpoint.terms import CARD_NAME, read_card
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offers
from mergemill.engine.plan.draft import Draft
from mergemill.engine.plan.layout import LayOut, choose_part_bytes, cut_shard
from mergemill.engine.plan.values import OutputTensor, Part, Shard, SmallFile
from mergemill.engine.tensors.codes_made import find_coding
from mergemill.engine.tensors.constant import Constant
from mergemill.engine.tensors.dtypes import is_mergeable
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.heads import Interleaved
from mergemill.engine.tensors.quantizing import Quantized
from mergemill.engine.tensors.shifted import Offset

GGUF_DTYPES = ("F32", "F16", "BF16")
_KINDS = {"F32": F32, "F16": F16, "BF16": BF16, "q8_0": Q8_0}
_FILE_TYPES = {"F32": 0, "F16": 1, "q8_0": 7, "BF16": 32}  # general.file_type: what most of it is
_QUANTIZATION_VERSION = 2  # of ggml
EMBEDDING = "model.embed_tokens.weight"


def write_gguf(draft: Draft, checkpoint: Checkpoint, offers: Offers, coding: str, name: str, where: str) -> Draft:
    """Return the draft of a conversion as that of the file `name`; coding: of its matrices, a dtype or ``q8_0``."""
    family = find_family(checkpoint.config.get("model_type"), where=where)
    tensors, kinds = _make_tensors(checkpoint, offers, family, coding, where)
    settings = _list_all(checkpoint, offers, family, coding, where)
    card = _make_card(checkpoint, coding)
    return Draft(
        origin=draft.origin,
        tensors=tensors,
        files=(),
        sources=draft.sources,
        donor=draft.donor,
        dtype_from=draft.dtype_from,
        warnings=draft.warnings,
        seal=lambda shards, made: card,
        lay_out=_make_lay_out(name, tuple(settings), kinds),
    )


def _make_tensors(
    checkpoint: Checkpoint, offers: Offers, family: GgufFamily, coding: str, where: str
) -> tuple[list[OutputTensor], Mapping[str, tuple[int, tuple[int, ...]]]]:
    """Return the tensors, and the type and shape of each."""
    made: list[OutputTensor] = []
    kinds: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, expression in _iter_named(checkpoint, offers, family, where):
        chosen = _choose(name, expression.shape, coding)
        kinds[name] = _KINDS[chosen], expression.shape
        made.append(OutputTensor(name, "U8", _as_bytes(expression, chosen)))
    return made, kinds


def _iter_named(
    checkpoint: Checkpoint, offers: Offers, family: GgufFamily, where: str
) -> Iterator[tuple[str, Expression]]:
    heads = checkpoint.config.get("num_attention_heads")
    kv_heads = checkpoint.config.get("num_key_value_heads") or heads
    for name, offer in offers.items():
        theirs = to_gguf_name(name, family)
        if name.endswith("rotary_emb.inv_freq"):
            continue  # which the config says
        if theirs is None or len(theirs.encode()) > LONGEST_NAME or not is_mergeable(offer.dtype):
            raise PlanError(
                f"{where}: tensor {name} ({offer.dtype}) has no place in a GGUF file of {family.model_type}"
            )
        count = count_heads(name, family, heads, kv_heads) if type(heads) is int and type(kv_heads) is int else 0
        if count and (offer.shape[0] % (2 * count) or not 1 <= len(offer.shape) <= 2):
            raise PlanError(f"{where}: tensor {name} of {list(offer.shape)} does not suit {count} heads")
        shift = find_shift(name, family)
        shifted = Offset(offer.expression, shift) if shift else offer.expression
        yield theirs, Interleaved(shifted, count) if count else shifted
    factors = make_rope_factors(checkpoint.config, where=where)
    if factors:
        yield ROPE_FACTORS, Constant(factors)


def _choose(name: str, shape: tuple[int, ...], coding: str) -> str:
    """Return how a tensor is written."""
    if len(shape) < 2:
        return "F32"
    return "F16" if coding == "q8_0" and shape[-1] % find_coding(coding).columns else coding


def _as_bytes(expression: Expression, coding: str) -> Expression:
    plain = Quantized(expression, coding)
    return Quantized(expression, coding, -plain.size % ALIGN_BYTES)


def _list_all(
    checkpoint: Checkpoint, offers: Offers, family: GgufFamily, coding: str, where: str
) -> Iterator[tuple[str, Value]]:
    if EMBEDDING not in offers or len(offers[EMBEDDING].shape) != 2:
        raise PlanError(f"{where}: {checkpoint.ref} has no {EMBEDDING}, which GGUF needs")
    said = read_lineage(checkpoint.ref, read_card(checkpoint))
    yield "general.architecture", family.architecture
    yield "general.type", "model"
    yield "general.name", PurePosixPath(checkpoint.ref.rstrip("/")).name
    if said.license:
        yield "general.license", said.license
    yield from list_settings(checkpoint.config, family, where=where)
    yield "general.file_type", _FILE_TYPES[coding]
    yield "general.quantization_version", _QUANTIZATION_VERSION
    tokens = dict(list_tokens(checkpoint, offers[EMBEDDING].shape[0]))
    yield from (tokens | {"tokenizer.ggml.add_space_prefix": False} if family.is_gemma else tokens).items()


def _make_card(checkpoint: Checkpoint, coding: str) -> SmallFile:
    if CARD_NAME in checkpoint.files:
        return SmallFile(CARD_NAME, None, check_file(checkpoint, CARD_NAME))
    title = PurePosixPath(checkpoint.ref.rstrip("/")).name
    text = f"# {title}\n\nA GGUF file ({coding.upper()}), converted with mergemill.\n"
    return SmallFile(CARD_NAME, text.encode(), None)


def _make_lay_out(
    name: str, settings: Sequence[tuple[str, Value]], kinds: Mapping[str, tuple[int, tuple[int, ...]]]
) -> LayOut:
    def lay_out(tensors: Sequence[OutputTensor], *_: Any) -> tuple[tuple[Shard, ...], tuple[Part, ...]]:
        infos = [
            GgufTensor(each.name, kinds[each.name][1], kinds[each.name][0], each.expression.size) for each in tensors
        ]
        header = make_gguf_header(settings, infos)
        size_bytes = len(header) + sum(info.nbytes for info in infos)
        shard = Shard(name, header, size_bytes, tuple(info.name for info in infos))
        parts = tuple(cut_shard(tensors, len(header), 0, choose_part_bytes(size_bytes), 0, {}))
        return (shard,), parts

    return lay_out
