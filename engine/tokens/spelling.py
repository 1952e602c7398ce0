"""How a model's tokenizer spells the tokens of another: by the `tokenizers` library, which the extra ``[tokens]`` has.

A token's bytes, where they are UTF-8, are encoded as text with the token's own space, if it has one: without special
tokens, and without the space that the tokenizer would put in front. Else each byte is spelt by the token of that byte.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mergemill.engine.errors import CheckpointError
from mergemill.engine.tokens.byte_marks import byte_table
from mergemill.engine.tokens.reading import Vocabulary, spell_bytes


def spell_tokens(tokens: Iterable[str], first: Vocabulary, second: Vocabulary, *, where: str) -> list[list[int]]:
    """Return the ids of `second` that spell each of the `tokens` of `first`; none for what cannot be spelt.

    Raises `CheckpointError` where the library is not installed, or does not read the tokenizer of `second`.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise CheckpointError(
            f"{where}: spelling tokens by another tokenizer needs tokenizers; pip install mergemill[tokens]"
        ) from error
    if not second.tokenizer:
        raise CheckpointError(f"{where}: has no tokenizer.json, by which tokens are spelt; save its tokenizer with one")
    try:
        tokenizer = Tokenizer.from_str(json.dumps(_without_space(second.tokenizer)))
    except Exception as error:
        raise CheckpointError(f"{where}: its tokenizer.json is not read by tokenizers: {error}") from error
    bytes_ = _find_bytes(second)
    unknown = second.ids.get(str(second.model.get("unk_token") or second.roles.get("unk", "")))
    names = {number: token for token, number in second.ids.items()}

    def keeps(found: Sequence[int], data: bytes) -> bool:
        """Whether nothing is lost: what a byte-level vocabulary lacks it drops without a word."""
        return not second.is_byte_level or b"".join(spell_bytes(names[each], second) for each in found) == data

    return [_spell(spell_bytes(token, first), tokenizer, keeps, bytes_, unknown) for token in tokens]


def _spell(
    data: bytes,
    tokenizer: Any,
    keeps: Callable[[Sequence[int], bytes], bool],
    bytes_: Mapping[int, int],
    unknown: int | None,
) -> list[int]:
    try:
        found: list[int] = tokenizer.encode(data.decode(), add_special_tokens=False).ids
    except UnicodeDecodeError:
        found = []
    if found and unknown not in found and keeps(found, data):
        return found
    spelt = [bytes_.get(byte) for byte in data]
    return [] if None in spelt else [each for each in spelt if each is not None]


def _find_bytes(vocabulary: Vocabulary) -> dict[int, int]:
    """Return the id of each byte's own token, as far as there are such."""
    if vocabulary.is_byte_level:
        return {byte: vocabulary.ids[mark] for mark, byte in byte_table().items() if mark in vocabulary.ids}
    found = {byte: vocabulary.ids.get(f"<0x{byte:02X}>") for byte in range(256)}
    return {byte: number for byte, number in found.items() if number is not None}


def _without_space(part: Any) -> Any:
    """Return a tokenizer's JSON without what puts a space in front of a text, and without what is added around it."""
    if isinstance(part, list):
        return [_without_space(each) for each in part if not _prepends(each)]
    if not isinstance(part, dict):
        return part
    changed = {"add_prefix_space": False, "prepend_scheme": "never"}
    return {
        key: None if _prepends(value) or key == "post_processor" else changed.get(key, _without_space(value))
        for key, value in part.items()
        if key != "model"
    } | ({"model": part["model"]} if "model" in part else {})


def _prepends(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Prepend"
