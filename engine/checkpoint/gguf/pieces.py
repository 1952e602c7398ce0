"""Pieces of SentencePiece in a GGUF file as a ``tokenizer.json``: BPE with the merges that pieces and scores imply.

It encodes as transformers' own conversion of such a file does (5.14), which is its Llama or Gemma tokenizer:

* Llama: a text begins with a space, unless ``add_space_prefix`` says no (which transformers passes over). llama.cpp
  also puts one after each special token, and before one that is there.
* Gemma: none does. Runs of spaces are no tokens of their own but merged, and merges follow the ids, not the scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergemill.engine.checkpoint.gguf.stored_tokens import BYTE, NORMAL, UNKNOWN, StoredTokens, make_ends, read_list
from mergemill.engine.checkpoint.sentencepiece import list_merges

MOST_CUT = 1 << 28  # characters of both parts of pieces, cut at each place; those of 256,000 pieces are some 2^24
_MARK = "▁"


@dataclass(frozen=True, slots=True)
class StoredPieces:
    """The pieces of a file."""

    tokens: StoredTokens  # as they are spelt in a ``tokenizer.json``
    scores: Sequence[float]
    prepends: bool  # whether a text begins with a space

    @property
    def pieces(self) -> list[tuple[str, float, int]]:
        """The text, the score and the kind of each."""
        return [*zip(self.tokens.texts, self.scores, self.tokens.kinds, strict=False)]  # there may be more scores


def find_pieces(stored: StoredTokens) -> StoredPieces | None:
    """Return the pieces; None where the tokens are none, or not told apart."""
    settings = stored.settings
    if settings.get("tokenizer.ggml.model") != "llama":
        return None
    is_gemma = str(settings.get("general.architecture")).startswith("gemma")
    tokens = _respell(stored) if is_gemma else stored
    scores = [-float(i) for i in range(len(tokens.texts))] if is_gemma else read_list(settings, "scores", float)
    if len({*tokens.texts}) < len(tokens.texts) or len(scores) < len(tokens.texts) or any(map(math.isnan, scores)):
        return None
    if sum(len(text) ** 2 for text, kind in zip(tokens.texts, tokens.kinds, strict=True) if kind == NORMAL) > MOST_CUT:
        return None
    return StoredPieces(tokens, scores, not is_gemma and settings.get("tokenizer.ggml.add_space_prefix", True) is True)


def make_pieces(stored: StoredPieces) -> dict[str, Any]:
    """Return what ``tokenizer.json`` says."""
    found, prepends, pieces = stored.tokens, stored.prepends, stored.pieces
    vocabulary = found.list_vocabulary()
    unknown = (text for text, _, kind in pieces if kind == UNKNOWN)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": found.list_added(),
        "normalizer": None if prepends else {"type": "Replace", "pattern": {"String": " "}, "content": _MARK},
        "pre_tokenizer": _make_start() if prepends else None,
        "post_processor": make_ends(found, usual=True),
        "decoder": _make_decoder(prepends),
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix")),
            "unk_token": next(unknown, None),
            "fuse_unk": True,
            "byte_fallback": BYTE in found.kinds,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": found.merges or list_merges([piece for piece in pieces if piece[2] == NORMAL], vocabulary),
        },
    }


def _respell(stored: StoredTokens) -> StoredTokens:
    """Return them with runs of spaces as pieces, which Gemma's files have as tokens of the user's."""
    spaces = [" " in text and not text.strip() for text in stored.texts]
    texts = [_MARK * len(text) if is_run else text for text, is_run in zip(stored.texts, spaces, strict=True)]
    kinds = [NORMAL if is_run else kind for kind, is_run in zip(stored.kinds, spaces, strict=True)]
    return replace(stored, texts=texts, kinds=kinds)


def _make_start() -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": _MARK, "prepend_scheme": "first", "split": False}


def _make_decoder(prepends: bool) -> dict[str, Any]:
    marks = {"type": "Replace", "pattern": {"String": _MARK}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepends else []
    return {"type": "Sequence", "decoders": [marks, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
