"""A model with an adapter is what peft's merge makes of both, and no merged copy is ever written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_gpt2, make_llama, make_qwen, merge_by_peft, write_adapter, write_model
from models import read_tensors
from runs.merging import SMALL_PART, finished_parts, parts_of, run_until
from safetensors.torch import load_file

from mergemill.engine import make_plan, run
from mergemill.engine.tensors import native

SHARD = "model-00001-of-00001.safetensors"

CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "lora": (make_llama, {}),
    "rslora": (make_llama, {"use_rslora": True}),
    "patterns": (
        make_llama,
        {"rank_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {r"layers\.0\..*": 7}},
    ),
    "dora": (make_llama, {"use_dora": True}),
    "modules to save": (make_llama, {"modules_to_save": ["norm", "lm_head"]}),
    "an embedding": (make_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "an embedding with dora": (make_llama, {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True}),
    "a tied embedding": (make_qwen, {"target_modules": ["embed_tokens", "q_proj"]}),
    "a head": (make_llama, {"target_modules": ["lm_head"]}),
    "tokens": (make_llama, {"trainable_token_indices": [3, 59, 0]}),
    "tokens by module": (make_llama, {"trainable_token_indices": {"embed_tokens": [7, 8]}}),
    "tokens of a tied model": (make_qwen, {"trainable_token_indices": [3, 59, 0]}),
    "biases of factors": (make_qwen, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "all biases": (make_qwen, {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "biases of targets": (make_qwen, {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "conv1d": (make_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d with dora": (make_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "conv1d whose config does not say so": (make_gpt2, {"target_modules": ["c_proj"]}),
    "conv1d and an embedding": (make_gpt2, {"target_modules": ["c_fc", "wte"], "fan_in_fan_out": True}),
}


def merge(
    tmp_path: Path, *models: str | dict[str, Any], method: str = "passthrough", **more: Any
) -> dict[str, torch.Tensor]:
    """Return the tensors of a merge of models, each by its reference or as an entry."""
    entries = [{"model": each} if isinstance(each, str) else each for each in models]
    run(make_plan({"merge_method": method, "models": entries, **more}), tmp_path / "out", workers=0)
    return read_tensors(tmp_path / "out")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, within: float = 1e-6) -> None:
    tied = expected.keys() - found.keys()
    assert found.keys() <= expected.keys()
    assert tied <= {"lm_head.weight"}
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=within, atol=within, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("loops", ["native", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_a_model_with_an_adapter_is_what_peft_merges(
    case: str, loops: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loops == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
    make, config = CASES[case]
    base = make()
    write_model(base, tmp_path / "base")
    write_adapter(base, tmp_path / "lora", **config)
    expected = merge_by_peft(base, tmp_path / "lora")
    found = merge(tmp_path, f"{tmp_path / 'base'}+{tmp_path / 'lora'}")
    assert_same(found, expected)
    unchanged = read_tensors(tmp_path / "base")
    assert any(not torch.equal(found[name], unchanged[name]) for name in found), "the adapter changes something"


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """Write a base and two adapters of it, one with magnitudes, and each merged into a copy, by this engine.

    Some tensors are larger than a part, and their rows end nowhere near a cut.
    """
    base = make_llama(hidden_size=240, intermediate_size=600)
    write_model(base, tmp_path / "base")
    for seed, name in enumerate("ab", 1):
        write_adapter(base, tmp_path / name, seed=seed, use_dora=name == "b", target_modules=["q_proj", "gate_proj"])
        plan = make_plan(copying(adapted(tmp_path, name)))
        run(plan, tmp_path / f"copy-{name}", workers=0)
    return tmp_path


def copying(model: str) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": model}]}


def adapted(folder: Path, name: str) -> str:
    return f"{folder / 'base'}+{folder / name}"


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.4},
    "ties": {"weight": 0.7, "density": 0.4},
    "dare_ties": {"weight": 0.7, "density": 0.4},
    "della": {"weight": 0.7, "density": 0.5, "epsilon": 0.2},
    "slerp": {"t": 0.3},
    "model_stock": {},
    "breadcrumbs": {"weight": 0.7, "density": 0.5},
    "karcher": {},
    "nuslerp": {"weight": 0.5},
    "sce": {"select_topk": 0.5},
    "iso_c": {"weight": 0.5},
}


@pytest.mark.parametrize("loops", ["native", "torch"])
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_of_models_with_adapters_has_the_bytes_of_one_of_copies(
    method: str, loops: str, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loops == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
    hashes = []
    for name, models in {
        "adapted": [adapted(family, each) for each in "ab"],
        "copies": [str(family / f"copy-{each}") for each in "ab"],
    }.items():
        body: dict[str, Any] = {"merge_method": method, "parameters": METHODS[method], "dtype": "float32"}
        if method not in ("linear", "karcher", "nuslerp"):
            body["base_model"] = models[0] if method == "slerp" else str(family / "base")
        with parts_of(SMALL_PART):
            plan = make_plan({**body, "models": [{"model": model} for model in models]})
        cut = any(not piece.whole for part in plan.parts for piece in part.pieces)
        assert cut or method == "iso_c", "tensors are cut, but for methods on whole matrices"
        run(plan, family / name, workers=0)
        hashes.append((family / name / "model-00001-of-00001.safetensors").read_bytes())
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_cuts_and_workers_do_not_show(workers: int, family: Path) -> None:
    recipe = {"merge_method": "ties", "base_model": str(family / "base"), "parameters": {"weight": 1, "density": 0.3}}
    recipe["models"] = [{"model": adapted(family, name)} for name in "ab"]
    run(make_plan(recipe), family / "whole", workers=0)
    with parts_of(SMALL_PART):
        plan = make_plan(recipe)
    run(plan, family / "cut", workers=workers)
    assert (family / "cut" / SHARD).read_bytes() == (family / "whole" / SHARD).read_bytes()


def test_a_merge_that_was_ended_is_resumed(family: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": adapted(family, n), "parameters": {"weight": 1}} for n in "ab"],
    }
    run(make_plan(recipe), family / "whole", workers=0)
    with parts_of(SMALL_PART):
        plan = make_plan(recipe)
    run_until(plan, family / "resumed", 3)
    assert finished_parts(family / "resumed")
    run(plan, family / "resumed", workers=0)
    assert (family / "resumed" / SHARD).read_bytes() == (family / "whole" / SHARD).read_bytes()


def test_an_adapter_that_is_trained_again_is_another_plan(family: Path) -> None:
    recipe = copying(adapted(family, "a"))
    before = make_plan(recipe).digest
    write_adapter(make_llama(hidden_size=240, intermediate_size=600), family / "a", seed=9, target_modules=["q_proj"])
    assert make_plan(recipe).digest != before


def test_nothing_but_the_output_is_written(family: Path) -> None:
    before = set(family.rglob("*"))
    run(make_plan(copying(adapted(family, "a"))), family / "out", workers=0)
    assert {path for path in family.rglob("*") if family / "out" not in (path, *path.parents)} == before


def test_the_ledger_accounts_for_every_tensor_of_the_adapter(family: Path) -> None:
    (source,) = make_plan(copying(adapted(family, "b"))).sources
    base, lora = (load_file(family / name) for name in ("base/model.safetensors", "b/adapter_model.safetensors"))
    assert (source.tensors, source.copied) == (len(base) + len(lora), len(base) + len(lora))
    assert source.read_bytes == sum(value.nbytes for value in (*base.values(), *lora.values()))


def test_layers_of_a_model_with_an_adapter_are_sliced(family: Path) -> None:
    source = {"model": adapted(family, "b")}
    slices = [{"sources": [{**source, "layer_range": [at, at + 1]}]} for at in (1, 0, 1)]
    run(make_plan({"merge_method": "passthrough", "slices": slices}), family / "out", workers=0)
    made, copy = read_tensors(family / "out"), read_tensors(family / "copy-b")
    for at, layer in enumerate((1, 0, 1)):
        name = "model.layers.{}.mlp.gate_proj.weight"
        assert torch.equal(made[name.format(at)], copy[name.format(layer)])


def test_a_layer_outside_every_slice_leaves_its_factors(family: Path) -> None:
    slices = [{"sources": [{"model": adapted(family, "a"), "layer_range": [0, 1]}]}]
    (source,) = make_plan({"merge_method": "passthrough", "slices": slices}).sources
    assert source.dropped == {"layer outside every slice": 9 + 4}


def test_a_stage_takes_an_adapter(family: Path) -> None:
    stage = {"name": "half", "merge_method": "linear", "parameters": {"weight": 0.5}, "dtype": "float32"}
    stage["models"] = [{"model": str(family / "base")}, {"model": str(family / "copy-a")}]
    recipe = {"merge_method": "passthrough", "models": [{"model": f"half+{family / 'b'}"}], "stages": [stage]}
    run(make_plan(recipe), family / "out", workers=0)
    name = "model.layers.0.mlp.gate_proj.weight"
    made = read_tensors(family / "out")
    assert not torch.equal(made[name], read_tensors(family / "copy-b")[name])
    run(make_plan({key: value for key, value in stage.items() if key != "name"}), family / "half", workers=0)
    run(make_plan(copying(f"{family / 'half'}+{family / 'b'}")), family / "two", workers=0)
    assert torch.equal(made[name], read_tensors(family / "two")[name])
