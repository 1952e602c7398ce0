"""Models are converted as they are merged: streamed, cut, resumed; what is quantised is read back by every reader."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors, write_llama
from runs.buckets import new_place, put_family
from runs.merging import SMALL_PART, hash_output, parts_of, run_until, same_tensors
from servers.s3 import S3

from mergemill.cli.main import execute
from mergemill.engine import inspect, make_convert_plan, make_plan, run, verify
from mergemill.engine.checkpoint.checkpoint import open_checkpoint
from mergemill.engine.errors import PlanError, RecipeError
from mergemill.engine.plan.values import Plan

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def plan(model: Path | str, part_bytes: int = SMALL_PART, **asked: Any) -> Plan:
    with parts_of(part_bytes):
        return make_convert_plan(str(model), **asked)


def convert(model: Path | str, out: Path, **asked: Any) -> Path:
    run(plan(model, **asked), out, workers=0)
    return out


def read_config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def fp8(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(family / "A", tmp_path_factory.mktemp("fp8") / "out", quantize="fp8_block")


def test_another_dtype_is_a_cast_of_each_tensor_and_a_word_in_the_config(family: Path, tmp_path: Path) -> None:
    out = convert(family / "A", tmp_path / "out", dtype="float16")
    before, after = read_tensors(family / "A"), read_tensors(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].half()) for name in before)
    assert read_config(out) == read_config(family / "A") | {"dtype": "float16"}
    assert (out / "tokenizer.json").read_bytes() == (family / "A" / "tokenizer.json").read_bytes()
    assert (out / "README.md").read_bytes() == (family / "A" / "README.md").read_bytes()


def test_fp8_is_within_half_a_step_of_the_model(family: Path, fp8: Path, tmp_path: Path) -> None:
    before, stored = read_tensors(family / "A"), read_tensors(fp8)
    back = read_tensors(convert(fp8, tmp_path / "back", dtype="float32"))
    quantized = {name for name in before if f"{name}_scale_inv" in stored}
    assert {name.split(".")[-2] for name in before.keys() - quantized} == {
        "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm", "lm_head",
    }  # fmt: skip
    assert back.keys() == before.keys()
    for name in before.keys() - quantized:
        assert torch.equal(stored[name], before[name])
    for name in quantized:
        scales = stored[f"{name}_scale_inv"].double()
        scales = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(back[name].double(), (stored[name].float() * scales.float()).double())
        bound = torch.maximum(before[name].double().abs() * 2**-4, scales * 2**-10) * (1 + 2**-20)
        assert ((back[name].double() - before[name].double()).abs() <= bound).all()
    assert "quantization_config" not in read_config(tmp_path / "back")


def test_fp8_is_loaded_by_transformers(fp8: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.float32)
    stored = read_tensors(fp8)
    name = "model.layers.1.mlp.down_proj.weight"
    scales = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(model.state_dict()[name].float(), stored[name].float() * scales)
    said = read_config(fp8)["quantization_config"]
    assert said["weight_block_size"] == [128, 128]
    assert said["modules_to_not_convert"] == ["lm_head", "model.embed_tokens"]
    assert inspect(fp8).quantization.startswith("fp8; ")


def test_cuts_and_a_killed_run_do_not_show(family: Path, fp8: Path, tmp_path: Path) -> None:
    asked = plan(family / "A", quantize="fp8_block")
    assert len(asked.parts) > 6
    run(asked, tmp_path / "cut", workers=0)
    assert hash_output(tmp_path / "cut") == hash_output(fp8)
    run_until(asked, tmp_path / "resumed", 3)
    assert run(asked, tmp_path / "resumed", workers=0).redone_parts == len(asked.parts) - 3
    assert hash_output(tmp_path / "resumed") == hash_output(fp8)


def test_a_conversion_is_verified_and_replayed(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    out = tmp_path / "out"
    run(make_convert_plan("A", quantize="fp8_block"), out, workers=0)
    assert verify(out, replay=1).replayed == 1


def test_from_object_storage_to_object_storage(family: Path, fp8: Path, seaweed: S3) -> None:
    models, out = put_family(seaweed, family), new_place(seaweed)
    run(make_convert_plan(f"{models.url}/A", quantize="fp8_block"), out.url, workers=0)
    found = {name: tensor.shape for name, tensor in open_checkpoint(out.url).tensors.items()}
    assert found == {name: tensor.shape for name, tensor in open_checkpoint(str(fp8)).tensors.items()}
    assert verify(out.url).parts


def test_a_merge_that_is_quantized_is_the_merge_quantized(family: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": str(family / "base"),
        "models": [{"model": str(family / name), "parameters": {"weight": 0.5, "density": 0.5}} for name in "AB"],
    }
    run(make_plan(recipe | {"dtype": "float32"}), tmp_path / "plain", workers=0)
    convert(tmp_path / "plain", tmp_path / "after", quantize="fp8_block", dtype="bfloat16")
    with parts_of(SMALL_PART):
        asked = make_plan(recipe | {"dtype": "bfloat16", "quantize": "fp8_block"})
    committed = run(asked, tmp_path / "at_once", workers=0)
    assert same_tensors(tmp_path / "after", tmp_path / "at_once")
    assert read_config(tmp_path / "after") == read_config(tmp_path / "at_once")
    assert any("mlp" in change.tensor for change in committed.guard.most_changed)


def test_what_has_no_form_is_refused_before_anything_is_written(family: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"mxfp4 is the form of gpt-oss, and .*A is of llama"):
        make_convert_plan(str(family / "A"), quantize="mxfp4")
    small = write_llama(tmp_path / "small", seed=1)
    with pytest.raises(PlanError, match="no tensor is a matrix of a linear layer whose sides are multiples of 128"):
        make_convert_plan(str(small), quantize="fp8_block")
    with pytest.raises(PlanError, match="say what to"):
        make_convert_plan(str(small))
    with pytest.raises(PlanError, match="dtype 'int8' is unknown; known are float64"):
        make_convert_plan(str(small), dtype="int8")
    with pytest.raises(RecipeError, match="'quantize' is 'nf4', which is unknown; known: fp8_block, mxfp4"):
        make_plan("{merge_method: linear, models: [{model: a}], quantize: nf4}")


def test_the_command_converts(family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert execute(["convert", str(family / "A"), str(out), "--quantize", "fp8_block", "--dtype", "float16"]) == 0
    assert "dtype   F16, F8_E4M3 with F32, as asked" in capsys.readouterr().err
    assert read_config(out)["dtype"] == "float16"


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.GptOssConfig(
        num_hidden_layers=2, num_local_experts=3, num_experts_per_tok=2, hidden_size=64, intermediate_size=96,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=50, layer_types=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).bfloat16()
    folder = tmp_path_factory.mktemp("gpt_oss") / "model"
    model.save_pretrained(folder)
    return folder


def test_mxfp4_is_in_the_form_of_gpt_oss(gpt_oss: Path, tmp_path: Path) -> None:
    out = convert(gpt_oss, tmp_path / "out", quantize="mxfp4")
    stored, before = read_tensors(out), read_tensors(gpt_oss)
    stem = "model.layers.0.mlp.experts."
    assert stored[f"{stem}gate_up_proj_blocks"].shape == (3, 192, 2, 16)
    assert stored[f"{stem}down_proj_scales"].shape == (3, 64, 3)
    assert torch.equal(stored["model.layers.0.mlp.router.weight"], before["model.layers.0.mlp.router.weight"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    again = read_tensors(convert(out, tmp_path / "again", dtype="bfloat16"))
    for name in (f"{stem}gate_up_proj", f"{stem}down_proj"):
        assert torch.equal(loaded.state_dict()[name], again[name])
        error = (again[name].double() - before[name].double()).abs()
        blocks = before[name].double().transpose(1, 2).unflatten(-1, (-1, 32))
        scales = torch.exp2(torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True))) - 2)
        bound = torch.maximum(blocks.abs() / 4, scales / 4).flatten(-2).transpose(1, 2)
        assert (error <= bound).all()


def test_mxfp4_of_mxfp4_is_the_same(gpt_oss: Path, tmp_path: Path) -> None:
    first = convert(gpt_oss, tmp_path / "first", quantize="mxfp4")
    assert same_tensors(convert(first, tmp_path / "second", quantize="mxfp4"), first)


def test_experts_that_are_packed_are_fp8_too(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        num_hidden_layers=1, num_experts=2, num_experts_per_tok=1, hidden_size=128, moe_intermediate_size=128,
        num_attention_heads=1, num_key_value_heads=1, head_dim=128, vocab_size=50, intermediate_size=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "model")
    out = convert(tmp_path / "model", tmp_path / "out", quantize="fp8_block")
    said = read_config(out)["quantization_config"]["modules_to_not_convert"]
    assert said == ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert (loaded[name].float() - tensor.float()).abs().max() <= tensor.float().abs().max() * 2**-4, name
