"""What a plan says of vocabularies, from headers and tokenizer files: ids, roles, files, and what cannot be."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan.sketches import config, llama, plan_of, write_sketch

from mergemill.engine.errors import CheckpointError
from mergemill.engine.plan.values import Plan
from mergemill.engine.tokens.placing import AVERAGE, BASE, ELSEWHERE, NOBODY, NONE, ONE, PADDING, Holders, place_rows

ROWS = 16


def write(
    name: str,
    tokens: str,
    *,
    added: Sequence[str] = (),
    rows: int = ROWS,
    roles: dict[str, str] | None = None,
    **keys: Any,
) -> None:
    """Write a model of so many rows, with tokens in the order of their ids, the added ones last."""
    tensors = {
        key: (dtype, (rows, *shape[1:]) if key in ("model.embed_tokens.weight", "lm_head.weight") else shape)
        for key, (dtype, shape) in llama().items()
    }
    write_sketch(Path(name), tensors, config=config(vocab_size=rows, **keys))
    words = tokens.split()
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    entries = [{"id": len(words) + i, "content": each, **flags} for i, each in enumerate(added)]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(words)}, "merges": []}
    tokenizer = {"version": "1.0", "added_tokens": entries, "model": model}
    Path(name, "tokenizer.json").write_text(json.dumps(tokenizer))
    decoder = {str(each["id"]): {k: v for k, v in each.items() if k != "id"} for each in entries}
    said = {f"{role}_token": token for role, token in (roles or {}).items()}
    Path(name, "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, **said}))


def plan(*models: str, **more: Any) -> Plan:
    entries = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    return plan_of({"merge_method": "linear", "models": entries, **more})


def made(found: Plan, name: str) -> Any:
    return json.loads(next(file.data for file in found.files if file.name == name and file.data is not None))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_tokens_without_a_row_are_ignored_and_the_sources_are_told() -> None:
    write("a", "x y z", added=("<p>", "<q>"), rows=4)
    write("b", "x y w", added=("<r>",), rows=3)
    found = plan("a", "b", tokenizer_source="union")
    (told,) = (each for each in found.warnings if "past the" in each)
    assert "'<q>' of a have ids past the 4 rows of its embedding" in told
    assert found.tokens is not None
    assert found.tokens.added == (("w", 4),)
    vocab = made(found, "tokenizer.json")["model"]["vocab"]
    assert vocab == {"x": 0, "y": 1, "z": 2, "<p>": 3, "w": 4}
    assert made(found, "config.json")["vocab_size"] == 5
    assert [*made(found, "tokenizer_config.json")["added_tokens_decoder"]] == ["3"]


def test_other_forms_of_the_vocabulary_are_left_out_where_it_changes() -> None:
    write("a", "x y")
    write("b", "x y", added=("<t>",))
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json"):
        Path("a", name).write_text("{}")
    same, joined = plan("a", "b", tokenizer_source="base"), plan("a", "b", tokenizer_source="union")
    assert {"vocab.json", "merges.txt", "tokenizer.model"} <= {file.name for file in same.files}
    names = {file.name for file in joined.files}
    assert "special_tokens_map.json" in names
    assert not names & {"vocab.json", "merges.txt", "tokenizer.model"}
    (told,) = (each for each in joined.warnings if "left out" in each)
    assert "merges.txt, tokenizer.model, vocab.json of a are left out" in told


def test_ids_of_special_tokens_are_those_of_the_vocabularys_source() -> None:
    """Numbers and lists, nested ones too; a key that the source lacks keeps its token, or goes with it."""
    nested = {"text_config": {"bos_token_id": 0, "eos_token_id": [1, 2], "image_token_id": 2, "gone_token_id": 1}}
    write("a", "x <e> <i>", eos_token_id=1, **nested)
    write("b", "<i> x y", added=("<end>",), eos_token_id=3, text_config={"bos_token_id": 1, "eos_token_id": [3]})
    Path("a", "generation_config.json").write_text(json.dumps({"eos_token_id": [1], "temperature": 0.6}))
    found = plan("a", "b", base_model="a", tokenizer_source="b")
    changed = made(found, "config.json")
    assert changed["eos_token_id"] == 3
    assert changed["text_config"] == {"bos_token_id": 1, "eos_token_id": [3], "image_token_id": 0}
    assert made(found, "generation_config.json") == {"eos_token_id": 3, "temperature": 0.6, "bos_token_id": 1}
    copied = {file.name: file.copied.url for file in found.files if file.copied is not None}
    assert copied["tokenizer.json"].endswith("/b/tokenizer.json")


def test_a_role_that_tokenizer_and_config_number_differently_is_told() -> None:
    write("a", "x y", added=("<end>",), roles={"eos": "<end>"}, eos_token_id=0)
    (told,) = (each for each in plan("a", "a").warnings if "gives eos the id" in each)
    assert "config.json says eos_token_id 0, the tokenizer gives eos the id 2" in told
    write("a", "x y", added=("<end>",), roles={"eos": "<end>"}, eos_token_id=[0, 2])
    assert not [each for each in plan("a", "a").warnings if "gives eos the id" in each]


@pytest.mark.parametrize("number", [None, [2], "2", 2.0])
def test_ids_that_are_no_numbers_are_told_where_nobody_asks_and_an_error_where_they_count(number: object) -> None:
    write("a", "x y")
    write("b", "x y", added=("<end>",))
    file = json.loads(Path("b/tokenizer.json").read_text())
    file["added_tokens"][0]["id"] = number
    Path("b/tokenizer.json").write_text(json.dumps(file))
    assert [each for each in plan("a", "b").warnings if "b: its tokenizer has ids" in each and "compared" in each]
    with pytest.raises(CheckpointError, match="b: its tokenizer has ids that are not whole numbers"):
        plan("a", "b", tokenizer_source="union")


def test_a_template_whose_tokens_are_none_is_told_with_the_line_that_adds_them() -> None:
    write("a", "x y")
    found = plan("a", "a", chat_template="chatml")
    (told,) = (each for each in found.warnings if "chat template writes" in each)
    assert "'<|im_start|>', '<|im_end|>'" in told
    assert """'tokenizer: {tokens: {"<|im_start|>": {}}}' adds it""" in told
    added = plan("a", "a", chat_template="chatml", tokenizer={"tokens": {"<|im_start|>": {}, "<|im_end|>": {}}})
    assert not [each for each in added.warnings if "chat template writes" in each]


def test_each_rule_gives_the_row_that_it_says() -> None:
    """Four models with 8 rows each of 10 ids: two inputs without a base, one with, and one that is no input."""
    held = np.full((4, 10), NONE)
    held[0, [0, 1, 2]] = [5, 6, 7]
    held[1, [1, 2, 3]] = [0, 1, 2]
    held[2, [2, 3]] = [4, 3]
    held[3, [0, 4]] = [1, 2]
    rows = tuple(held)

    def place(inputs: tuple[int, ...], base: int | None, *, padded: bool = False) -> Any:
        return place_rows(Holders((8,) * 4, rows, inputs, base, 0), np.arange(6), {}, padded=padded)

    found = place((0, 1, 2), 2)
    assert found.why.tolist() == [ONE, AVERAGE, BASE, BASE, ELSEWHERE, NOBODY, PADDING, PADDING, PADDING, PADDING]
    assert found.common.tolist() == [5, -3, 16 + 4, 16 + 3, 24 + 2, -1, 6, 7, -1, -1]
    assert found.several == ((6, 8),)
    assert place((0, 1, 2), None).several == ((6, 8), (10, 19))
    assert place((0,), None, padded=True).common.tolist()[6:] == [-2] * 4
