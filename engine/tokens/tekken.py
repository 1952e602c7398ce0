"""Mistral's tekken.json as ``tokenizer.json`` has it; no library is asked (2026-11-30).

Format: tokens/tokenizers/tekken.py of github.com/mistralai/mistral-common: ids of special tokens come first,
then the tokens by their ranks, as bytes. As tiktoken does, a word that is a token is one at once; else its bytes are
merged by the ranks of what they make.
"""

import base64
from collections.abc import Mapping
from typing import Any

from mergemill.engine.tokens.byte_marks import byte_table


def convert_tekken(file: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ``tokenizer.json``; None for what is no such file."""
    try:
        return _convert(file)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _convert(file: Mapping[str, Any]) -> dict[str, Any]:
    config = file["config"]
    reserved, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
    entries = sorted(file["vocab"], key=lambda entry: entry["rank"])[: size - reserved]
    marks = {byte: mark for mark, byte in byte_table().items()}
    tokens = ["".join(marks[byte] for byte in base64.b64decode(entry["token_bytes"])) for entry in entries]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    named = {int(entry["rank"]): str(entry["token_str"]) for entry in file.get("special_tokens") or ()}
    special = [named.get(number, f"<SPECIAL_{number}>") for number in range(reserved)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated", "invert": False}
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


def _list_merges(ranks: Mapping[str, int]) -> list[list[str]]:
    """Return the pairs of tokens that make tokens, by the ranks of what they make, then by their own."""
    merges = []
    for token in ranks:
        pairs = [[token[:cut], token[cut:]] for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: [ranks[each] for each in pair])
    return merges
