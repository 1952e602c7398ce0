"""What is merged loads where transformers is not: in mlx-lm, strictly, in vLLM, and by readers that it may be given.

It needs ``pip install "mlx[cpu]" mlx-lm fastsafetensors runai-model-streamer vllm``, which CI does not install. Run on
2026-11-30 on Linux without a GPU, with mlx 0.32.4, mlx-lm 0.32.2, fastsafetensors 0.5.0, runai-model-streamer 0.17.1,
and the Python of vllm 0.33.0, whose compiled parts want CUDA: what reads a checkpoint for it, so no model of it.
"""

from pathlib import Path

import pytest
from models import read_tensors, write_llama
from trained import SENTENCES, train, write_tokenizer_files

from mergemill.engine import make_plan, run


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a merge of two small models. Not to be changed."""
    folder = tmp_path_factory.mktemp("loaders")
    tokenizer = train("bytes", [*SENTENCES.values()][:1], 300)
    for seed, name in enumerate("ab"):
        write_llama(folder / name, seed=seed, layers=2, hidden=32, vocab=tokenizer.get_vocab_size(), dtype="float32")
        write_tokenizer_files(folder / name, tokenizer)
    models = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in "ab"]
    plan = make_plan({"merge_method": "linear", "models": models}, shard_size="64KiB")
    run(plan, folder / "out", workers=0)
    return folder / "out"


def test_mlx_lm_loads_a_merge_strictly_and_gives_the_same_logits(merged: Path) -> None:
    mlx, loader = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    loaded, _ = loader.load_model(merged, strict=True)
    expected = transformers.AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad(), mlx.stream(mlx.cpu):
        own, theirs = expected(torch.tensor([[1, 5, 9, 2]])).logits, loaded(mlx.array([[1, 5, 9, 2]])).tolist()
    assert torch.allclose(own, torch.tensor(theirs), atol=1e-4)


def test_fastsafetensors_reads_the_same_tensors(merged: Path) -> None:
    fast = pytest.importorskip("fastsafetensors")
    expected = read_tensors(merged)
    loader = fast.SafeTensorsFileLoader(fast.SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: [str(path) for path in sorted(merged.glob("*.safetensors"))]})
    read = loader.copy_files_to_device()
    assert set(read.key_to_rank_lidx) == set(expected)
    assert all(read.get_tensor(name).equal(tensor) for name, tensor in expected.items())


def test_the_model_streamer_reads_the_same_tensors(merged: Path) -> None:
    streamers = pytest.importorskip("runai_model_streamer")
    expected = read_tensors(merged)
    with streamers.SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in sorted(merged.glob("*.safetensors"))])
        found = {name: tensor.clone() for name, tensor in streamer.get_tensors()}
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_vllm_reads_the_same_tensors(merged: Path) -> None:
    reading = pytest.importorskip("vllm.model_executor.model_loader.weight_utils", exc_type=ImportError)
    files = [str(path) for path in sorted(merged.glob("*.safetensors"))]
    kept = reading.filter_duplicate_safetensors_files(files, str(merged), "model.safetensors.index.json")
    found, expected = dict(reading.safetensors_weights_iterator(kept, use_tqdm_on_load=False)), read_tensors(merged)
    assert len(files) > 1
    assert kept == files
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
