"""Tokens of a GGUF file encode texts as the tokenizer did that they came from."""

import json
from typing import Any

import pytest
from models import write_tokenizer
from tokenizers import Tokenizer

from mergemill.engine.checkpoint.gguf.header import GgufList
from mergemill.engine.checkpoint.gguf.opening import tell_of_tokens
from mergemill.engine.checkpoint.gguf.stored_tokens import CONTROL, NORMAL, UNUSED
from mergemill.engine.checkpoint.gguf.tokenizer import PATTERNS, make_tokenizer
from mergemill.engine.checkpoint.made import MadeFiles
from mergemill.engine.checkpoint.vocabulary import parse_tokenizer

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, LEVEL],
    **{
        name: [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {**LEVEL, "use_regex": False},
        ]
        for pattern, name in PATTERNS
    },
}
TEXTS = ("hello world, 1234 it's IT'S", "<s>the e\u0301t\u00e9\r\n\n   x</s> the", "\u4f60\u597d  \tthere\u00a0and", "")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, size=500)
    found: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return found


def make_settings(stored: dict[str, Any], cut: str, rows: int) -> dict[str, Any]:
    by_place = {place: token for token, place in stored["model"]["vocab"].items()}
    special = {each["id"] for each in stored["added_tokens"]}
    kinds = [CONTROL if i in special else NORMAL if i in by_place else UNUSED for i in range(rows)]
    lists = {
        "tokens": [by_place.get(i, f"[PAD{i}]") for i in range(rows)],
        "token_type": kinds,
        "merges": [" ".join(pair) for pair in stored["model"]["merges"]],
    }
    settings: dict[str, Any] = {f"tokenizer.ggml.{key}": GgufList(len(of), tuple(of)) for key, of in lists.items()}
    return settings | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": cut, "tokenizer.ggml.bos_token_id": 1}


@pytest.mark.parametrize("cut", CUTS)
def test_texts_are_encoded_as_before(stored: dict[str, Any], cut: str) -> None:
    begins = cut in ("llama-bpe", "tekken")
    before = {
        **stored,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[cut]},
        "normalizer": {"type": "NFC"} if cut == "qwen2" else None,
        "model": {**stored["model"], "ignore_merges": begins},
    }
    files = make_tokenizer(make_settings(stored, cut, 600))
    made, own = Tokenizer.from_str(files["tokenizer.json"].decode()), Tokenizer.from_str(json.dumps(before))
    for text in TEXTS:
        ids = made.encode(text).ids
        assert ids == [1] * begins + own.encode(text).ids
        assert made.decode(ids) == own.decode(ids)
    assert json.loads(files["tokenizer_config.json"])["bos_token"] == "<s>"


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "llama"},
        {"pre": "another"},
        {"tokens": GgufList(2, ("a", "a"))},
        {"merges": GgufList(1, ("a b c",))},
        {"merges": GgufList(1, ("nowhere seen",))},
        {"token_type": GgufList(600)},
    ],
)
def test_what_would_be_a_guess_is_not_made(stored: dict[str, Any], changed: dict[str, Any]) -> None:
    settings = make_settings(stored, "gpt-2", 600)
    assert not make_tokenizer(settings | {f"tokenizer.ggml.{key}": value for key, value in changed.items()})


def test_no_file_is_made_before_it_is_read(stored: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor to know which there are, or whose id is which."""
    asked: list[str] = []
    real = json.dumps
    monkeypatch.setattr(json, "dumps", lambda value, **more: asked.append("made") or real(value, **more))
    files = make_tokenizer(make_settings(stored, "llama-bpe", 600))
    assert isinstance(files, MadeFiles)
    assert (sorted(files), "tokenizer.json" in files, "vocab.json" in files) == (
        ["tokenizer.json", "tokenizer_config.json"],
        True,
        False,
    )
    ids = files.list_vocabulary()
    assert asked == []
    assert ids == parse_tokenizer(json.loads(files["tokenizer.json"]), "here")
    assert files["tokenizer.json"] is files["tokenizer.json"]
    assert asked == ["made"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "t5"}, "('t5' cut as 'llama-bpe')"),
        ({"model": "bert", "pre": "x" * 999}, f"('bert' cut as '{'x' * 40}')"),
        ({"pre": "of-its-own"}, "('gpt2' cut as 'of-its-own')"),
        ({"model": None, "pre": 7}, "its tokens are not read"),
    ],
)
def test_tokens_of_another_kind_are_told_by_name(stored: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    changed = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    settings = make_settings(stored, "llama-bpe", 600) | changed
    assert make_tokenizer(settings) == {}
    told = tell_of_tokens(settings, "model.gguf")
    assert said in told
    assert "take tokenizer and config of another model" in told
