"""A real model without rows for the words of a text: omp reads it nearly as before, mean and zero rows do not."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from smollm2 import GARDEN

from mergemill.engine import make_transplant_plan, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EMBEDDING = "model.embed_tokens.weight"
K = 32


def test_omp_reads_words_that_mean_and_zero_rows_do_not(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(GARDEN, return_tensors="pt")["input_ids"]
    words = {int(each) for each in ids.flatten() if len(tokenizer.convert_ids_to_tokens(int(each))) > 3}
    write_without(smollm2, tmp_path / "model", words)
    write_narrower(smollm2, tmp_path / "donor")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    measure = make_measure(model, ids)
    found = {"before": measure(model.get_input_embeddings().weight.detach().clone())}
    for method in ("omp", "mean", "zero"):
        plan = make_transplant_plan(str(tmp_path / "model"), str(tmp_path / "donor"), method=method, k=K)
        assert f"{len(words)} approximated" in plan.donor
        run(plan, tmp_path / method, workers=0)
        (path,) = (tmp_path / method).glob("*.safetensors")
        found[method] = measure(load_file(path)[EMBEDDING].float())
    print({name: round(each, 3) for name, each in found.items()})  # noqa: T201 - shown by pytest -s
    assert found["before"] < found["omp"] < 0.5 * min(found["mean"], found["zero"])


def make_measure(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """Return what gives the perplexity per byte of the text with an embedding, which is the head as well."""

    def measure(rows: torch.Tensor) -> float:
        with torch.inference_mode():
            model.get_input_embeddings().weight.copy_(rows)  # type: ignore[operator]
            loss = float(model(input_ids=ids, labels=ids).loss)
        return math.exp(loss * (ids.shape[1] - 1) / len(GARDEN.encode()))

    return measure


def write_without(source: Path, folder: Path, words: set[int]) -> None:
    """Write the model with a tokenizer that calls these tokens something else, as if it had never known them."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {f"unknown{i}" if i in words else token: i for token, i in vocab.items()}
    tokenizer["model"]["merges"] = []
    path.write_text(json.dumps(tokenizer))


def write_narrower(source: Path, folder: Path) -> None:
    """Write a donor whose space is another one: fewer dimensions, turned, with some noise."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(source / name, folder)
    (path,) = source.glob("*.safetensors")
    rows = load_file(path)[EMBEDDING].float()
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(rows.shape[1], 512, generator=generator))[0]
    moved = rows @ turn
    moved += 0.1 * moved.std() * torch.randn(moved.shape, generator=generator)
    save_file({EMBEDDING: moved.bfloat16().contiguous()}, folder / "model.safetensors", {"format": "pt"})
