"""Models that are quantised are merged as what they mean: by every method, cut, resumed, by two, beside others"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors, write_json, write_llama
from runs.merging import SMALL_PART, hash_output, make_recipe_of, parts_of, run_until
from safetensors.torch import save_file

from mergemill.engine import make_plan, run
from mergemill.engine.errors import PlanError
from mergemill.engine.methods.catalogue import find_methods, get_method

PROJECTION = "_proj.weight"
Quantize = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def to_block_fp8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what is stored beside the name's ending, and what it means."""
    down, across = (-(-size // 32) for size in weight.shape)
    padded = torch.zeros(32 * down, 32 * across)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(down, 32, across, 32)
    scale = blocks.abs().amax((1, 3)) / 448
    full = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)[: weight.shape[0], : weight.shape[1]]
    values = (weight / full).to(torch.float8_e4m3fn)
    return {"": values, "_scale_inv": scale}, values.float() * full


BLOCK_CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}


def write_pair(folder: Path, seed: int, *, quantize: Quantize = to_block_fp8, **config: Any) -> None:
    """Write a model whose projections are quantised as ``NAME``, and what it means in float32 as ``plain-NAME``."""
    write_llama(folder, seed=seed, layers=2, hidden=256, intermediate=512)
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in read_tensors(folder).items():
        if name.endswith(PROJECTION):
            stored, plain[name] = quantize(tensor.float())
            stem = name.removesuffix(".weight")
            tensors |= {f"{stem if ending[:1] == '.' else name}{ending}": each for ending, each in stored.items()}
        else:
            tensors[name] = plain[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    other = folder.with_name(f"plain-{folder.name}")
    other.mkdir()
    save_file(plain, other / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    write_json(other / "config.json", said)
    write_json(folder / "config.json", {**said, **(config or BLOCK_CONFIG)})


def merge(folder: Path, out: str, body: dict[str, Any], prefix: str = "", **options: Any) -> Path:
    text = json.dumps(body).replace("@", f"{folder}/{prefix}")
    run(make_plan(make_recipe_of(json.loads(text))), folder / out, **{"workers": 0, **options})
    return folder / out


def body_of(method: str, *, base: str = "@base") -> dict[str, Any]:
    known = get_method(method)
    parameters = {"weight": 0.6, "t": 0.3, "density": 0.4, "select_topk": 0.4, "gamma": 0.05, "epsilon": 0.1}
    models = [{"model": each} for each in ("@a", "@b")][: known.most_inputs or 2]
    names = {key: value for key, value in parameters.items() if key in {each.name for each in known.parameters}}
    body: dict[str, Any] = {"merge_method": method, "models": models, "parameters": names, "dtype": "bfloat16"}
    if known.base != "none":
        body["base_model"] = base
        if known.base == "first of two":
            body["models"] = [{"model": base}, {"model": "@a"}]
    return body


METHODS = [name for name in find_methods() if name != "passthrough"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        write_pair(folder / name, seed)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_of_fp8_is_the_merge_of_what_it_means(method: str, models: Path) -> None:
    outs = []
    for prefix in ("", "plain-"):
        with parts_of(SMALL_PART):
            outs.append(merge(models, f"out-{prefix}{method}", body_of(method), prefix))
    found, wanted = (read_tensors(out) for out in outs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_fp8_model_is_merged_with_a_bfloat16_one(models: Path) -> None:
    body = body_of("ties", base="@plain-base")
    found = read_tensors(merge(models, "mixed", body))
    wanted = read_tensors(merge(models, "unmixed", {**body, "models": [{"model": f"@plain-{each}"} for each in "ab"]}))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_two_processes_and_a_resumed_merge_give_the_same_bytes(models: Path) -> None:
    body = body_of("ties")
    with parts_of(SMALL_PART):
        whole = hash_output(merge(models, "serial", body))
        assert hash_output(merge(models, "processes", body, workers=2)) == whole
        plan = make_plan(make_recipe_of(json.loads(json.dumps(body).replace("@", f"{models}/"))))
        assert len(plan.parts) > 3
        run_until(plan, models / "resumed", 3)
        assert hash_output(merge(models, "resumed", body)) == whole


def test_the_plan_tells_that_the_output_is_plain_and_of_a_copy_that_it_is_not(models: Path) -> None:
    names = [str(models / name) for name in ("a", "plain-a")]
    told = "a is quantized (fp8): its weights are dequantized as they are read and written plain"
    merged = make_plan(
        {"merge_method": "linear", "models": [{"model": name} for name in names], "parameters": {"weight": 1}}
    )
    assert [warning for warning in merged.warnings if "dequantized" in warning] == [f"recipe: {models}/{told}"]
    copied = make_plan({"merge_method": "passthrough", "models": [{"model": names[0]}]})
    assert not any("dequantized" in warning for warning in copied.warnings)


def test_the_output_says_no_more_that_it_is_quantised(models: Path, tmp_path: Path) -> None:
    write_json(models / "base" / "hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}})
    out = merge(models, "said", body_of("linear") | {"base_model": "@base"})
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert not (out / "hf_quant_config.json").exists()
    (models / "base" / "hf_quant_config.json").unlink()


def test_without_a_dtype_the_output_is_what_the_config_says(models: Path) -> None:
    body = {**body_of("linear"), "dtype": None}
    out = read_tensors(merge(models, "undtyped", {key: value for key, value in body.items() if value is not None}))
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16}


def test_the_ledger_accounts_for_every_companion(models: Path) -> None:
    plan = make_plan(make_recipe_of(json.loads(json.dumps(body_of("linear")).replace("@", f"{models}/"))))
    for source in plan.sources:
        assert (source.tensors, dict(source.dropped)) == (source.merged + source.copied, {})


def test_a_passthrough_copies_what_is_quantised_with_its_config(models: Path) -> None:
    body = {"merge_method": "passthrough", "models": [{"model": "@a"}]}
    out = merge(models, "copied", body)
    assert hash_output(out)["config.json"] is not None
    assert json.loads((out / "config.json").read_text())["quantization_config"] == BLOCK_CONFIG["quantization_config"]
    stored, copied = read_tensors(models / "a"), read_tensors(out)
    assert all(torch.equal(stored[name].view(torch.uint8), copied[name].view(torch.uint8)) for name in stored)


def test_layers_of_models_that_are_quantised_otherwise_are_dequantised(models: Path) -> None:
    ranges = [("@a", 0, 1), ("@plain-b", 1, 2)]
    slices = [{"sources": [{"model": model, "layer_range": [first, last]}]} for model, first, last in ranges]
    out = merge(models, "stacked", {"merge_method": "passthrough", "slices": slices})
    assert not any(name.endswith("_scale_inv") for name in read_tensors(out))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


WORDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a key": ({"quantization_config": {"quant_method": "compressed-tensors"}}, {}),
    "another key": ({"compression_config": {"quant_method": "compressed-tensors"}}, {}),
    "a file": ({"x": 1}, {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}}),
    "no word": ({"x": 1}, {}),
}


def to_fp8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = weight.abs().max() / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"": values, "_scale": scale.reshape(1)}, values.float() * scale


@pytest.mark.parametrize("word", WORDS)
def test_fp8_is_dequantised_whatever_says_so(word: str, tmp_path: Path) -> None:
    config, files = WORDS[word]
    for seed, name in enumerate("ab"):
        write_pair(tmp_path / name, seed, quantize=to_fp8, **config)
        for file, value in files.items():
            write_json(tmp_path / name / file, value)
    body = body_of("linear")
    found, wanted = (read_tensors(merge(tmp_path, f"out{prefix}", body, prefix)) for prefix in ("", "plain-"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_scales_without_values_and_values_without_scales_are_refused(models: Path, tmp_path: Path) -> None:
    for lacking in ("_scale_inv", ""):
        folder = tmp_path / f"lacks{lacking}"
        folder.mkdir()
        tensors = {
            name: each
            for name, each in read_tensors(models / "a").items()
            if not name.endswith(f"0.mlp.up_proj.weight{lacking}")
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text((models / "a" / "config.json").read_text())
        body = {"merge_method": "linear", "models": [{"model": str(folder)}], "parameters": {"weight": 1}}
        with pytest.raises(PlanError, match=r"quantized .*0\.mlp\.up_proj\.weight"):
            make_plan(make_recipe_of(body))


def to_gptq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return words of several inputs each, as they lie the other way round, with groups in another order."""
    columns = weight.shape[1]
    order = torch.arange(columns) * 7 % columns // (columns // 4)
    codes, scales = (weight * 300 + 8).round().clamp(0, 15).long(), torch.full((4, len(weight)), 1 / 300).half()
    scales *= torch.arange(1, 5)[:, None]
    words = (codes.T.reshape(columns // 8, 8, -1) << 4 * torch.arange(8)[:, None]).sum(1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    zeros = torch.full((4, len(weight) // 8), 0x77777777, dtype=torch.int32)
    stored = {".qweight": words, ".qzeros": zeros, ".scales": scales, ".g_idx": order.int()}
    return stored, ((codes - 8) * scales.double()[order].T).float()


def to_nf4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    table, scales = torch.linspace(-1, 1, 16), weight.abs().reshape(-1, 64).amax(1)
    codes = (weight.reshape(-1, 64) / scales[:, None] * 7.5 + 7.5).round().clamp(0, 15).long()
    both = codes.view(-1, 2)
    said = {"shape": list(weight.shape), "blocksize": 64, "quant_type": "nf4"}
    state = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    stored = {
        "": (both[:, :1] << 4 | both[:, 1:]).to(torch.uint8),
        ".weight.absmax": scales,
        ".weight.quant_map": table,
    }
    stored[".weight.quant_state.bitsandbytes__nf4"] = state
    return stored, (table[codes] * scales[:, None]).view(weight.shape)


@pytest.mark.parametrize("quantize", [to_gptq, to_nf4])
@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_so_is_a_merge_of_four_bits(quantize: Quantize, method: str, tmp_path: Path) -> None:
    """Stored the other way round, or in blocks of their own; and no config says anything."""
    for seed, name in enumerate(("base", "a", "b")):
        write_pair(tmp_path / name, seed, quantize=quantize, x=1)
    outs = []
    for prefix in ("", "plain-"):
        with parts_of(SMALL_PART):
            outs.append(merge(tmp_path, f"out-{prefix}", body_of(method), prefix))
    found, wanted = (read_tensors(out) for out in outs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def write_experts(folder: Path, seed: int) -> None:
    """Write a mixture whose experts are quantised one by one, and what it means in float32 as ``plain-NAME``."""
    stream = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
    weights = {"model.embed_tokens.weight": torch.randn(20, 32, generator=stream)}
    tensors, plain = dict(weights), dict(weights)
    for expert, (kind, shape) in itertools.product(range(3), shapes.items()):
        name = f"model.layers.0.mlp.experts.{expert}.{kind}.weight"
        stored, plain[name] = to_block_fp8(torch.randn(shape, generator=stream))
        tensors |= {f"{name}{ending}": each for ending, each in stored.items()}
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "dtype": "bfloat16", "tie_word_embeddings": True}
    for each, own, more in ((folder, tensors, BLOCK_CONFIG), (folder.with_name(f"plain-{folder.name}"), plain, {})):
        each.mkdir()
        save_file(own, each / "model.safetensors", metadata={"format": "pt"})
        write_json(each / "config.json", {**config, **more})


@pytest.mark.parametrize("method", ["ties", "slerp", "dare_ties"])
def test_a_stack_of_quantised_experts_is_not_rounded_before_the_merge(method: str, tmp_path: Path) -> None:
    """Their codes mean more digits than the dtype has that the model would be written in."""
    for seed, name in enumerate(("base", "a", "b")):
        write_experts(tmp_path / name, seed)
    body = {**body_of(method), "dtype": "float32"}
    found, wanted = (read_tensors(merge(tmp_path, f"out-{prefix}", body, prefix)) for prefix in ("", "plain-"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
