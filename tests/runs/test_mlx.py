"""What is merged loads in mlx-lm, strictly, on the CPU, and calculates what transformers calculates.

It needs ``pip install "mlx[cpu]" mlx-lm``, which CI does not install. Run on 2026-11-30 on Linux with mlx 0.32.4,
mlx-lm 0.32.2.
"""

from pathlib import Path

import pytest
from models import write_llama
from trained import SENTENCES, train, write_tokenizer_files

from mergemill.engine import make_plan, run


def test_mlx_lm_loads_a_merge_strictly_and_gives_the_same_logits(tmp_path: Path) -> None:
    mlx, loader = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = train("bytes", [*SENTENCES.values()][:1], 300)
    for seed, name in enumerate("ab"):
        write_llama(tmp_path / name, seed=seed, layers=2, hidden=32, vocab=tokenizer.get_vocab_size(), dtype="float32")
        write_tokenizer_files(tmp_path / name, tokenizer)
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in "ab"]
    run(make_plan({"merge_method": "linear", "models": models}), tmp_path / "out", workers=0)
    loaded, _ = loader.load_model(tmp_path / "out", strict=True)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad(), mlx.stream(mlx.cpu):
        own, theirs = expected(torch.tensor([[1, 5, 9, 2]])).logits, loaded(mlx.array([[1, 5, 9, 2]])).tolist()
    assert torch.allclose(own, torch.tensor(theirs), atol=1e-4)
