"""Small files: what is copied, and when two tokenizers are the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergemill.engine.checkpoint import copied_files, open_checkpoint, read_vocabulary, same_tokenizer
from mergemill.engine.errors import CheckpointError


def field(number: int, data: bytes) -> bytes:
    """A field of bytes, as Protocol Buffers has it; up to 16,383 of them."""
    size = len(data)
    return bytes([number << 3 | 2, *([size & 0x7F | 0x80, size >> 7] if size > 127 else [size])]) + data


def sentencepiece(*pieces: str) -> bytes:
    """As SentencePiece stores them: piece, score, kind; and what it was trained with."""
    score, kind = b"\x15\x00\x00\x80\xbf", b"\x18\x01"
    return b"".join(field(1, field(1, piece.encode()) + score + kind) for piece in pieces) + field(2, b"trainer")


BPE = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}
EXTRA = {"model": BPE["model"], "added_tokens": [{"id": 2, "content": "<x>", "special": True}]}


def write_model(folder: Path, files: dict[str, object]):
    folder.mkdir()
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(data)
    return open_checkpoint(str(folder))


def test_tokenizer_template_and_processor_files_are_copied():
    copied = [
        "added_tokens.json",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]
    left = ["README.md", "LICENSE", "config.json", "training_args.bin", "trainer_state.json", "modeling_x.py"]
    assert copied_files(sorted(copied + left)) == tuple(copied)


SAME = {
    "none": ({}, {}),
    "same bytes": ({"tokenizer.json": BPE}, {"tokenizer.json": BPE}),
    "same bytes, whatever they are": ({"tokenizer.json": b"?"}, {"tokenizer.json": b"?"}),
    "other merges": (
        {"tokenizer.json": BPE},
        {"tokenizer.json": {**BPE, "model": {**BPE["model"], "merges": ["a b"]}}},
    ),
    "unigram": (
        {"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}},
        {"tokenizer.json": BPE},
    ),
    "json against vocab": ({"tokenizer.json": BPE}, {"vocab.json": {"a": 0, "b": 1}, "merges.txt": b""}),
    "added tokens in another file": (
        {"tokenizer.json": EXTRA},
        {"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<x>": 2}},
    ),
    "added tokens in the tokenizer's config": (
        {"tokenizer.json": EXTRA},
        {
            "vocab.json": {"a": 0, "b": 1},
            "tokenizer_config.json": {"added_tokens_decoder": {"2": {"content": "<x>"}}},
        },
    ),
    "sentencepiece": ({"tokenizer.model": b"sp"}, {"tokenizer.model": b"sp"}),
    "sentencepiece and json": ({"tokenizer.model": sentencepiece("a", "b")}, {"tokenizer.json": BPE}),
    "sentencepiece with other scores beside": (
        {"tokenizer.model": sentencepiece("a", "b") + field(3, b"normalizer" * 20)},
        {"tokenizer.model": sentencepiece("a", "b")},
    ),
    "sentencepiece with its own pieces listed as added": (
        {
            "tokenizer.model": sentencepiece("a", "b"),
            "tokenizer_config.json": {"added_tokens_decoder": {"0": {"content": "a"}}},
        },
        {"tokenizer.model": sentencepiece("a", "b")},
    ),
    "sentencepiece with an added token, and json": (
        {"tokenizer.model": sentencepiece("a", "b"), "added_tokens.json": {"<x>": 2}},
        {"tokenizer.json": EXTRA},
    ),
    "sentencepiece beside json": (
        {"tokenizer.model": b"sp", "tokenizer.json": BPE},
        {"tokenizer.model": b"sp"},
    ),
}
DIFFERENT = {
    "another id": (
        {"tokenizer.json": BPE},
        {"tokenizer.json": {"model": {"vocab": {"a": 1, "b": 0}}}},
    ),
    "an added token": ({"tokenizer.json": BPE}, {"tokenizer.json": EXTRA}),
    "only one has any": ({"tokenizer.json": BPE}, {}),
    "not to be compared": ({"tokenizer.json": BPE}, {"tokenizer.model": b"sp"}),
    "sentencepiece": ({"tokenizer.model": b"sp"}, {"tokenizer.model": b"other"}),
    "sentencepiece in another order": ({"tokenizer.model": sentencepiece("b", "a")}, {"tokenizer.json": BPE}),
    "sentencepiece cut short": ({"tokenizer.model": sentencepiece("a", "b")[:-3]}, {"tokenizer.json": BPE}),
    "sentencepiece with an added token": (
        {"tokenizer.model": b"sp"},
        {"tokenizer.model": b"sp", "added_tokens.json": {"<x>": 2}},
    ),
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [*((case, True) for case in SAME.values()), *((case, False) for case in DIFFERENT.values())],
    ids=[*(f"same: {name}" for name in SAME), *(f"different: {name}" for name in DIFFERENT)],
)
def test_tokenizers_are_the_same_where_every_token_has_the_same_id(tmp_path, files, expected):
    a, b = write_model(tmp_path / "a", files[0]), write_model(tmp_path / "b", files[1])
    assert same_tokenizer(a, b) is expected
    assert same_tokenizer(b, a) is expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "tokenizer.json: is not JSON"),
        ([], "tokenizer.json: has no model.vocab"),
        ({"model": {}}, "tokenizer.json: has no model.vocab"),
        ({"model": {"vocab": [1]}}, "tokenizer.json: has no model.vocab"),
    ],
)
def test_broken_tokenizer_is_an_error(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        read_vocabulary(write_model(tmp_path / "a", {"tokenizer.json": content}))


def test_broken_added_tokens_are_an_error(tmp_path):
    files = {"vocab.json": {}, "tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "y"}}}}
    with pytest.raises(CheckpointError, match="added_tokens_decoder is not a map from ids to tokens"):
        read_vocabulary(write_model(tmp_path / "a", files))


@pytest.mark.parametrize("data", [b"", b"\x0a", b"\x0a\x00", b"\xff" * 11, b"\x0b", field(1, field(1, b"\xff"))])
def test_what_is_no_sentencepiece_model_lists_nothing(tmp_path, data):
    assert read_vocabulary(write_model(tmp_path / "a", {"tokenizer.model": data})) is None


def test_vocabulary_holds_added_tokens(tmp_path):
    assert read_vocabulary(write_model(tmp_path / "a", {"tokenizer.json": EXTRA})) == {
        "a": 0,
        "b": 1,
        "<x>": 2,
    }
