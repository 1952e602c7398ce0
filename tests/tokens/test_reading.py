"""What a tokenizer's files say: tokens and ids as the library has them, and the bytes that tokens stand for."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from trained import KINDS, SENTENCES, make_corpus, train, write_tokenizer_files

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.vocabulary import parse_tokenizer
from mergemill.engine.errors import CheckpointError
from mergemill.engine.storage.ranges import pin_file
from mergemill.engine.tokens import Vocabulary, read_vocabulary_of, spell_bytes


def open_tokenizer(folder: Path) -> Checkpoint:
    """Return a model of which nothing but its tokenizer is there."""
    pins = {path.name: pin_file(path) for path in sorted(folder.iterdir())}
    return Checkpoint(str(folder), str(folder), {}, {}, b"", pins)


def read(folder: Path) -> Vocabulary:
    found = read_vocabulary_of(open_tokenizer(folder))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Path]]:
    folder = tmp_path_factory.mktemp("trained")
    made = {kind: train(kind, [*SENTENCES.values()], 600) for kind in KINDS}
    return {kind: (each, write_tokenizer_files(folder / kind, each)) for kind, each in made.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_ids_are_those_that_the_library_gives(trained: dict[str, tuple[Tokenizer, Path]], kind: str) -> None:
    tokenizer, folder = trained[kind]
    found = read(folder)
    assert found.ids == tokenizer.get_vocab(with_added_tokens=True)
    assert [*found.added] == ["<unk>", "<s>", "</s>"]
    assert all(each.special for each in found.added.values())
    assert found.roles == {"bos": "<s>", "eos": "</s>"}
    assert found.size == tokenizer.get_vocab_size()
    assert found.is_byte_level == (kind == "bytes")
    assert {*found.within(10).ids.values()} == {*range(10)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_a_text_stand_for_its_bytes(trained: dict[str, tuple[Tokenizer, Path]], kind: str) -> None:
    tokenizer, folder = trained[kind]
    found = read(folder)
    for line in make_corpus()[:120]:
        tokens = tokenizer.encode(line, add_special_tokens=False).tokens
        if "<unk>" in tokens:
            continue
        spelt = b"".join(spell_bytes(token, found) for token in tokens).decode()
        if kind == "wordpiece":  # which knows no spaces, and no case
            assert spelt.replace(" ", "") == "".join(tokenizer.normalizer.normalize_str(line).split())
        elif kind == "unigram":
            assert spelt == f" {line}".replace("  ", " ") or spelt == f" {line}" or line.startswith(" ")
        else:
            assert spelt == (line if kind == "bytes" else f" {line}")


def test_a_broken_tokenizer_is_an_error_that_names_it(tmp_path: Path) -> None:
    for text in (
        "{",
        "[]",
        '{"model": []}',
        '{"model": {"vocab": {"a": "b"}}}',
        '{"model": {"vocab": {}}, "added_tokens": [7]}',
        '{"model": {"vocab": {}, "merges": null}}',
    ):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            read_vocabulary_of(open_tokenizer(tmp_path))


def test_ids_alone_are_read_where_there_is_no_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    decoder = {"2": {"content": "<|x|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    found = read(tmp_path)
    assert found.ids == {"a": 0, "b": 1, "<|x|>": 2}
    assert (found.kind, found.added["<|x|>"].special) == ("", True)


NAMED = st.sampled_from(["", "t0", "t1", "<a>", "<b>", "<c>"])
ADDED = st.lists(st.tuples(NAMED, st.integers(0, 15), st.booleans()), max_size=6)


@settings(max_examples=80, deadline=None)
@given(st.permutations(range(7)), st.integers(1, 7), st.sampled_from(["BPE", "Unigram", "WordPiece"]), ADDED)
def test_added_tokens_have_the_ids_that_the_library_gives_them(
    ids: list[int], count: int, kind: str, added: list[tuple[str, int, bool]]
) -> None:
    """Whatever the file says: some are in the vocabulary with another id, twice, without text, or leave holes."""
    vocab = {f"t{i}": number for i, number in enumerate(ids[:count])}
    models = {
        "BPE": {"vocab": vocab, "merges": []},
        "Unigram": {"vocab": [[token, -1.0] for token in vocab], "unk_id": 0},
        "WordPiece": {"vocab": vocab, "unk_token": "t0", "continuing_subword_prefix": "##"}
        | {"max_input_chars_per_word": 9},
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    entries = [{"id": number, "content": text, "special": special, **flags} for text, number, special in added]
    written = {"version": "1.0", "added_tokens": entries, "model": {"type": kind, **models[kind]}}
    assert parse_tokenizer(written, "here") == Tokenizer.from_str(json.dumps(written)).get_vocab()
