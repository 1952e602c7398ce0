"""What a GGUF file says of its tokens, and what of a ``tokenizer.json`` follows from it whatever its model is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergemill.engine.checkpoint.gguf.header import GgufList

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # kinds of tokens, there as in SentencePiece
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


@dataclass(frozen=True, slots=True)
class StoredTokens:
    """The tokens of a file, in the order of their ids."""

    settings: Mapping[str, Any]
    texts: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[Sequence[str]]  # that the file lists, as far as they are pairs of tokens that make one

    def list_vocabulary(self) -> dict[str, int]:
        """Return the id of each: loaders give what is added and in no vocabulary the numbers after it."""
        kept = zip(self.texts, self.kinds, strict=True)
        return {text: place for place, (text, kind) in enumerate(kept) if kind != UNUSED}

    def list_added(self) -> list[dict[str, Any]]:
        """Return the tokens that are matched in a text before the model is asked."""
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        return [
            {"id": place, "content": text, "special": kind != USER, "normalized": False} | flags
            for place, (text, kind) in enumerate(zip(self.texts, self.kinds, strict=True))
            if kind not in (NORMAL, UNUSED, BYTE) and text
        ]

    def list_all(self) -> dict[str, int]:
        """Return the id of each, those that are added included, as a ``tokenizer.json`` of them says."""
        return self.list_vocabulary() | {each["content"]: each["id"] for each in self.list_added()}

    def find(self, role: str) -> int | None:
        """Return the id of a special token."""
        found = self.settings.get(f"tokenizer.ggml.{SPECIAL[role]}_token_id")
        return found if type(found) is int and 0 <= found < len(self.texts) else None


def read_tokens(settings: Mapping[str, Any]) -> StoredTokens | None:
    """Return the tokens; None where they are not told apart, or a merge makes none of them."""
    texts, kinds = read_list(settings, "tokens", str), read_list(settings, "token_type", int)
    pairs = [merge.split(" ") for merge in read_list(settings, "merges", str)]
    if not texts or len(texts) != len(kinds) or len({*texts}) < len(texts):
        return None
    found = StoredTokens(settings, texts, kinds, pairs)
    known = found.list_vocabulary().keys()
    return found if all(len(pair) == 2 and {*pair, "".join(pair)} <= known for pair in pairs) else None


def read_list(settings: Mapping[str, Any], key: str, kind: type) -> Sequence[Any]:
    """Return a list among the settings of tokens; empty where it is of another kind."""
    found = settings.get(f"tokenizer.ggml.{key}")
    values = found.values if isinstance(found, GgufList) else ()
    return values if all(type(each) is kind for each in values) else ()


def make_ends(stored: StoredTokens, *, usual: bool) -> dict[str, Any] | None:
    """Return what is put before and after a text; usual: whether it begins so where the file does not say it."""
    named: dict[str, int] = {}
    for role, default in (("bos", usual), ("eos", False)):
        place = stored.find(role)
        if stored.settings.get(f"tokenizer.ggml.add_{role}_token", default) is True and place is not None:
            named[role] = place
    if not named:
        return None
    texts = stored.texts

    def surround(text: str, number: int) -> list[dict[str, Any]]:
        ends = {role: [{"SpecialToken": {"id": texts[place], "type_id": number}}] for role, place in named.items()}
        return [*ends.get("bos", []), {"Sequence": {"id": text, "type_id": number}}, *ends.get("eos", [])]

    return {
        "type": "TemplateProcessing",
        "single": surround("A", 0),
        "pair": [*surround("A", 0), *surround("B", 1)],
        "special_tokens": {
            texts[place]: {"id": texts[place], "ids": [place], "tokens": [texts[place]]} for place in named.values()
        },
    }
