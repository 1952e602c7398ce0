"""A GGUF file's tokens as a ``tokenizer.json``: byte-level BPE, cut in a way whose name is known.

The names of cuts are llama.cpp's (``tokenizer.ggml.pre``), and so is what comes with each: whether a text that is a
token is one without merges, and whether a text begins with the token for that, unless the file says so itself. Pieces
of SentencePiece have no merges in GGUF, and are not made into any.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergemill.engine.checkpoint.gguf.header import GgufList

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # kinds of tokens, there as in SentencePiece

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
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


def make_tokenizer(settings: Mapping[str, Any]) -> Mapping[str, bytes]:
    """Return the files of a tokenizer, by name; none where its tokens are no byte-level BPE that is known."""
    tokens, kinds, merges = (_list(settings, key) for key in ("tokens", "token_type", "merges"))
    cut = settings.get("tokenizer.ggml.pre")
    steps = _find_steps(cut)
    if settings.get("tokenizer.ggml.model") != "gpt2" or not steps or not tokens or len(tokens) != len(kinds):
        return {}
    # All of them: loaders give what is added and in no vocabulary the numbers after it, whatever a file says.
    vocabulary = {token: place for place, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    added = [
        {"id": place, "content": token, "special": kind != USER, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for place, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind not in (NORMAL, UNUSED) and token
    ]
    pairs = [merge.split(" ") for merge in merges]
    if len({*tokens}) < len(tokens) or not all(
        len(pair) == 2 and {*pair, "".join(pair)} <= vocabulary.keys() for pair in pairs
    ):
        return {}
    made = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if cut in _NORMALIZED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _find_ends(settings, tokens),
        "decoder": _level(use_regex=True),
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": cut in _WITHOUT_MERGES,
            "vocab": vocabulary,
            "merges": pairs,
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {
        f"{kind}_token": tokens[place] for kind in _SPECIAL if (place := _find(settings, kind, tokens)) is not None
    }
    template = settings.get("tokenizer.chat_template")
    files = {"tokenizer.json": made, "tokenizer_config.json": config}
    texts = {name: json.dumps(each, indent=2, ensure_ascii=False).encode() + b"\n" for name, each in files.items()}
    return texts | ({"chat_template.jinja": template.encode()} if isinstance(template, str) and template else {})


def _list(settings: Mapping[str, Any], key: str) -> Sequence[Any]:
    found = settings.get(f"tokenizer.ggml.{key}")
    kind = int if key == "token_type" else str
    values = found.values if isinstance(found, GgufList) else ()
    return values if all(type(each) is kind for each in values) else ()


def _find(settings: Mapping[str, Any], kind: str, tokens: Sequence[str]) -> int | None:
    """Return the number of a special token."""
    found = settings.get(f"tokenizer.ggml.{_SPECIAL[kind]}_token_id")
    return found if type(found) is int and 0 <= found < len(tokens) else None


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


def _find_ends(settings: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """Return what is put before and after a text."""
    named: dict[str, int] = {}
    for kind, usual in (("bos", settings.get("tokenizer.ggml.pre") in _BEGINNING), ("eos", False)):
        place = _find(settings, kind, tokens)
        if settings.get(f"tokenizer.ggml.add_{kind}_token", usual) is True and place is not None:
            named[kind] = place
    plain = _level(use_regex=True) | {"trim_offsets": False}
    if not named:
        return plain

    def surround(text: str, number: int) -> list[dict[str, Any]]:
        ends = {kind: [{"SpecialToken": {"id": tokens[place], "type_id": number}}] for kind, place in named.items()}
        return [*ends.get("bos", []), {"Sequence": {"id": text, "type_id": number}}, *ends.get("eos", [])]

    template = {
        "type": "TemplateProcessing",
        "single": surround("A", 0),
        "pair": [*surround("A", 0), *surround("B", 1)],
        "special_tokens": {
            tokens[place]: {"id": tokens[place], "ids": [place], "tokens": [tokens[place]]} for place in named.values()
        },
    }
    return {"type": "Sequence", "processors": [plain, template]}


def _level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
