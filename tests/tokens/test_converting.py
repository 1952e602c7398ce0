"""Tokenizers of other forms, made a tokenizer.json: small ones by hand, and Mistral's own where they are installed."""

import base64
import importlib.util
import json
import struct
from pathlib import Path

import pytest
from models import read_tensors, write_llama
from tokenizers import Tokenizer
from trained import SENTENCES, make_corpus, train, write_tokenizer_files

from mergemill.engine import make_plan, run
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


def write_tekken() -> dict[str, object]:
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
