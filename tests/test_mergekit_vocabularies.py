"""Rows of joined vocabularies against mergekit 0.1.5, token by token, where the two rules are one.

Where ids go and how text is encoded differs on purpose; the row that each model contributes for a token does not.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors, write_llama
from reference.mergekit import Job, MergekitError, find_skip_reason, run_mergekit_batch
from tokenizers import AddedToken, Tokenizer
from trained import SENTENCES, train, write_tokenizer_files

from mergemill.engine import merge

CHATML = ("<|im_start|>", "<|im_end|>")
NAMES = ("model.embed_tokens.weight", "lm_head.weight")

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "union": {"tokenizer_source": "union", "base_model": "base"},
    "padded": {"tokenizer": {"source": "base", "pad_to_multiple_of": 64}, "base_model": "base"},
    "tokens": {
        "base_model": "base",
        "tokenizer": {
            "source": "union",
            "tokens": {
                CHATML[0]: {"source": "tuned"},
                CHATML[1]: {"source": {"kind": "model_token", "model": "other", "token": "</s>"}, "force": True},
                "<s>": {"source": {"kind": "zero"}, "force": True},
            },
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune with ChatML, a model of other words; what mergekit makes of them is below ``theirs``."""
    folder = tmp_path_factory.mktemp("mergekit-vocabularies")
    texts = [*SENTENCES.values()]
    base = train("bytes", texts, 400)
    tuned = Tokenizer.from_str(base.to_str())
    tuned.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in CHATML])
    other = train("bytes", [text[::-1] for text in texts], 420)
    other.add_special_tokens([AddedToken(CHATML[1], special=True, normalized=False)])
    for seed, (name, tokenizer) in enumerate((("base", base), ("tuned", tuned), ("other", other))):
        write_llama(folder / name, seed=seed, layers=1, vocab=tokenizer.get_vocab_size(), dtype="float32")
        write_tokenizer_files(folder / name, tokenizer)
    return folder


def write_recipe(name: str, folder: Path) -> str:
    models = [
        {"model": each, "parameters": {"weight": weight}} for each, weight in (("base", 1), ("tuned", 2), ("other", 3))
    ]
    text = json.dumps({"merge_method": "linear", "models": models, "dtype": "float32", **RECIPES[name]})
    for each in ("base", "tuned", "other"):
        text = text.replace(f': "{each}"', f": {json.dumps(str(folder / each))}")
    return text.replace(f'"source": {json.dumps(str(folder / "base"))}, "pad', '"source": "base", "pad')


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Mapping[str, Path]:
    if reason := find_skip_reason():
        pytest.skip(reason)
    jobs = [Job(write_recipe(name, folder), folder / "theirs" / name) for name in RECIPES]
    (folder / "theirs").mkdir()
    for found in run_mergekit_batch(jobs):
        if isinstance(found, MergekitError):
            raise found
    return {name: folder / "theirs" / name for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_each_token_has_the_row_that_mergekit_gives_it(
    name: str, folder: Path, theirs: Mapping[str, Path], tmp_path: Path
) -> None:
    merge(write_recipe(name, folder), tmp_path / "ours")
    ours, reference = read_tensors(tmp_path / "ours"), read_tensors(theirs[name])
    ids, their_ids = (
        Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab(with_added_tokens=True)
        for path in (tmp_path / "ours", theirs[name])
    )
    assert ids.keys() == their_ids.keys()
    tokens = sorted(ids)
    for tensor in NAMES:
        torch.testing.assert_close(
            ours[tensor][[ids[token] for token in tokens]],
            reference[tensor][[their_ids[token] for token in tokens]],
            rtol=2e-6,
            atol=2e-7,
        )
    if name == "padded":
        assert ours[NAMES[0]].shape == reference[NAMES[0]].shape == (448, 64)
        torch.testing.assert_close(ours[NAMES[0]][400:], reference[NAMES[0]][400:], rtol=2e-5, atol=2e-6)
