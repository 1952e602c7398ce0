"""Every shape of recipe that mergekit shows runs on small stand-ins, or is refused with the line that mends it."""

import json
from pathlib import Path

import pytest
import torch
from models import read_tensors, write_llama, write_tensors
from runs.published import MENDED, MIXTURES, RAW, SHAPES

from mergemill.engine import load_recipe, make_plan, make_raw_plan, run
from mergemill.engine.errors import InputError

_OWN = '''"""Averages: as a test has them.

Source: none.
"""
from torch import Tensor

from mergemill.engine.methods import PerModel, merge_method


@merge_method(reads="element")
def simple_average(models: list[Tensor], *, weight: PerModel[float]) -> Tensor:
    """Return the mean. Shapes: all ``[n]``."""
    return models[0].mul_(weight[0]).add_(models[1].mul_(weight[1]))
'''


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models that `published` names. Not to be changed."""
    folder = tmp_path_factory.mktemp("published")
    sizes = {"hidden": 16, "heads": 2, "kv_heads": 1, "intermediate": 24, "dtype": "float32"}
    base = write_llama(folder / "base", seed=0, **sizes)
    for seed, name in enumerate(("base2", "b", "c"), start=1):
        write_llama(folder / name, seed=seed, near=base, **sizes)
    write_llama(folder / "a", seed=5, vocab=258, added_tokens=["<|user|>", "<|bot|>"], **sizes)
    _write_gpt(folder / "gpt")
    _write_lora(folder / "lora")
    _write_dictionaries(folder)
    (folder / "averages.py").write_text(_OWN)
    return folder


@pytest.fixture(autouse=True)
def _among_them(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stand_ins)


@pytest.mark.parametrize("text", SHAPES.values(), ids=SHAPES)
def test_a_published_recipe_runs(text: str, tmp_path: Path) -> None:
    assert _merge(text, tmp_path / "out")


@pytest.mark.parametrize("text", MIXTURES.values(), ids=MIXTURES)
def test_a_published_mixture_runs(text: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert any("expert" in name for name in _merge(text, tmp_path / "out"))


def test_a_recipe_for_dictionaries_of_tensors_runs(tmp_path: Path) -> None:
    run(make_raw_plan(load_recipe(RAW)), tmp_path / "out", workers=0)
    assert read_tensors(tmp_path / "out").keys() == {"weight", "bias"}


@pytest.mark.parametrize(("text", "words", "mended"), MENDED.values(), ids=MENDED)
def test_what_does_not_run_is_refused_with_the_line_that_mends_it(
    text: str, words: str, mended: str, tmp_path: Path
) -> None:
    Path(tmp_path / "recipe.yml").write_text(text)
    with pytest.raises(InputError) as caught:
        make_plan(tmp_path / "recipe.yml")
    assert str(caught.value).startswith(f"{tmp_path}/recipe.yml:{words}")
    assert not mended or _merge(mended, tmp_path / "out")


def _merge(text: str, out: Path) -> dict[str, torch.Tensor]:
    run(make_plan(text), out, workers=0)
    tensors = read_tensors(out)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    return tensors


def _write_gpt(folder: Path) -> None:
    shapes = {"wte.weight": (40, 8), "wpe.weight": (16, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for i in range(4):
        shapes |= {f"h.{i}.ln_1.weight": (8,), f"h.{i}.attn.c_attn.weight": (8, 24), f"h.{i}.attn.c_attn.bias": (24,)}
    folder.mkdir()
    write_tensors(folder, {name: torch.randn(shape) for name, shape in shapes.items()})
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 4, "n_embd": 8, "n_head": 2}
    (folder / "config.json").write_text(json.dumps(config))


def _write_lora(folder: Path) -> None:
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.randn(2, 16), f"{module}.lora_B.weight": torch.randn(16, 2)}
    folder.mkdir()
    write_tensors(folder, factors)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _write_dictionaries(folder: Path) -> None:
    from safetensors.torch import save_file

    networks = [torch.nn.Linear(6, 4).state_dict() for _ in range(3)]
    torch.save(networks[0], folder / "one.pt")
    torch.save({"state_dict": networks[1], "epoch": 3}, folder / "two.pt")
    save_file(dict(networks[2]), folder / "three.safetensors")
