"""The files of a joined vocabulary's tokenizer.

A text is encoded as the source encodes it, unless it holds an added token of another model (decided 2026-11-29; the
reference makes each foreign token an added one, which cuts up words). So a foreign regular token is an entry of the
model's vocabulary that the model never reaches: in a BPE it has no merges, in a Unigram a score below every path of
the source. A WordPiece has no such place. Added tokens are entries too, since loaders number those anew that are none.
"""

import json
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

from mergemill.engine.tokens.extending import split_merge
from mergemill.engine.tokens.joining import Joined
from mergemill.engine.tokens.reading import DICTIONARIES, KINDS, Vocabulary

DEEP = 1000.0  # that a foreign token of a Unigram scores below the source's least, for each of its characters


def find_fault(vocabulary: Vocabulary) -> str:
    """Return why no token can be added to a tokenizer's files; empty where it can."""
    if not vocabulary.tokenizer:
        return "has no tokenizer.json"
    if vocabulary.kind not in KINDS:
        return f"has a tokenizer.json of kind {vocabulary.kind!r}, which is none of {', '.join(KINDS)}"
    return ""


def find_half(joined: Joined) -> str | None:
    """Return a token with half a surrogate pair, with which no ``tokenizer.json`` loads; None where there is none."""
    try:
        "".join(joined.ids).encode()
    except UnicodeEncodeError:
        return next((token for token in joined.ids if any("\ud800" <= each <= "\udfff" for each in token)), None)
    return None


def write_tokenizer(joined: Joined, vocabularies: Mapping[str, Vocabulary]) -> bytes:
    """Return ``tokenizer.json``: the source's with the joined vocabulary."""
    own, like = vocabularies[joined.source], vocabularies[joined.like]
    model = dict(like.model)
    if own.kind in DICTIONARIES:
        model["vocab"] = dict(sorted(joined.ids.items(), key=itemgetter(1)))
        if "merges" in model:
            model["merges"] = [each for each in model["merges"] if _is_known(each, joined.ids)]
    else:
        model["vocab"] = list(_iter_scores(joined, like))
        if isinstance(number := model.get("unk_id"), int):
            model["unk_id"] = joined.ids.get(like.model["vocab"][number][0])
    entries = [{"id": joined.ids[token], **each.to_json()} for token, each in joined.added.items()]
    return to_bytes({**own.tokenizer, "added_tokens": entries, "model": model})


def write_config(joined: Joined, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``tokenizer_config.json`` with the added tokens, where it lists such."""
    if "added_tokens_decoder" not in config:
        return dict(config)
    decoder = {str(joined.ids[token]): each.to_json() for token, each in joined.added.items()}
    return {**config, "added_tokens_decoder": decoder}


def to_bytes(value: Mapping[str, Any]) -> bytes:
    """Return JSON as the libraries write it; half a surrogate pair, which no UTF-8 has, as its escape."""
    try:
        return (_write(value, 0, ascii_alone=False) + "\n").encode()
    except UnicodeEncodeError:
        return (_write(value, 0, ascii_alone=True) + "\n").encode()


def _write(value: Any, depth: int, *, ascii_alone: bool) -> str:
    """Return what ``json.dumps`` gives with an indent of 2: it then is written in Python, and slow for 256k tokens."""
    if not value or not isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=ascii_alone)
    inner, outer = "\n" + (depth + 1) * "  ", "\n" + depth * "  "
    if {*map(type, value.values() if isinstance(value, dict) else value)}.isdisjoint((dict, list)):
        text = json.dumps(value, ensure_ascii=ascii_alone, separators=("," + inner, ": "))
        return text[0] + inner + text[1:-1] + outer + text[-1]
    if isinstance(value, list):
        entries = [_write(each, depth + 1, ascii_alone=ascii_alone) for each in value]
        return "[" + inner + ("," + inner).join(entries) + outer + "]"
    named = {json.dumps(key, ensure_ascii=ascii_alone): each for key, each in value.items()}
    entries = [f"{key}: {_write(each, depth + 1, ascii_alone=ascii_alone)}" for key, each in named.items()]
    return "{" + inner + ("," + inner).join(entries) + outer + "}"


def _is_known(merge: Any, ids: Mapping[str, int]) -> bool:
    """Whether both parts of a merge and what they make are tokens: those past the model's rows are none any more."""
    left, right = split_merge(merge)
    return left in ids and right in ids and left + right in ids


def _iter_scores(joined: Joined, like: Vocabulary) -> Iterator[list[Any]]:
    """Yield a Unigram's entries, by id; a hole among the ids is a token that no text has."""
    scores = dict(like.model["vocab"])
    least = min(scores.values(), default=0.0)
    tokens = {number: token for token, number in joined.ids.items()}
    for number in range(joined.size):
        token = tokens.get(number, f"\ufdd0{number}\ufdd1")  # two characters that Unicode has for no text
        yield [token, scores.get(token, least - DEEP * len(token))]
