"""Which tokens of two vocabularies are the same, and how one spells the tokens of the other."""

from collections.abc import Mapping
from typing import Any

import pytest
from tokenizers import Tokenizer
from trained import SENTENCES, train

from mergemill.engine.tokens.matching import match_tokens
from mergemill.engine.tokens.reading import AddedToken, Vocabulary
from mergemill.engine.tokens.spelling import spell_tokens

SPECIAL = (False, False, False, False, True)
PLAIN = (False, False, False, False, False)


def make(kind: str, tokens: list[str], added: Mapping[str, tuple[bool, ...]] | None = None, **roles: str) -> Vocabulary:
    """Return a vocabulary whose ids are the places of its tokens; kind: bytes, ▁ or ##."""
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer: dict[str, Any] = {"model": {"vocab": ids}}
    if kind == "bytes":
        tokenizer["decoder"] = {"type": "ByteLevel"}
    model = "WordPiece" if kind == "##" else "BPE"
    return Vocabulary(
        ids, {name: AddedToken(name, each) for name, each in (added or {}).items()}, model, tokenizer, {}, roles
    )


MODEL = make(
    "▁", ["<s>", "</s>", "<0x61>", "<0xE9>", "▁the", "a", "▁", "th", "ā", "<x>"], {"<x>": PLAIN}, bos="<s>", eos="</s>"
)
MARKED = {"<s>": SPECIAL, "</s>": SPECIAL}
MODEL = Vocabulary(
    MODEL.ids,
    MODEL.added | {n: AddedToken(n, f) for n, f in MARKED.items()},
    MODEL.kind,
    MODEL.tokenizer,
    {},
    MODEL.roles,
)
DONOR = make(
    "bytes",
    ["<|end|>", "Ġthe", "the", "a", "é", "Ġ", "Ģ", "<x>", "</s>", "Ġtheft", "ā", "ĠĠ"],
    {"<|end|>": SPECIAL, "<x>": SPECIAL, "</s>": SPECIAL},
    eos="<|end|>",
)


def test_by_bytes_added_tokens_come_first_then_roles_then_bytes() -> None:
    found = match_tokens(DONOR, MODEL, "bytes")
    names = {number: token for token, number in DONOR.ids.items()}
    own = {number: token for token, number in MODEL.ids.items()}
    same = {names[number]: own[of] for number, of in found.same.items()}
    assert same == {"Ġthe": "▁the", "a": "a", "é": "<0xE9>", "Ġ": "▁", "<x>": "<x>", "</s>": "</s>"}
    assert {names[number]: own[of] for number, of in found.role.items()} == {"<|end|>": "</s>"}
    assert {names[number]: own[of] for number, of in found.prefix.items()} == {"the": "th", "Ġtheft": "▁the"}
    assert [*found.shared] == sorted(found.shared)


def test_a_byte_token_is_a_byte_token_first() -> None:
    found = match_tokens(make("▁", ["<0x61>", "a", "b"]), make("▁", ["a", "<0x61>", "<0x62>"]), "bytes")
    assert found.same == {0: 1, 1: 0, 2: 2}


def test_of_several_tokens_with_the_same_bytes_the_lowest_id_is_taken() -> None:
    assert match_tokens(make("##", ["##a", "a"]), make("bytes", ["Ġa", "a", "Ġ"]), "bytes").same == {0: 1, 1: 0}


def test_by_text_strings_are_equal_but_for_the_mark_and_roles_alone_know_roles() -> None:
    found = match_tokens(DONOR, MODEL, "text")
    names = {number: token for token, number in DONOR.ids.items()}
    assert {names[number] for number in found.same} == {"Ġthe", "a", "Ġ", "<x>", "ā"}, "of which ā is another letter"
    assert {names[number]: of for number, of in found.role.items()} == {"<|end|>": 1}
    assert {names[number] for number in found.byte} == {"é"}


@pytest.fixture(scope="module")
def trained() -> dict[str, tuple[Tokenizer, Vocabulary]]:
    import json

    found = {}
    for kind in ("bytes", "sentencepiece"):
        tokenizer = train(kind, [SENTENCES["english"], SENTENCES["european"]], 400)
        data = json.loads(tokenizer.to_str())
        ids = tokenizer.get_vocab(with_added_tokens=True)
        added = {each["content"]: AddedToken(each["content"], SPECIAL) for each in data["added_tokens"]}
        found[kind] = (tokenizer, Vocabulary(ids, added, "BPE", data, {}, {"unk": "<unk>"}))
    return found


def test_a_model_spells_tokens_as_it_would_the_same_text(trained: dict[str, tuple[Tokenizer, Vocabulary]]) -> None:
    (_, pieces), (bytes_, levels) = trained["sentencepiece"], trained["bytes"]
    by_pieces = spell_tokens(["Ġboats", "boats", "Ã©", "Ã", "</s>"], levels, pieces, where="a")
    names = {number: token for token, number in pieces.ids.items()}
    spelt = [[names[number] for number in each] for each in by_pieces]
    assert "".join(spelt[0]) == "▁boats"
    assert "".join(spelt[1]) == "boats", "without a space in front"
    assert spelt[2] in (["é"], ["<0xC3>", "<0xA9>"])
    assert spelt[3] == ["<0xC3>"], "which is no text"
    assert spelt[4] == ["</s>"]
    (by_levels,) = spell_tokens(["▁boats"], pieces, levels, where="a")
    assert by_levels == bytes_.encode(" boats", add_special_tokens=False).ids
