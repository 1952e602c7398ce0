"""A GGUF file's tokens as a ``tokenizer.json``: byte-level BPE, cut in a way whose name is known, and pieces.

The names of cuts are llama.cpp's (``tokenizer.ggml.pre``), and so is what comes with each: whether a text that is a
token is one without merges, and whether a text begins with the token for that, unless the file says so itself. Pieces
of SentencePiece are in `pieces.py`.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from mergemill.engine.checkpoint.gguf.pieces import find_pieces, make_pieces
from mergemill.engine.checkpoint.gguf.stored_tokens import SPECIAL, StoredTokens, make_ends, read_tokens
from mergemill.engine.checkpoint.made import MadeFiles

# The pattern by which text is cut, or what it has in it, and llama.cpp's name for it.
_GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
PATTERNS = (
    (_GPT4 + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "llama-bpe"),
    (_GPT4 + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "qwen2"),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+",
        "tekken",
    ),
)
_WITHOUT_MERGES = _BEGINNING = ("llama-bpe", "tekken")
_NORMALIZED = ("qwen2",)


def make_tokenizer(settings: Mapping[str, Any]) -> Mapping[str, bytes]:
    """Return the files of a tokenizer, by name, each made when it is read; none where its tokens are not known.

    Known are byte-level BPE and pieces. Merges that pieces imply are many seconds' work for large vocabularies.
    """
    stored = read_tokens(settings)
    if stored is None:
        return {}
    tokens, make = stored, functools.partial(_make_bytes, stored)
    if settings.get("tokenizer.ggml.model") != "gpt2":
        pieces = find_pieces(stored)
        if pieces is None:
            return {}
        tokens, make = pieces.tokens, functools.partial(make_pieces, pieces)
    elif not _find_steps(settings.get("tokenizer.ggml.pre")):
        return {}
    makers: dict[str, Callable[[], bytes]] = {
        "tokenizer.json": lambda: _write(make()),
        "tokenizer_config.json": lambda: _write(_make_config(stored), indent=2),
    }
    template = settings.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        makers["chat_template.jinja"] = template.encode
    return MadeFiles(makers, tokens.list_all)


def _write(value: Any, indent: int | None = None) -> bytes:
    """Return it as its file would be; on one line where that is not asked for: indented, it is made in Python."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode() + b"\n"


def _make_config(stored: StoredTokens) -> dict[str, Any]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return config | {f"{role}_token": stored.texts[at] for role in SPECIAL if (at := stored.find(role)) is not None}


def _make_bytes(stored: StoredTokens) -> dict[str, Any]:
    cut = stored.settings.get("tokenizer.ggml.pre")
    steps = _find_steps(cut)
    plain = _level(use_regex=True) | {"trim_offsets": False}
    ends = make_ends(stored, usual=cut in _BEGINNING)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": stored.list_added(),
        "normalizer": {"type": "NFC"} if cut in _NORMALIZED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": {"type": "Sequence", "processors": [plain, ends]} if ends else plain,
        "decoder": _level(use_regex=True),
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": cut in _WITHOUT_MERGES,
            "vocab": stored.list_vocabulary(),
            "merges": stored.merges,
        },
    }


def _find_steps(cut: Any) -> list[dict[str, Any]]:
    """Return how text is cut; empty for a name that is not known."""
    if cut == "gpt-2":
        return [_level(use_regex=True)]
    if cut == "smollm":
        return [{"type": "Digits", "individual_digits": True}, _level(use_regex=True)]
    for pattern, name in PATTERNS:
        if cut == name:
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            return [split, _level(use_regex=False)]
    return []


def _level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
