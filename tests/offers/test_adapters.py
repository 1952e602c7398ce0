"""A model with an adapter is what peft's merge makes of both, and no merged copy is ever written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import fill, make_gpt2, make_llama, make_qwen, merge_by_peft, transformers, write_adapter, write_model
from models import read_tensors
from runs.merging import SMALL_PART, finished_parts, parts_of, run_until
from safetensors.torch import load_file, save_file

from mergemill.engine import make_plan, run
from mergemill.engine.errors import InputError
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


@pytest.mark.parametrize("family", ["packed", "apart", "turned", "spelt otherwise"])
def test_factors_of_packed_experts(family: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 24}
    if family == "turned":
        config = transformers.GptOssConfig(**sizes, num_local_experts=4)
        base = fill(transformers.GptOssForCausalLM(config), 0)
    elif family == "spelt otherwise":  # by files: block_sparse_moe.experts.0.w1
        config = transformers.MixtralConfig(**sizes, num_local_experts=4)
        base = fill(transformers.MixtralForCausalLM(config), 0)
    else:
        config = transformers.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=20)
        base = fill(transformers.Qwen3MoeForCausalLM(config), 0)
    base.save_pretrained(tmp_path / "base", save_original_format=family in ("apart", "spelt otherwise"))
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if family == "spelt otherwise":
        parameters.append("mlp.gate.weight")
    pattern = {"rank_pattern": {".*down_proj": 2}} if family == "packed" else {}
    write_adapter(base, tmp_path / "lora", target_modules=["q_proj"], target_parameters=parameters, **pattern)
    expected = merge_by_peft(base, tmp_path / "lora")
    found = merge(tmp_path, f"{tmp_path / 'base'}+{tmp_path / 'lora'}")
    if family in ("apart", "spelt otherwise"):
        said, stem = ("block_sparse_moe" if family == "spelt otherwise" else "mlp"), "model.layers.0.mlp.experts"
        names = ("w1", "w3", "w2") if family == "spelt otherwise" else ("gate_proj", "up_proj", "down_proj")
        packed = expected[f"{stem}.gate_up_proj"]
        for expert in range(4):
            *both, down = (found[f"model.layers.0.{said}.experts.{expert}.{name}.weight"] for name in names)
            torch.testing.assert_close(torch.cat(both), packed[expert], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(down, expected[f"{stem}.down_proj"][expert], rtol=1e-6, atol=1e-6)
        gate = found[f"model.layers.0.{said}.gate.weight"]
        torch.testing.assert_close(gate, expected["model.layers.0.mlp.gate.weight"], rtol=1e-6, atol=1e-6)
    else:
        assert_same(found, expected)


def test_adapters_with_weights_add_up(family: Path) -> None:
    base = make_llama(hidden_size=240, intermediate_size=600)
    write_adapter(base, family / "c", seed=7, r=2, target_modules=["q_proj"])
    weighted = [{"adapter": str(family / "a"), "weight": 0.5}, {"adapter": str(family / "c"), "weight": -2}]
    model = {"model": str(family / "base"), "adapters": weighted}
    run(make_plan({"merge_method": "passthrough", "models": [{"model": model}]}), family / "out", workers=0)
    found, before = read_tensors(family / "out"), base.state_dict()
    one, other = (merge_by_peft(base, family / name) for name in "ac")
    for name, value in found.items():
        wanted = before[name] + 0.5 * (one[name] - before[name]) - 2 * (other[name] - before[name])
        torch.testing.assert_close(value, wanted, rtol=2e-5, atol=2e-6)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "half of a pair": (
        {"drop": "q_proj.lora_A"},
        {},
        "lora_B.weight: is half of a pair",
    ),
    "another shape": ({"cut": "q_proj.lora_B"}, {}, r"does not fit model.layers.\d.self_attn.q_proj.weight"),
    "another rank": ({}, {"r": 4}, "has 3 rows, and by its config the rank is 4"),
    "rank 0": ({}, {"r": 0}, "r must be a whole number from 1 on, not 0"),
    "another type": ({}, {"peft_type": "LOHA"}, "peft_type is 'LOHA'; only adapters of the type LORA can be merged"),
    "a key of nothing": ({"add": "x.hada_w1_a"}, {}, "tensor .*hada_w1_a is of no kind that can be merged"),
    "a module of nothing": ({"add": "model.x.lora_A.weight"}, {}, "is half of a pair"),
    "no magnitudes": ({}, {"use_dora": True}, "has no magnitude beside it, and use_dora is true in its config"),
    "pissa": ({}, {"init_lora_weights": "pissa_niter_4"}, "it belongs to a base that peft changes on loading"),
    "an activated lora": ({}, {"alora_invocation_tokens": [1]}, "makes it activated LoRA"),
    "no numbers": ({"empty": "q_proj.lora_A"}, {}, "holds no data .* ZeRO-3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(case: str, tmp_path: Path) -> None:
    tensors, config, message = REFUSED[case]
    base = make_llama()
    write_model(base, tmp_path / "base")
    write_adapter(base, tmp_path / "lora", **({"r": 3} if case != "another rank" else {}))
    path, settings = tmp_path / "lora" / "adapter_model.safetensors", tmp_path / "lora" / "adapter_config.json"
    stored = load_file(path)
    for how, part in tensors.items():
        key = next((key for key in stored if part in key), f"base_model.model.{part}")
        if how == "drop":
            del stored[key]
        else:
            changed = {"cut": stored.get(key, torch.ones(1))[:-1].clone(), "add": torch.ones(3, 4)}
            stored[key] = changed.get(how, torch.zeros(0))
    save_file(stored, path)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))
    with pytest.raises(InputError, match=message):
        make_plan(copying(f"{tmp_path / 'base'}+{tmp_path / 'lora'}"))


def test_an_adapter_of_another_name_and_in_a_pickle(tmp_path: Path) -> None:
    base = make_llama()
    write_model(base, tmp_path / "base")
    write_adapter(base, tmp_path / "lora")
    expected = merge_by_peft(base, tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    named = {key.replace(".weight", ".default.weight"): value for key, value in stored.items()}
    torch.save(named, tmp_path / "lora" / "adapter_model.bin")
    assert_same(merge(tmp_path, f"{tmp_path / 'base'}+{tmp_path / 'lora'}"), expected)


def test_a_kernel_is_changed_by_the_product_of_flattened_ones(tmp_path: Path) -> None:
    stream = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=stream) for shape in ((6, 3, 3, 3), (2, 3, 3, 3), (6, 2, 1, 1)))
    for name, state in (("base", {"stem.weight": weight}), ("lora", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        if state:
            save_file(state, tmp_path / name / "model.safetensors")
    factors = {f"base_model.model.stem.lora_{side}.weight": value for side, value in (("A", a), ("B", b))}
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["stem"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    found = merge(tmp_path, f"{tmp_path / 'base'}+{tmp_path / 'lora'}")["stem.weight"]
    wanted = weight + 2 * (b.flatten(1) @ a.flatten(1)).view(6, 3, 3, 3)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_quantised_base_takes_an_adapter(tmp_path: Path) -> None:
    base = make_llama()
    write_adapter(base, tmp_path / "lora")
    state = {name: value.clone() for name, value in base.state_dict().items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    scale = state[name].abs().max() / 448
    state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
    state[f"{name}_scale_inv"] = torch.full((1, 1), float(scale))
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config = {**base.config.to_dict(), "quantization_config": quantised}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config, default=str))
    base.state_dict()[name].copy_(state[name].float() * scale)
    expected = merge_by_peft(base, tmp_path / "lora")
    found = merge(tmp_path, f"{tmp_path / 'base'}+{tmp_path / 'lora'}", dtype="float32")
    torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
