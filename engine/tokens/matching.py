"""Which tokens of two vocabularies are the same, and what stands in for one that the other lacks.

By bytes (ours): first added tokens of equal content; then equal roles; then what stands for the same bytes, a byte
token for a byte token first, of several the lowest id. By text, as mergekit has it: equal strings once the mark of a
word's start at the front is made one; tokens with a role are known by the role alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mergemill.engine.tokens.reading import Vocabulary, spell_bytes

By = Literal["bytes", "text"]
Key: TypeAlias = bytes | str
"""What a token is known by: its bytes, or its text with the mark made one."""

_MARK = "▁"


@dataclass(frozen=True, slots=True)
class Matches:
    """What each token of one vocabulary is in another, by ids; a token is in no more than one of these."""

    same: Mapping[int, int]
    role: Mapping[int, int]  # the same by their roles
    byte: Mapping[int, int]  # a token of one byte, and the byte token
    prefix: Mapping[int, int]  # the longest beginning of it that the other has

    @property
    def shared(self) -> Mapping[int, int]:
        """The tokens that both have, by ascending ids of the first."""
        return dict(sorted({**self.same, **self.role}.items()))


def match_tokens(first: Vocabulary, second: Vocabulary, by: By) -> Matches:
    """Return what the tokens of `first` are in `second`."""
    table = _Table(second, by)
    same: dict[int, int] = {}
    role: dict[int, int] = {}
    byte: dict[int, int] = {}
    prefix: dict[int, int] = {}
    roles = {token: name for name, token in reversed(list(first.roles.items()))}
    for token, number in first.ids.items():
        if by == "text" and token in roles:
            _enter(role, number, second.ids.get(second.roles.get(roles[token], "")))
            continue
        if by == "bytes" and token in first.added and token in second.added:
            same[number] = second.ids[token]
        elif by == "bytes" and token in roles and roles[token] in second.roles:
            role[number] = second.ids[second.roles[roles[token]]]
        elif by == "text" or not _is_special(token, first):
            key = _make_key(token, first, by)
            if not _enter(same, number, table.find(key, _is_byte(token, first))) and not _is_special(token, first):
                spelt = spell_bytes(token, first)
                _enter(byte, number, table.bytes.get(spelt) if len(spelt) == 1 else None)
                _enter(prefix, number, table.find_prefix(key))
    return Matches(same, role, byte, prefix)


class _Table:
    """The tokens of a vocabulary by what they are known by, the lowest id first."""

    def __init__(self, vocabulary: Vocabulary, by: By) -> None:
        self.tokens: dict[Key, int] = {}
        self.bytes: dict[bytes, int] = {}  # byte tokens
        known_by_role = {*vocabulary.roles.values()}
        for token, number in sorted(vocabulary.ids.items(), key=lambda item: item[1]):
            if _is_special(token, vocabulary) if by == "bytes" else token in known_by_role:
                continue
            if _is_byte(token, vocabulary):
                self.bytes.setdefault(spell_bytes(token, vocabulary), number)
                if by == "bytes":
                    continue
            self.tokens.setdefault(_make_key(token, vocabulary, by), number)

    def find(self, key: Key, is_byte: bool) -> int | None:
        """Return the id of what is known by a key."""
        token = self.tokens.get(key)
        byte = self.bytes.get(key) if isinstance(key, bytes) else None
        return byte if token is None or (is_byte and byte is not None) else token

    def find_prefix(self, key: Key) -> int | None:
        """Return the id of the longest proper beginning of a key that is more than white space."""
        for stop in range(len(key) - 1, 0, -1):
            if not _is_blank(key[:stop]) and (found := self.tokens.get(key[:stop])) is not None:
                return found
        return None


def _enter(table: dict[int, int], number: int, found: int | None) -> bool:
    if found is not None:
        table[number] = found
    return found is not None


def _make_key(token: str, vocabulary: Vocabulary, by: By) -> Key:
    if by == "bytes":
        return spell_bytes(token, vocabulary)
    mark = "Ġ" if vocabulary.is_byte_level else _MARK
    return _MARK + token[len(mark) :] if token.startswith(mark) else token


def _is_special(token: str, vocabulary: Vocabulary) -> bool:
    return token in vocabulary.added and vocabulary.added[token].special


def _is_byte(token: str, vocabulary: Vocabulary) -> bool:
    """Whether it is a byte token, such as ``<0xE9>``."""
    spelt = len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">")
    return spelt and not vocabulary.is_byte_level and len(spell_bytes(token, vocabulary)) == 1


def _is_blank(key: Key) -> bool:
    text = key.decode(errors="replace") if isinstance(key, bytes) else key
    return not text.replace(_MARK, " ").strip()
