"""Joined vocabularies: where ids go, and that text is encoded as the source encodes it, by the library itself."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer
from trained import KINDS, SENTENCES, make_corpus, train, write_tokenizer_files

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.storage.ranges import pin_file
from mergemill.engine.tokens.joining import Joined, join_vocabularies, warn_of_joined
from mergemill.engine.tokens.reading import FLAGS, AddedToken, Vocabulary, read_vocabulary_of
from mergemill.engine.tokens.writing import to_bytes, write_config, write_tokenizer

CHATML = ("<|im_start|>", "<|im_end|>")


def read(folder: Path) -> Vocabulary:
    pins = {path.name: pin_file(path) for path in sorted(folder.iterdir())}
    found = read_vocabulary_of(Checkpoint(str(folder), str(folder), {}, {}, b"", pins))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, Path]]:
    """Of each kind two that know different texts; the second adds ChatML."""
    folder = tmp_path_factory.mktemp("trained")
    texts = [*SENTENCES.values()]
    made: dict[str, dict[str, Path]] = {}
    for kind in KINDS:
        one = train(kind, texts, 600)
        other = train(kind, [text[::-1] for text in texts] + texts[2:4], 700)
        other.add_special_tokens([LibraryToken(each, special=True, normalized=False) for each in CHATML])
        made[kind] = {
            "one": write_tokenizer_files(folder / kind / "one", one),
            "other": write_tokenizer_files(folder / kind / "other", other),
        }
    return made


def join(folders: Mapping[str, Path], source: str = "one", **how: Any) -> tuple[Joined, Tokenizer]:
    vocabularies = {model: read(folder) for model, folder in folders.items()}
    joined = join_vocabularies(vocabularies, source, **({"union": True} | how))
    return joined, Tokenizer.from_str(write_tokenizer(joined, vocabularies).decode())


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_encodes_as_the_source_does(trained: Mapping[str, Mapping[str, Path]], kind: str) -> None:
    folders = trained[kind]
    joined, made = join(folders)
    own, other = (Tokenizer.from_file(str(folders[model] / "tokenizer.json")) for model in ("one", "other"))
    vocabulary = own.get_vocab()
    assert {token: joined.ids[token] for token in vocabulary} == vocabulary  # the source's ids never move
    assert joined.ids == made.get_vocab(with_added_tokens=True)
    foreign = sorted(other.get_vocab().keys() - vocabulary.keys() - {*CHATML}, key=other.token_to_id)
    assert list(joined.regular) == foreign
    assert joined.new == CHATML
    assert sorted(joined.ids.values()) == [*range(len(joined.ids))]
    compared = 0
    for line in make_corpus():
        wanted = own.encode(line, add_special_tokens=False)
        if own.token_to_id("<unk>") in wanted.ids or kind == "wordpiece":
            continue
        has_bytes = kind == "sentencepiece" and any(token.startswith("<0x") for token in wanted.tokens)
        found = made.encode(line, add_special_tokens=False)
        if not has_bytes:
            assert found.ids == wanted.ids
            compared += 1
        assert made.decode(found.ids, skip_special_tokens=False) == own.decode(wanted.ids, skip_special_tokens=False)
        start, end = joined.ids[CHATML[0]], joined.ids[CHATML[1]]
        turned = made.encode(f"{CHATML[0]}{line}{CHATML[1]}", add_special_tokens=False).ids
        assert (turned[0], turned[-1], turned.count(start), turned.count(end)) == (start, end, 1, 1)
    assert compared >= {"bytes": 200, "sentencepiece": 40, "unigram": 150, "wordpiece": 0}[kind]
    for number in range(joined.size):
        assert made.id_to_token(number) is not None


def test_a_text_that_the_source_has_as_bytes_alone_may_use_another_models_character(
    trained: Mapping[str, Mapping[str, Path]],
) -> None:
    """The one exception: otherwise the tokens would be out of reach for good."""
    joined, made = join(trained["sentencepiece"])
    own = Tokenizer.from_file(str(trained["sentencepiece"]["one"] / "tokenizer.json"))
    for line in make_corpus():
        wanted, found = own.encode(line, add_special_tokens=False), made.encode(line, add_special_tokens=False)
        left = [token for token in found.tokens if token in joined.regular]
        assert all(len(token) == 1 for token in left)
        assert made.decode(found.ids) == own.decode(wanted.ids)


def test_a_wordpiece_tells_how_many_tokens_join(trained: Mapping[str, Mapping[str, Path]]) -> None:
    vocabularies = {model: read(folder) for model, folder in trained["wordpiece"].items()}
    joined = join_vocabularies(vocabularies, "one", union=True)
    (told,) = warn_of_joined(joined, vocabularies)
    assert told.startswith(f"{len(joined.regular):,} regular tokens of other models join the WordPiece")
    same = join_vocabularies(vocabularies, "one", union=False)
    assert same.is_source
    assert list(warn_of_joined(same, vocabularies)) == []


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "unigram"])
def test_a_union_with_an_extension_encodes_as_the_extension_does(tmp_path: Path, kind: str) -> None:
    large = train(kind, [*SENTENCES.values()], 600)
    data = json.loads(large.to_str())
    vocab, merges = data["model"]["vocab"], data["model"].get("merges")
    if merges:  # the small one lacks the last of the large one's
        gone = {"".join(merge) for merge in merges[-40:]}
        data["model"] |= {
            "vocab": {token: i for token, i in vocab.items() if token not in gone},
            "merges": merges[:-40],
        }
    else:
        data["model"]["vocab"] = vocab[:-40]
    small = Tokenizer.from_str(json.dumps(data))
    small.add_special_tokens([CHATML[0]])  # which has the id that the extension gives to another
    folders = {
        "small": write_tokenizer_files(tmp_path / "small", small),
        "large": write_tokenizer_files(tmp_path / "large", large),
    }
    joined, made = join(folders, "small")
    assert joined.like == "large"
    assert joined.ids[CHATML[0]] == small.token_to_id(CHATML[0])
    differing = 0
    for line in make_corpus():
        wanted = large.encode(line, add_special_tokens=False)
        assert made.encode(line, add_special_tokens=False).tokens == wanted.tokens
        differing += wanted.tokens != small.encode(line, add_special_tokens=False).tokens
    assert differing > 5


def make_vocabulary(regular: str, **added: tuple[int, bool]) -> Vocabulary:
    ids = {token: number for number, token in enumerate(regular.split())}
    flags = {
        name: AddedToken(name, tuple(flag == "special" and special for flag in FLAGS))
        for name, (_, special) in added.items()
    }
    ids |= {name: number for name, (number, _) in added.items()}
    model = {"type": "BPE", "vocab": dict(ids), "merges": []}
    return Vocabulary(ids, flags, "BPE", {"model": model}, {})


def test_new_tokens_follow_in_blocks_and_flags_are_the_first_models() -> None:
    models = {
        "a": make_vocabulary("x y", end=(3, True)),
        "b": make_vocabulary("x z y w", end=(9, False), turn=(5, True), y=(2, True)),
        "c": make_vocabulary("v z turn", role=(7, False)),
    }
    joined = join_vocabularies(models, "a", union=True, asked=["turn", "<|new|>", "x"])
    assert joined.ids == {"x": 0, "y": 1, "end": 3, "z": 4, "w": 5, "v": 6, "turn": 7, "role": 8, "<|new|>": 9}
    assert (joined.regular, joined.new) == (("z", "w", "v"), ("turn", "role", "<|new|>"))
    assert joined.marked == {"y": "b"}
    assert {token: each.special for token, each in joined.added.items()} == {
        "y": True, "end": True, "turn": True, "role": False, "<|new|>": True,
    }  # fmt: skip
    (told,) = warn_of_joined(joined, models)
    assert told == "token 'end' is added by a and b with special True and False; those of a hold"
    asked = join_vocabularies(models, "a", union=False, asked=["turn", "x"])
    assert (asked.ids["turn"], asked.added["turn"].special, asked.regular, asked.is_source) == (4, True, (), False)
    config = write_config(joined, {"eos_token": "end", "added_tokens_decoder": {}})
    assert [*config["added_tokens_decoder"]] == ["1", "3", "7", "8", "9"]


def test_tokens_without_a_row_are_none(tmp_path: Path) -> None:
    """A merge of a BPE that makes one is none either, or no library would load it."""
    tokenizer = train("bytes", [*SENTENCES.values()], 500)
    vocabulary = read(write_tokenizer_files(tmp_path, tokenizer))
    joined = join_vocabularies({"a": vocabulary.within(450)}, "a", union=False, asked=["<|new|>"])
    made = Tokenizer.from_str(write_tokenizer(joined, {"a": vocabulary.within(450)}).decode())
    assert (made.get_vocab_size(), made.token_to_id("<|new|>")) == (451, 450)


def test_27_000_new_tokens_take_less_than_ten_seconds(tmp_path: Path) -> None:
    vocab = {chr(0x4E00 + i // 170) + chr(0x3400 + i % 170) * 2: i for i in range(30_000)}
    other = {f"{token}ö": i for token, i in vocab.items()}
    for name, each in (("a", vocab), ("b", other)):
        (tmp_path / name).mkdir()
        data = {"model": {"type": "BPE", "vocab": each, "merges": []}, "added_tokens": []}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(data))
    began_s = time.process_time()
    joined, made = join({name: tmp_path / name for name in "ab"}, "a")
    seconds = time.process_time() - began_s
    assert (len(joined.regular), made.get_vocab_size()) == (30_000, 60_000)
    assert seconds < 10


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@settings(max_examples=60, deadline=None)
@given(st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)))
def test_json_is_written_as_libraries_write_it(value: Any) -> None:
    assert to_bytes({"x": value}) == (json.dumps({"x": value}, indent=2, ensure_ascii=False) + "\n").encode()
