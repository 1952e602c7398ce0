"""A sentencepiece model as ``tokenizer.json`` has it, read from its bytes: no library is asked (2026-11-30).

Format: sentencepiece_model.proto of github.com/google/sentencepiece, of which these are read: ModelProto 1 pieces
(1 text, 2 score, 3 type), 2 TrainerSpec (3 model type, 35 byte fallback), 3 NormalizerSpec (1 name, 2 character map,
3 add_dummy_prefix, 4 remove_extra_whitespaces).

Converted are BPE models that leave text as it is, as those of Llama and Mistral do. A pair of pieces is merged by the
score of what it makes, so that of all pairs that make pieces, the higher the score the earlier, follow the merges.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergemill.engine.checkpoint.sentencepiece import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    iterate_fields,
    list_merges,
    parse_scored,
)

MOST_CHARACTERS = 1 << 10  # of a piece, in all places of which it is cut in two; trainers make 16 the most
_BPE = 2
_MARK = "▁"


def convert_sentencepiece(data: bytes, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ``tokenizer.json``; None for a model that is none, no BPE, or changes the text before it is cut.

    config: tokenizer_config.json, for tokens beside the model.
    """
    pieces = parse_scored(data)
    if pieces is None:
        return None
    try:
        parts = dict(iterate_fields(data))
        trainer, normalizer = (dict(iterate_fields(parts.get(number, b""))) for number in (2, 3))
    except (ValueError, IndexError):
        return None
    texts = {text for text, _, _ in pieces}
    if len(texts) < len(pieces) or not all(0 < len(text) <= MOST_CHARACTERS for text in texts):
        return None  # the library loads none with a piece twice, or an empty one
    if (
        any(math.isnan(score) for _, score, _ in pieces)
        or _number(trainer, 3, 1) != _BPE
        or normalizer.get(2)
        or _number(normalizer, 4, 1)
    ):
        return None
    vocabulary = {text: place for place, (text, _, _) in enumerate(pieces)}
    unknown = next((text for text, _, kind in pieces if kind == UNKNOWN), None)
    prepends = bool(_number(normalizer, 3, 1))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*_list_added(pieces, config)],
        "normalizer": _make_normalizer(prepends),
        "pre_tokenizer": None,
        "post_processor": _make_ends(vocabulary, config),
        "decoder": _make_decoder(prepends),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(_number(trainer, 35, 0)),
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": list_merges(pieces, vocabulary),
        },
    }


def _list_added(pieces: Sequence[tuple[str, float, int]], config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the tokens that are matched before the model: those of the file, and those that the config adds to it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {
        place: {"id": place, "content": text, **flags, "special": kind != USER_DEFINED}
        for place, (text, _, kind) in enumerate(pieces)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        added[int(number)] = {**flags, "special": False, **entry, "id": int(number)}
    yield from (added[number] for number in sorted(added))


def _make_normalizer(prepends: bool) -> dict[str, Any]:
    start = [{"type": "Prepend", "prepend": _MARK}] if prepends else []
    marks = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
    return {"type": "Sequence", "normalizers": [*start, marks]}


def _make_decoder(prepends: bool) -> dict[str, Any]:
    marks = {"type": "Replace", "pattern": {"String": _MARK}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepends else []
    return {"type": "Sequence", "decoders": [marks, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}


def _make_ends(vocabulary: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what puts bos and eos around a text, as transformers does for such models."""
    roles = {"bos": "<s>", "eos": "</s>"}
    asked = {"bos": config.get("add_bos_token", True), "eos": config.get("add_eos_token", False)}
    ends = {role: text for role, text in roles.items() if asked[role] and text in vocabulary}
    if not ends:
        return None
    tokens = {text: {"id": text, "ids": [vocabulary[text]], "tokens": [text]} for text in ends.values()}

    def surround(name: str) -> list[dict[str, Any]]:
        kind = {"A": 0, "B": 1}[name]
        around = {role: [{"SpecialToken": {"id": text, "type_id": kind}}] for role, text in ends.items()}
        return [*around.get("bos", []), {"Sequence": {"id": name, "type_id": kind}}, *around.get("eos", [])]

    pair = [*surround("A"), *surround("B")]
    return {"type": "TemplateProcessing", "single": surround("A"), "pair": pair, "special_tokens": tokens}


def _number(fields: Mapping[int, bytes], which: int, usual: int) -> int:
    return int.from_bytes(fields[which], "little") if which in fields else usual
