"""Mistral's tekken.json as ``tokenizer.json`` has it; no library is asked (2026-11-30).

Format: tokens/tokenizers/tekken.py of github.com/mistralai/mistral-common: ids of special tokens come first,
then the tokens by their ranks, as bytes. As tiktoken does, a word that is a token is one at once; else its bytes are
merged by the ranks of what they make.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from mergemill.engine.tokens.byte_marks import byte_table

# Of files up to version 7, which name none.
_PAIRS = ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS")
DEFAULT_SPECIAL = (
    *("<unk>", "<s>", "</s>", *(text for name in _PAIRS for text in (f"[{name}]", f"[/{name}]"))),
    *("[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
MOST_RESERVED = 1 << 17  # special tokens; published files have 1,000
MOST_TOKEN_BYTES = 1 << 10  # in all places of which a token is cut in two


def convert_tekken(file: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ``tokenizer.json``; None for what is no such file."""
    try:
        return _convert(file)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _convert(file: Mapping[str, Any]) -> dict[str, Any]:
    config = file["config"]
    reserved, size, pattern = (config[key] for key in ("default_num_special_tokens", "default_vocab_size", "pattern"))
    if not (type(reserved) is type(size) is int and 0 <= reserved <= min(size, MOST_RESERVED) and type(pattern) is str):
        raise ValueError("its config is none")
    ranks = _read_ranks(file["vocab"], size - reserved)
    special = _list_special(file.get("special_tokens"), reserved)
    if not ranks.keys().isdisjoint(special):
        raise ValueError("a special token has the text of another")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text, **flags} for number, text in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, level]},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text: number for number, text in enumerate(special)}
            | {token: rank + reserved for token, rank in ranks.items()},
            "merges": _list_merges(ranks),
        },
    }


def _read_ranks(entries: Sequence[Mapping[str, Any]], count: int) -> dict[str, int]:
    """Return the ranks of the first `count` tokens, each from 0 on once, all single bytes among them."""
    first = sorted(entries, key=lambda entry: entry["rank"])[:count]
    tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in first]
    known = set(tokens)
    if [entry["rank"] for entry in first] != [*range(count)] or len(known) < count:
        raise ValueError("its ranks have gaps, or are of one token")
    if any(bytes([byte]) not in known for byte in range(256)) or not all(0 < len(t) <= MOST_TOKEN_BYTES for t in known):
        raise ValueError("a byte is no token, or a token no bytes, or too many")
    marks = {byte: mark for mark, byte in byte_table().items()}
    return {"".join(marks[byte] for byte in token): rank for rank, token in enumerate(tokens)}


def _list_special(entries: Sequence[Mapping[str, Any]] | None, reserved: int) -> list[str]:
    """Return the special tokens in the order of their ids; those that have no name are called by their number."""
    if entries is None:
        entries = [{"rank": rank, "token_str": text} for rank, text in enumerate(DEFAULT_SPECIAL)]
    named = {entry["rank"]: entry["token_str"] for entry in entries}
    special = [named.get(number, f"<SPECIAL_{number}>") for number in range(reserved)]
    if len(named) < len(entries) or not named.keys() <= set(range(reserved)) or len(set(special)) < reserved:
        raise ValueError("its special tokens have ids of others, or one name")
    if not all(type(text) is str and text for text in special):
        raise TypeError("a special token is no text")
    return special


def _list_merges(ranks: Mapping[str, int]) -> list[list[str]]:
    """Return the pairs of tokens that make tokens, by the ranks of what they make, then by their own."""
    merges = []
    for token in ranks:
        pairs = [[token[:cut], token[cut:]] for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: [ranks[each] for each in pair])
    return merges
