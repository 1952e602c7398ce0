"""Pieces of SentencePiece in a GGUF file become a tokenizer that encodes as transformers' own conversion does."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from models import read_tensors
from sentencepieces import BYTE, CONTROL, NORMAL, USER, make_pieces
from trained import SENTENCES

from mergemill.engine import make_convert_plan, make_plan, run
from mergemill.engine.checkpoint.gguf.header import GgufList
from mergemill.engine.checkpoint.gguf.pieces import MOST_CUT
from mergemill.engine.checkpoint.gguf.tokenizer import make_tokenizer

transformers = pytest.importorskip("transformers")
MORE = (
    ("<extra>", -1000.0, CONTROL),
    ("<think>", -1000.0, USER),
    (" " * 5, -1000.0, USER),
    ("aaa", -900.0, NORMAL),
    ("aa", -900.0, NORMAL),
)
PIECES = (*make_pieces(), *MORE)
CORPUS = (
    *(line.strip("\r") for text in SENTENCES.values() for line in text.split("\n")),
    "", " ", "   three", "a  b   c    d     e", "\ttab\n\nlines\r\n", "<s>x</s> y<extra> z", "a<think>b </think>",
    "\u00e9t\u00e9 e\u0301 \U0001f600\U0001f469\u200d\U0001f680", "aaaa aaa \u2581\u2581 \u2581", "\u0000\u00a0 \ufeff",
)  # fmt: skip
ARCHITECTURES = ("llama", "gemma2", "gemma3")


def write_file(folder: Path, arch: str, **more: Any) -> Path:
    """Write a file with tokens, and of one layer what there must be."""
    writer = gguf.GGUFWriter(folder / "model.gguf", arch)
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32}
    for name, size in (sizes | {"head_count": 2, "head_count_kv": 2, "key_length": 16}).items():
        getattr(writer, f"add_{name}")(size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in PIECES])
    writer.add_token_scores([score for _, score, _ in PIECES])
    writer.add_token_types([kind for _, _, kind in PIECES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tensor("token_embd.weight", np.ones((len(PIECES), 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    for name, rows in {"attn_q": 32, "attn_k": 32, "attn_norm": 0}.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.ones((rows, 32) if rows else 32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("more", [{}, {"add_bos_token": False, "add_eos_token": True, "chat_template": "{{ x }}"}])
def test_texts_have_the_ids_that_transformers_gives_them(arch: str, more: dict[str, Any], tmp_path: Path) -> None:
    path = write_file(tmp_path, arch, **more)
    run(make_convert_plan(str(path), dtype="bfloat16"), tmp_path / "out", workers=0)
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in CORPUS:
        ids = expected(text).input_ids
        assert made(text).input_ids == ids, text
        assert made.decode(ids) == expected.decode(ids)
        assert made.decode(ids, skip_special_tokens=True) == expected.decode(ids, skip_special_tokens=True)
    assert made(*CORPUS[:2]).input_ids == expected(*CORPUS[:2]).input_ids
    assert (made.bos_token, made.eos_token, made.unk_token) == ("<s>", "</s>", "<unk>")
    assert made.chat_template == more.get("chat_template")
    assert len(made) == len(PIECES)


def test_a_merge_takes_the_tokenizer_of_a_file(tmp_path: Path) -> None:
    path = write_file(tmp_path, "llama")
    whole = {"merge_method": "passthrough", "slices": [{"sources": [{"model": str(path), "layer_range": [0, 1]}]}]}
    run(make_plan(whole | {"tokenizer_source": str(path)}), tmp_path / "out", workers=0)
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made.tokenize("a<think>b") == ["▁a", "<think>", "b"]
    assert read_tensors(tmp_path / "out")["model.embed_tokens.weight"].shape[0] == len(PIECES)


def make_settings(**changed: Any) -> dict[str, Any]:
    texts, scores, kinds = zip(*PIECES, strict=True)
    lists = {"tokens": texts, "scores": scores, "token_type": kinds} | changed
    found = {f"tokenizer.ggml.{key}": GgufList(len(of), of) for key, of in lists.items()}
    return found | {"tokenizer.ggml.model": "llama", "general.architecture": "llama"}


def test_a_space_is_put_before_a_text_unless_the_file_says_no() -> None:
    made = [
        json.loads(make_tokenizer(make_settings() | more)["tokenizer.json"])
        for more in ({}, {"tokenizer.ggml.add_space_prefix": False})
    ]
    found = [transformers.PreTrainedTokenizerFast(tokenizer_object=load(each)).tokenize("a") for each in made]
    assert found == [["▁a"], ["a"]]


def load(made: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(made))


def test_merges_that_a_file_lists_are_those_that_it_has() -> None:
    made = json.loads(make_tokenizer(make_settings(merges=("▁ a",)))["tokenizer.json"])
    assert made["model"]["merges"] == [["▁", "a"]]


@pytest.mark.parametrize(
    "changed",
    [
        {"scores": ()},
        {"scores": (1.0,)},
        {"scores": tuple(float("nan") for _ in PIECES)},
        {"token_type": (BYTE,)},
        {"tokens": tuple("▁" for _ in PIECES)},
        {"tokens": (*(text for text, _, _ in PIECES[:-1]), "x" * (int(MOST_CUT**0.5) + 1))},
        {"merges": ("nowhere seen",)},
    ],
)
def test_lists_that_do_not_suit_make_no_tokenizer(changed: dict[str, Any]) -> None:
    assert not make_tokenizer(make_settings(**changed))
