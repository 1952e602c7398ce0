"""Whether one tokenizer extends another: it has the other's tokens and merges first, and then some."""

import math
from collections.abc import Mapping
from typing import Any

from mergemill.engine.tokens.reading import Vocabulary

_GROWING = ("vocab", "merges", "unk_id")  # of a model; all else of it must be equal


def find_extension(vocabularies: Mapping[str, Vocabulary], source: str) -> str:
    """Return the model whose tokenizer extends the source's, and those that do so before it; the source where none."""
    found = source
    for model, each in vocabularies.items():
        if model != found and extends(each, vocabularies[found]):
            found = model
    return found


def extends(other: Vocabulary, own: Vocabulary) -> bool:
    """Say whether `other` encodes as `own` does, but for its further tokens."""
    if not own.tokenizer or not other.tokenizer or own.kind != other.kind:
        return False
    if any(own.tokenizer.get(part) != other.tokenizer.get(part) for part in ("normalizer", "pre_tokenizer")):
        return False
    fixed = [{key: value for key, value in each.model.items() if key not in _GROWING} for each in (own, other)]
    if fixed[0] != fixed[1] or len(other.model["vocab"]) <= len(own.model["vocab"]):
        return False
    if own.kind == "Unigram":
        pairs = zip(own.model["vocab"], other.model["vocab"], strict=False)  # libraries lose last bits of a number
        return all(mine[0] == its[0] and math.isclose(mine[1], its[1], rel_tol=1e-12) for mine, its in pairs)
    if any(other.model["vocab"].get(token) != number for token, number in own.model["vocab"].items()):
        return False
    merges = [split_merge(each) for each in own.model.get("merges") or ()]
    first = [split_merge(each) for each in (other.model.get("merges") or ())[: len(merges)]]
    return merges == first


def split_merge(merge: Any) -> tuple[str, ...]:
    """Return the two parts of a merge, which older files write as one string.

    >>> split_merge("Ġ a"), split_merge(["Ġ", "a"])
    (('Ġ', 'a'), ('Ġ', 'a'))
    """
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
