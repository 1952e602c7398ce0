"""A model's tokens as settings of GGUF, as llama.cpp's converter writes them.

A ``tokenizer.model`` of SentencePiece goes with its scores; of a ``tokenizer.json`` those are taken that are byte-level
BPE, with their merges. How text is cut before that is a name in GGUF; it is told from the pattern, and one that is not
known is refused: another name would give other tokens.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from mergemill.engine.checkpoint.checkpoint import Checkpoint, read_file
from mergemill.engine.checkpoint.gguf.stored_tokens import BYTE, CONTROL, NORMAL, UNUSED, USER
from mergemill.engine.checkpoint.gguf.tokenizer import PATTERNS
from mergemill.engine.checkpoint.gguf.writing import Value
from mergemill.engine.checkpoint.sentencepiece import parse_scored
from mergemill.engine.errors import CheckpointError

_LOOKS_SPECIAL = (("<|", "|>"), ("<｜", "｜>"))
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_NAMES = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # where GGUF's word is another (its spelling)


def list_tokens(checkpoint: Checkpoint, rows: int) -> Iterator[tuple[str, Value]]:
    """Yield the settings of a model's tokens; rows: of its embedding. `CheckpointError` for what GGUF cannot say."""
    config = _read_json(checkpoint, "tokenizer_config.json")
    if "tokenizer.model" in checkpoint.files:
        yield from _list_pieces(checkpoint, config, rows)
    elif "tokenizer.json" in checkpoint.files:
        yield from _list_bpe(checkpoint, rows)
    else:
        raise CheckpointError(
            f"{checkpoint.ref}: has neither tokenizer.json nor tokenizer.model, of which GGUF needs one"
        )
    yield from _list_special(checkpoint, config, rows)
    template = _find_template(checkpoint, config)
    if template:
        yield "tokenizer.chat_template", template


def _list_pieces(checkpoint: Checkpoint, config: Mapping[str, Any], rows: int) -> Iterator[tuple[str, Value]]:
    found = parse_scored(read_file(checkpoint, "tokenizer.model"))
    if found is None:
        raise CheckpointError(f"{checkpoint.ref}: tokenizer.model is not one of SentencePiece")
    tokens = dict(enumerate(found))
    added = {token: (number, False) for token, number in _read_json(checkpoint, "added_tokens.json").items()}
    decoder = config.get("added_tokens_decoder")
    for number, each in decoder.items() if isinstance(decoder, Mapping) else ():
        if isinstance(each, Mapping) and isinstance(each.get("content"), str) and str(number).isdecimal():
            added[each["content"]] = int(number), bool(each.get("special"))
    for token, (number, special) in added.items():
        if type(number) is int and (number not in tokens or tokens[number][2] != BYTE):
            text = token if special else token.replace("▁", " ")
            tokens[number] = (text, -1000.0, CONTROL if special else USER)
    filled = [tokens.get(place, (f"[PAD{place}]", -10000.0, UNUSED)) for place in range(rows)]
    _check_rows(checkpoint, max(tokens, default=-1) + 1, rows)
    yield "tokenizer.ggml.model", "llama"
    yield "tokenizer.ggml.pre", "default"
    yield "tokenizer.ggml.tokens", [token for token, _, _ in filled]
    yield "tokenizer.ggml.scores", [struct.unpack("<f", struct.pack("<f", score))[0] for _, score, _ in filled]
    yield "tokenizer.ggml.token_type", [kind for _, _, kind in filled]
    if isinstance(config.get("add_prefix_space"), bool):
        yield "tokenizer.ggml.add_space_prefix", config["add_prefix_space"]


def _list_bpe(checkpoint: Checkpoint, rows: int) -> Iterator[tuple[str, Value]]:
    found = _read_json(checkpoint, "tokenizer.json")
    try:
        model, added = found["model"], {each["id"]: each for each in found.get("added_tokens") or ()}
        vocabulary = {number: token for token, number in model["vocab"].items()}
        merges = [_join_merge(merge) for merge in model["merges"]]
        is_bytes = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.ref}: tokenizer.json holds no byte-level BPE") from error
    if not is_bytes:
        raise CheckpointError(
            f"{checkpoint.ref}: tokenizer.json holds pieces of SentencePiece without their scores; GGUF needs its "
            f"tokenizer.model too"
        )
    tokens, kinds = [], []
    for place in range(rows):
        token, kind = vocabulary.get(place, f"[PAD{place}]"), NORMAL if place in vocabulary else UNUSED
        if place in added:
            token = str(added[place]["content"])
            special = bool(added[place].get("special")) or _looks_special(token)
            token, kind = (token, CONTROL) if special else (token.replace("▁", " "), USER)
        tokens.append(token)
        kinds.append(kind)
    _check_rows(checkpoint, max([*vocabulary, *added], default=-1) + 1, rows)
    yield "tokenizer.ggml.model", "gpt2"
    yield "tokenizer.ggml.pre", _find_cut(checkpoint, found)
    yield "tokenizer.ggml.tokens", tokens
    yield "tokenizer.ggml.token_type", kinds
    yield "tokenizer.ggml.merges", merges


def _join_merge(merge: Any) -> str:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return f"{first} {second}" if " " not in first + second else " ".join(x.replace(" ", "Ġ") for x in (first, second))


def _find_cut(checkpoint: Checkpoint, tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how text is cut before it is encoded."""
    steps = tokenizer.get("pre_tokenizer") or {}
    listed = steps.get("pretokenizers", [steps]) if isinstance(steps, Mapping) else []
    kinds = [each.get("type") for each in listed if isinstance(each, Mapping)]
    patterns = [each["pattern"].get("Regex") for each in listed if isinstance(each.get("pattern"), Mapping)]
    for pattern, name in PATTERNS:
        if pattern in patterns:
            return name
    if kinds == ["ByteLevel"] and listed[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    raise CheckpointError(
        f"{checkpoint.ref}: tokenizer.json cuts text in a way that llama.cpp may have a name for, which is not known "
        f"here ({', '.join(map(str, kinds)) or 'none'}); its own converter knows more"
    )


def _list_special(checkpoint: Checkpoint, config: Mapping[str, Any], rows: int) -> Iterator[tuple[str, Value]]:
    added = _read_json(checkpoint, "tokenizer.json").get("added_tokens")
    numbers = {each.get("content"): each.get("id") for each in added or () if isinstance(each, Mapping)}
    for kind in _SPECIAL:
        said = config.get(f"{kind}_token")
        content = said.get("content") if isinstance(said, Mapping) else said
        number = numbers.get(content)
        number = checkpoint.config.get(f"{kind}_token_id") if number is None else number
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and 0 <= number < rows:
            yield f"tokenizer.ggml.{_NAMES.get(kind, kind)}_token_id", number
        if isinstance(config.get(f"add_{kind}_token"), bool):
            yield f"tokenizer.ggml.add_{kind}_token", config[f"add_{kind}_token"]


def _find_template(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str:
    if "chat_template.jinja" in checkpoint.files:
        return read_file(checkpoint, "chat_template.jinja").decode(errors="replace")
    said = config.get("chat_template", _read_json(checkpoint, "chat_template.json").get("chat_template"))
    return said if isinstance(said, str) else ""


def _looks_special(token: str) -> bool:
    return token in ("<pad>", "<mask>") or any(token.startswith(a) and token.endswith(b) for a, b in _LOOKS_SPECIAL)


def _check_rows(checkpoint: Checkpoint, tokens: int, rows: int) -> None:
    if tokens > rows:
        raise CheckpointError(f"{checkpoint.ref}: its tokenizer has {tokens} tokens, and its embedding {rows} rows")


def _read_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return a file's object; empty where it is not there."""
    if name not in checkpoint.files:
        return {}
    try:
        found = json.loads(read_file(checkpoint, name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint.ref}: {name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{checkpoint.ref}: {name} is not a JSON object")
    return found
