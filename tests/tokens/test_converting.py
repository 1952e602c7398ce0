"""Tokenizers of other forms, made a tokenizer.json: small ones by hand, and Mistral's own where they are installed."""

import base64
import importlib.util
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import read_tensors, write_llama
from tokenizers import Tokenizer
from trained import SENTENCES, make_corpus, train, write_tokenizer_files

from mergemill.engine import make_plan, run
from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.errors import CheckpointError
from mergemill.engine.storage.ranges import pin_file
from mergemill.engine.tokens import read_vocabulary_of
from mergemill.engine.tokens.pieces import convert_sentencepiece
from mergemill.engine.tokens.tekken import convert_tekken

MISTRAL = importlib.util.find_spec("mistral_common")


def write_field(number: int, value: bytes | float | int) -> bytes:
    if isinstance(value, bytes):
        return bytes([number << 3 | 2, len(value)]) + value
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    key = number << 3
    return (bytes([key]) if key < 128 else bytes([key & 127 | 128, key >> 7])) + bytes([value])


def write_piece(text: str, score: float = -1.0) -> bytes:
    return write_field(1, write_field(1, text.encode()) + write_field(2, score) + write_field(3, 1))


def write_pieces(*, kind: int = 2, trims: int = 0) -> bytes:
    words = ["▁", "a", "b", "c", "ab", "▁a", "▁ab", "abc"]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{i:02X}>", 0.0, 6) for i in range(256))]
    pieces += [(word, -float(i), 1) for i, word in enumerate(words)]
    found = b"".join(
        bytes([1 << 3 | 2, len(body)]) + body
        for text, score, type_ in pieces
        for body in [write_field(1, text.encode()) + write_field(2, score) + write_field(3, type_)]
    )
    trainer, normalizer = write_field(3, kind) + write_field(35, 1), write_field(3, 1) + write_field(4, trims)
    return found + write_field(2, trainer) + write_field(3, normalizer)


def write_tekken() -> dict[str, Any]:
    tokens = [*(bytes([i]) for i in range(256)), b"ab", b" a", b"abc", b"cab"]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(each).decode()} for i, each in enumerate(tokens)]
    special = [{"rank": i, "token_str": text} for i, text in enumerate(("<unk>", "<s>", "</s>"))]
    config = {"pattern": r" ?\p{L}+|\s+|.", "default_vocab_size": 264, "default_num_special_tokens": 4}
    return {"config": config, "vocab": vocab, "special_tokens": special}


def test_pieces_are_merged_by_their_scores_and_others_are_bytes() -> None:
    made = Tokenizer.from_str(json.dumps(convert_sentencepiece(write_pieces(), {})))
    assert made.encode("ab abc", add_special_tokens=False).tokens == ["▁ab", "▁ab", "c"]
    assert made.encode("é", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xA9>"]
    assert made.encode("a").tokens == ["<s>", "▁a"]
    assert made.decode(made.encode("ab é  c").ids) == "ab é  c"


def test_tokens_beside_the_pieces_are_added_and_what_is_no_such_model_is_not_converted() -> None:
    config = {"added_tokens_decoder": {"267": {"content": "<|im_end|>", "special": True}}, "add_bos_token": False}
    made = Tokenizer.from_str(json.dumps(convert_sentencepiece(write_pieces(), config)))
    assert made.encode("a<|im_end|>").ids[-1] == 267
    assert convert_sentencepiece(write_pieces(kind=1), {}) is None
    assert convert_sentencepiece(write_pieces(trims=1), {}) is None
    assert convert_sentencepiece(b"no model", {}) is None


def test_tekken_takes_words_that_are_tokens_whole_and_merges_others_by_rank() -> None:
    made = Tokenizer.from_str(json.dumps(convert_tekken(write_tekken())))
    assert made.encode("cab", add_special_tokens=False).ids == [4 + 259]  # by merges c and ab
    assert made.encode("xabc", add_special_tokens=False).ids == [4 + ord("x"), 4 + 258]
    assert made.encode("</s>", add_special_tokens=False).ids == [2]
    assert made.decode(made.encode("é ab").ids) == "é ab"
    assert convert_tekken({"config": {}}) is None


WRONG_TEKKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "fewer tokens than special ones": lambda file: file["config"].update(default_vocab_size=2),
    "endlessly many": lambda file: file["config"].update(default_vocab_size=math.inf),
    "special ones by the million": lambda file: file["config"].update(
        default_num_special_tokens=10**7, default_vocab_size=10**7 + 260
    ),
    "less than none": lambda file: file["config"].update(default_num_special_tokens=-4),
    "a count as text": lambda file: file["config"].update(default_num_special_tokens="4"),
    "no pattern": lambda file: file["config"].update(pattern=None),
    "a gap in the ranks": lambda file: file["vocab"].pop(200),
    "a rank twice": lambda file: file["vocab"].append({"rank": 0, "token_bytes": "enp6"}),
    "bytes twice": lambda file: file["vocab"][-1].update(token_bytes=file["vocab"][0]["token_bytes"]),
    "no base64": lambda file: file["vocab"][-1].update(token_bytes="!!Y2Fi"),
    "no bytes": lambda file: file["vocab"][-1].update(token_bytes=""),
    "bytes by the thousand": lambda file: file["vocab"][-1].update(token_bytes="eHh4" * 2000),
    "a byte that is no token": lambda file: file["vocab"][7].update(token_bytes="enp6"),
    "a special one with the text of another": lambda file: file["special_tokens"][0].update(token_str="ab"),
    "a special one twice": lambda file: file["special_tokens"][0].update(token_str="<s>"),
    "a special one without a text": lambda file: file["special_tokens"][0].update(token_str=None),
    "a special one past the reserved": lambda file: file["special_tokens"][0].update(rank=4),
}


@pytest.mark.parametrize("name", WRONG_TEKKEN)
def test_a_tekken_file_that_its_library_would_not_load_is_not_converted(name: str) -> None:
    file = write_tekken()
    WRONG_TEKKEN[name](file)
    assert convert_tekken(file) is None


def test_a_tekken_file_that_names_no_special_tokens_has_those_of_its_format() -> None:
    file = write_tekken()
    del file["special_tokens"]
    file["config"].update(default_num_special_tokens=22, default_vocab_size=282)
    made = Tokenizer.from_str(json.dumps(convert_tekken(file)))
    assert made.encode("[INST]ab</s><SPECIAL_21>", add_special_tokens=False).ids == [3, 22 + 256, 2, 21]


NORMALIZER = write_field(3, write_field(3, 1) + write_field(4, 0))
TRAINER = write_field(2, write_field(3, 2))


@pytest.mark.parametrize(
    "data",
    [
        write_piece("a") + bytes([2 << 3, 5]) + NORMALIZER,
        write_piece("a") + write_field(2, b"\xff\xff") + NORMALIZER,
        write_piece("a") + write_field(2, write_field(3, 2) + b"\x1a\x7f") + NORMALIZER,
        write_piece("a") + write_piece("a") + TRAINER + NORMALIZER,
        write_piece("a", math.nan) + TRAINER + NORMALIZER,
        write_piece("") + TRAINER + NORMALIZER,
    ],
    ids=["a number for the trainer", "no trainer", "a cut one", "a piece twice", "no score", "an empty piece"],
)
def test_a_model_of_pieces_that_its_library_would_not_load_is_not_converted(data: bytes) -> None:
    assert convert_sentencepiece(write_piece("a") + TRAINER + NORMALIZER, {}) is not None
    assert convert_sentencepiece(data, {}) is None


WRONG_BESIDE: tuple[tuple[str, object], ...] = (
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": 5}}),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"300": {"content": 5}}}),
    ("added_tokens.json", {"a": "x"}),
    ("added_tokens.json", {"a": [1]}),
)


@pytest.mark.parametrize(("name", "content"), WRONG_BESIDE)
def test_what_is_wrong_beside_pieces_is_told_with_its_file(tmp_path: Path, name: str, content: object) -> None:
    (tmp_path / "tokenizer.model").write_bytes(write_pieces())
    (tmp_path / name).write_text(json.dumps(content))
    pins = {path.name: pin_file(path) for path in sorted(tmp_path.iterdir())}
    with pytest.raises(CheckpointError, match=name):
        read_vocabulary_of(Checkpoint(str(tmp_path), str(tmp_path), {}, {}, b"", pins))


def test_a_model_with_pieces_alone_joins_others(tmp_path: Path) -> None:
    other = train("bytes", [*SENTENCES.values()][:1], 300)
    write_llama(tmp_path / "base", seed=1, layers=1, hidden=32, vocab=267, dtype="float32")
    write_llama(tmp_path / "other", seed=2, layers=1, hidden=32, vocab=other.get_vocab_size(), dtype="float32")
    write_tokenizer_files(tmp_path / "other", other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).unlink(missing_ok=True)
    (tmp_path / "base" / "tokenizer.model").write_bytes(write_pieces())
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1.0}} for name in ("base", "other")]
    run(make_plan({"merge_method": "linear", "models": models, "tokenizer_source": "union"}), tmp_path / "out")
    made = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert made.encode("ab abc", add_special_tokens=False).tokens == ["▁ab", "▁ab", "c"]
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert read_tensors(tmp_path / "out")["model.embed_tokens.weight"].shape[0] == made.get_vocab_size()


@pytest.mark.skipif(MISTRAL is None, reason="mistral-common is not installed")
def test_mistrals_own_tokenizers_encode_as_their_libraries_do() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    assert MISTRAL is not None
    assert MISTRAL.origin is not None
    for path in sorted((Path(MISTRAL.origin).parent / "data").glob("*.model*")):
        made = Tokenizer.from_str(json.dumps(convert_sentencepiece(path.read_bytes(), {})))
        own = sentencepiece.SentencePieceProcessor(model_file=str(path))
        for line in make_corpus():
            if "\0" not in line:
                assert made.encode(line, add_special_tokens=False).ids == own.encode(line)
