"""An adapter that is extracted from a model and its base: loaded by peft, it makes the model again."""

import copy
import json
import os
import subprocess
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import fill, make_gpt2, make_llama, make_qwen, peft, transformers, write_adapter, write_model
from models import read_tensors, write_tensors
from reference.mergekit import find_skip_reason
from runs.merging import parts_of, run_until
from safetensors.torch import load_file, save_file

from mergemill.cli.main import execute
from mergemill.engine import inspect, make_convert_plan, make_lora_plan, make_plan, run, verify
from mergemill.engine.errors import PlanError
from mergemill.engine.plan import layout

WEIGHTS = "adapter_model.safetensors"
LARGE = {"hidden_size": 96, "intermediate_size": 160}


def tune(base: Any, *, seed: int = 9, only: str = "") -> Any:
    """Return a model of which every parameter whose name holds `only` differs a little."""
    tuned, stream = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(tuned.named_parameters()):
            if only in name:
                parameter.add_(torch.randn(parameter.shape, generator=stream) / 20)
    return tuned


def load_by_peft(base: Any, folder: Path) -> Any:
    """Return the base with an adapter; nothing may be missing or unexpected."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert not [
        str(each.message) for each in told if "keys" in str(each.message) and "_pattern" not in str(each.message)
    ]
    made = {name for name, _ in loaded.named_parameters() if ".lora_" in name}
    stored = {name for name in load_file(folder / WEIGHTS) if ".lora_" in name}
    assert {name.replace(".default", "") for name in made} == stored, "no adapters of peft's own making"
    return loaded


def merge_by_peft(base: Any, folder: Path) -> Mapping[str, torch.Tensor]:
    loaded = load_by_peft(base, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return loaded.merge_and_unload().state_dict()


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Write a Llama and a fine-tune of it, and return where, and both."""
    folder = tmp_path_factory.mktemp("pair")
    base = make_llama(**LARGE)
    tuned = tune(base)
    write_model(base, folder / "base")
    write_model(tuned, folder / "tuned")
    return folder, base, tuned


def extract(folder: Path, out: Path, **settings: Any) -> dict[str, torch.Tensor]:
    run(make_lora_plan(str(folder / "tuned"), str(folder / "base"), **settings), out, workers=0)
    return load_file(out / WEIGHTS)


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llama": (make_llama, {}),
    "embeddings decomposed": (make_llama, {"embed_lora": True}),
    "all scale in A, and rsLoRA": (make_llama, {"distribute_scale": False, "rslora": True}),
    "exact": (make_llama, {"way": "exact"}),
    "tied, with biases": (make_qwen, {}),
    "tied, embeddings decomposed": (make_qwen, {"embed_lora": True}),
    "conv1d, tied under another name": (make_gpt2, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_at_full_rank_it_makes_the_model_again(case: str, tmp_path: Path) -> None:
    make, settings = CASES[case]
    base = make()
    tuned = tune(base)
    write_model(base, tmp_path / "base")
    write_model(tuned, tmp_path / "tuned")
    extract(tmp_path, tmp_path / "out", max_rank=64, **settings)
    wanted = tuned.state_dict()
    if case != "tied, embeddings decomposed":  # whose change peft 0.21 adds twice when it merges
        made = merge_by_peft(base, tmp_path / "out")
        for name, value in wanted.items():
            torch.testing.assert_close(made[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        loaded = load_by_peft(base, tmp_path / "out").eval()
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, tuned.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    run(
        make_plan({"merge_method": "passthrough", "models": [{"model": f"{tmp_path / 'base'}+{tmp_path / 'out'}"}]}),
        tmp_path / "again",
        workers=0,
    )
    for name, value in read_tensors(tmp_path / "again").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-6)


def test_every_matrix_is_at_its_optimum(pair: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, base, tuned = pair
    done = run(make_lora_plan(str(folder / "tuned"), str(folder / "base"), max_rank=7), tmp_path / "out", workers=0)
    made, before, wanted = merge_by_peft(base, tmp_path / "out"), base.state_dict(), tuned.state_dict()
    errors = {}
    for name in (name for name in wanted if "proj" in name):
        change = (wanted[name].double() - before[name].double()).numpy()
        values = np.linalg.svd(change, compute_uv=False)
        error = np.linalg.norm((wanted[name].double() - made[name].double()).numpy())
        assert error <= 1.0001 * np.sqrt((values[7:] ** 2).sum())
        errors[name] = error / np.linalg.norm(change)
    told = {change.tensor: change.change for change in done.guard.most_changed}
    assert len(told) == 10
    for name, value in told.items():
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert value == pytest.approx(errors[f"{module}.weight"], rel=1e-4)
    assert done.losses is not None
    assert {f"{module}.weight" for module in done.losses} == errors.keys()
    card = (tmp_path / "out" / "README.md").read_text()
    for module, value in done.losses.items():
        assert value == pytest.approx(errors[f"{module}.weight"], rel=1e-4)
        assert f"| `{module}` | {value:.4%} |" in card
    assert list(done.losses.values()) == sorted(done.losses.values(), key=lambda value: -(value or 0.0))


def test_only_what_is_in_the_file_is_named(pair: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, base, _ = pair
    found = extract(folder, tmp_path / "out", max_rank=4, include=("layers\\.0",), exclude=("norm", "k_proj"))
    config = read_config(tmp_path / "out")
    assert sorted(config["target_modules"])[0] == "model.layers.0.mlp.down_proj"
    assert len(config["target_modules"]) == 6
    assert config["modules_to_save"] is None
    assert len(found) == 12
    load_by_peft(base, tmp_path / "out")
    told = inspect(tmp_path / "out")
    assert (told.kind, told.state, bool(told.digest)) == ("adapter", "finished", True)
    assert told.adapter is not None
    assert (told.adapter.rank, told.adapter.refused) == (4, "")


def test_what_peft_cannot_name_alone_is_refused(tmp_path: Path) -> None:
    for name, shift in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        state = {module: torch.full((3,), shift) for module in ("norm.weight", "layers.0.layernorm.weight")}
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(PlanError, match=r"norm: peft's modules_to_save cannot name it without layers.0.layernorm"):
        make_lora_plan(str(tmp_path / "tuned"), str(tmp_path / "base"), include=("^norm$",))


def test_ranks_differ_by_energy_and_what_did_not_change_is_left_out(tmp_path: Path) -> None:
    base = make_llama(**LARGE)
    tuned = tune(base, only="q_proj")
    with torch.no_grad():
        for layer, rank in enumerate((3, 9)):
            left = torch.randn(160, rank, generator=torch.Generator().manual_seed(layer))
            tuned.model.layers[layer].mlp.up_proj.weight += left @ left[:96].T / 20
    write_model(base, tmp_path / "base")
    write_model(tuned, tmp_path / "tuned")
    extract(tmp_path, tmp_path / "out", energy=0.999999)
    config = read_config(tmp_path / "out")
    assert sorted(config["target_modules"]) == ["q_proj", "up_proj"]
    assert config["r"] == config["lora_alpha"] == 96
    assert config["rank_pattern"] == config["alpha_pattern"]
    ranks = {module: rank for module, rank in config["rank_pattern"].items() if "up_proj" in module}
    assert ranks == {"model.layers.0.mlp.up_proj": 3, "model.layers.1.mlp.up_proj": 9}
    made = merge_by_peft(base, tmp_path / "out")
    for name, value in tuned.state_dict().items():
        torch.testing.assert_close(made[name], value, rtol=1e-3, atol=1e-3)
    extract(tmp_path, tmp_path / "ratio", sv_ratio=0.5, max_rank=200, include=("up_proj",))
    assert read_config(tmp_path / "ratio")["r"] <= 9
    with pytest.raises(PlanError, match="nothing to extract"):
        make_lora_plan(str(tmp_path / "tuned"), str(tmp_path / "base"), sv_epsilon=1e6)


def test_a_budget_is_kept_and_spent_where_most_is_gained(pair: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, base, tuned = pair
    found = extract(folder, tmp_path / "out", budget=60_000, skip_undecomposable=True, exclude=("embed", "lm_head"))
    size_bytes = sum(value.nbytes for value in found.values())
    assert 58_000 < size_bytes <= 60_000
    made, before, wanted = merge_by_peft(base, tmp_path / "out"), base.state_dict(), tuned.state_dict()
    lost = sum(float((made[name] - wanted[name]).square().sum()) for name in wanted if "proj" in name)
    best = 0.0
    gains = []
    for name in (name for name in wanted if "proj" in name):
        values = np.linalg.svd((wanted[name].double() - before[name].double()).numpy(), compute_uv=False)
        best += float((values**2).sum())
        gains += [(value**2 / sum(wanted[name].shape), value**2, 4 * sum(wanted[name].shape)) for value in values]
    left = 60_000
    for _, gain, cost in sorted(gains, reverse=True):
        if cost > left:
            break
        left, best = left - cost, best - gain
    assert lost <= best * 1.0001
    with pytest.raises(PlanError, match=r"--budget 9.8 KiB is too little: .* are tensors that are stored whole"):
        make_lora_plan(str(folder / "tuned"), str(folder / "base"), budget=10_000)


def test_an_adapter_comes_back_out_of_the_model_that_it_was_merged_into(tmp_path: Path) -> None:
    base = make_llama(**LARGE)
    write_model(base, tmp_path / "base")
    write_adapter(base, tmp_path / "lora", r=4, lora_alpha=8)
    model = f"{tmp_path / 'base'}+{tmp_path / 'lora'}"
    run(make_lora_plan(model, str(tmp_path / "base"), max_rank=4), tmp_path / "out", workers=0)
    made, wanted = merge_by_peft(base, tmp_path / "out"), merge_by_peft(base, tmp_path / "lora")
    assert sorted(read_config(tmp_path / "out")["target_modules"]) == ["down_proj", "q_proj"]
    for name, value in wanted.items():
        torch.testing.assert_close(made[name], value, rtol=2e-6, atol=2e-6)


def test_a_recipe_that_is_written_nowhere_gives_an_adapter(pair: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, base, _ = pair
    write_model(tune(base, seed=3), tmp_path / "other")
    recipe = {"merge_method": "ties", "base_model": str(folder / "base"), "dtype": "float32"}
    recipe["models"] = [{"model": str(path)} for path in (folder / "tuned", tmp_path / "other")]
    recipe["parameters"] = {"weight": 1.0, "density": 0.6}
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    run(make_plan(recipe), tmp_path / "merged", workers=0)
    run(make_lora_plan(str(tmp_path / "recipe.yml"), str(folder / "base"), max_rank=5), tmp_path / "a", workers=0)
    run(make_lora_plan(str(tmp_path / "merged"), str(folder / "base"), max_rank=5), tmp_path / "b", workers=0)
    one, other = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6)
    assert verify(tmp_path / "a", replay=1).replayed == 1


@pytest.mark.parametrize("family", ["packed", "apart", "turned"])
def test_experts_come_out_packed_or_one_by_one(family: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 24}
    if family == "turned":
        base = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, num_local_experts=4))
    else:
        base = transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=20)
        )
    tuned = tune(fill(base, 0))
    for name, module in (("base", base), ("tuned", tuned)):
        module.save_pretrained(tmp_path / name, save_original_format=family == "apart")
    if family == "turned":
        with pytest.raises(PlanError, match=r"sinks has changed, .* no weight or bias .* with -e 'self_attn\$'"):
            make_lora_plan(str(tmp_path / "tuned"), str(tmp_path / "base"))
        with pytest.raises(PlanError, match=r"packed \[in, out\], and no layout of them one by one is known; leave"):
            make_lora_plan(str(tmp_path / "tuned"), str(tmp_path / "base"), layout="separate")
        excluding = make_lora_plan(str(tmp_path / "tuned"), str(tmp_path / "base"), exclude=("self_attn$",))
        assert not any("sinks" in name for shard in excluding.shards for name in map(str, shard.tensors))
        sinks = {name: value for name, value in read_tensors(tmp_path / "base").items() if name.endswith("sinks")}
        write_tensors(tmp_path / "tuned", read_tensors(tmp_path / "tuned") | sinks)
    found = extract(tmp_path, tmp_path / "out", max_rank=64)
    assert any("experts.base_layer.lora_A" in name for name in found) == (family != "apart")
    made = merge_by_peft_packed(base, tmp_path / "out")
    for name, value in tuned.state_dict().items():
        if "sinks" not in name:
            torch.testing.assert_close(made[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_packed_experts_come_out_one_by_one_if_asked(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 24}
    if kind == "mixtral":
        base = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=4))
        stem, names = "block_sparse_moe.experts", ("w1", "w3", "w2")
    else:
        config = transformers.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=20)
        base = transformers.Qwen3MoeForCausalLM(config)
        stem, names = "mlp.experts", ("gate_proj", "up_proj", "down_proj")
    tuned = tune(fill(base, 0))
    for name, module in (("base", base), ("tuned", tuned)):
        module.save_pretrained(tmp_path / name, save_original_format=False)
    tuned.save_pretrained(tmp_path / "apart", save_original_format=True)
    base.save_pretrained(tmp_path / "base apart", save_original_format=True)
    found = extract(tmp_path, tmp_path / "out", max_rank=64, layout="separate")
    experts = {key.split(".lora_")[0] for key in found if ".experts." in key}
    assert experts == {f"base_model.model.model.layers.0.{stem}.{i}.{name}" for i in range(4) for name in names}
    made = merge_by_peft_packed(base, tmp_path / "out")
    for name, value in tuned.state_dict().items():
        torch.testing.assert_close(made[name], value, rtol=1e-6, atol=1e-6)
    for stored, like in (("base", "tuned"), ("base apart", "apart")):
        model = f"{tmp_path / stored}+{tmp_path / 'out'}"
        run(make_plan({"merge_method": "passthrough", "models": [{"model": model}]}), tmp_path / like / "m", workers=0)
        merged, wanted = read_tensors(tmp_path / like / "m"), read_tensors(tmp_path / like)
        assert merged.keys() == wanted.keys(), "the base's layout is kept"
        for name, value in wanted.items():
            torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-6)


def test_a_layout_that_has_no_meaning_is_refused(tmp_path: Path) -> None:
    base = make_llama()
    write_model(base, tmp_path / "base")
    write_model(tune(base), tmp_path / "tuned")
    both = str(tmp_path / "tuned"), str(tmp_path / "base")
    with pytest.raises(PlanError, match="--layout 'packed' is unknown; known is separate"):
        make_lora_plan(*both, layout="packed")
    with pytest.raises(
        PlanError, match=r"--layout separate is of packed experts, and .*base has none that is taken; leave"
    ):
        make_lora_plan(*both, layout="separate")


def merge_by_peft_packed(base: Any, folder: Path) -> Mapping[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload().state_dict()


def test_a_vocabulary_that_grew_is_whole_and_told(tmp_path: Path) -> None:
    base = make_llama()
    tuned = tune(base)
    tuned.resize_token_embeddings(64, mean_resizing=False)
    write_model(base, tmp_path / "base")
    write_model(tuned, tmp_path / "tuned")
    (tmp_path / "tuned" / "tokenizer.json").write_text("{}")
    plan = make_lora_plan(str(tmp_path / "tuned"), str(tmp_path / "base"), max_rank=64, embed_lora=True)
    run(plan, tmp_path / "out", workers=0)
    assert "resize_token_embeddings(64)" in (tmp_path / "out" / "README.md").read_text()
    assert any("resize_token_embeddings(64)" in warning for warning in plan.warnings)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(64, mean_resizing=False)
    made = merge_by_peft(larger, tmp_path / "out")
    for name, value in tuned.state_dict().items():
        torch.testing.assert_close(made[name], value, rtol=1e-6, atol=1e-6)


def test_convolutions_are_cut_as_flattened_kernels(tmp_path: Path) -> None:
    stream = torch.Generator().manual_seed(0)
    shapes = {"stem.weight": (6, 3, 3, 3), "stem.bias": (6,), "head.weight": (5, 6), "wide.weight": (4, 1, 3)}
    base = {name: torch.randn(shape, generator=stream) for name, shape in shapes.items()}
    tuned = {name: value + torch.randn(value.shape, generator=stream) / 10 for name, value in base.items()}
    for name, state in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    found = extract(tmp_path, tmp_path / "out", max_rank=9, embed_lora=True)
    a, b = (found[f"base_model.model.stem.lora_{side}.weight"] for side in "AB")
    assert (a.shape, b.shape) == ((6, 3, 3, 3), (6, 6, 1, 1))
    made = base["stem.weight"] + (b.flatten(1) @ a.flatten(1)).view(6, 3, 3, 3)
    torch.testing.assert_close(made, tuned["stem.weight"], rtol=1e-6, atol=1e-6)
    assert torch.equal(found["base_model.model.stem.base_layer.bias"], tuned["stem.bias"])
    assert torch.equal(found["base_model.model.wide.weight"], tuned["wide.weight"])
    assert read_config(tmp_path / "out")["bias"] == "all"


def test_a_quantised_model_is_extracted_as_it_is_read(tmp_path: Path) -> None:
    base = make_llama(hidden_size=128, intermediate_size=128)
    tuned = tune(base)
    write_model(base, tmp_path / "base")
    write_model(tuned, tmp_path / "as-trained")
    run(make_convert_plan(str(tmp_path / "as-trained"), quantize="fp8_block"), tmp_path / "tuned", workers=0)
    extract(tmp_path, tmp_path / "out", max_rank=128, dtype="float32")
    plain = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "tuned")}], "dtype": "float32"}
    run(make_plan(plain), tmp_path / "plain", workers=0)
    made, wanted = merge_by_peft(base, tmp_path / "out"), read_tensors(tmp_path / "plain")
    for name, value in wanted.items():
        torch.testing.assert_close(made[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert any(not torch.equal(value, tuned.state_dict()[name]) for name, value in wanted.items())


def test_it_is_the_same_from_one_worker_and_two_and_resumed(
    pair: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = pair
    models = str(folder / "tuned"), str(folder / "base")
    monkeypatch.setattr(layout, "LEAST_PART_BYTES", 1 << 13)
    with parts_of(1 << 13):
        plan = make_lora_plan(*models, max_rank=5, dtype="bfloat16")
    assert len(plan.parts) > 3
    run_until(plan, tmp_path / "resumed", 2)
    run(plan, tmp_path / "resumed", workers=0)
    run(plan, tmp_path / "two", workers=2)
    done = verify(tmp_path / "resumed")
    assert done.parts == len(plan.parts)
    written = (tmp_path / "resumed" / WEIGHTS).read_bytes()
    assert written == (tmp_path / "two" / WEIGHTS).read_bytes()
    whole = extract(folder, tmp_path / "whole", max_rank=5, dtype="bfloat16")
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == written
    assert {value.dtype for value in whole.values()} == {torch.bfloat16}
    assert all(row.flatten()[row.abs().argmax()] > 0 for n, v in whole.items() if "lora_A" in n for row in v)


def test_the_command_line_extracts_resumes_and_verifies(
    pair: tuple[Path, Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base, _ = pair
    command = ["extract-lora", str(folder / "tuned"), str(folder / "base"), str(tmp_path / "out"), "--max-rank", "6"]
    assert execute([*command, "--workers", "0"]) == 0
    told = capsys.readouterr()
    assert "largest errors, as a share of what changed:" in told.err
    assert "vLLM serves no such adapter" in told.err
    assert execute([*command, "--workers", "0"]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert execute([*command, "--workers", "0", "--json"]) == 0
    losses = json.loads(capsys.readouterr().out.splitlines()[-1])["losses"]
    assert len(losses) == 14
    assert execute(["verify", str(tmp_path / "out"), "--replay", "3"]) == 0
    load_by_peft(base, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`q_proj`: 2 of rank 6" in card
    assert str(folder) not in card


REFUSED = {
    "the base itself": (("base", "base"), {}, "is the base model itself"),
    "a copy of the base": (("copy", "base"), {}, "is equal to .*; there is nothing to extract"),
    "no regular expression": (("tuned", "base"), {"include": ("(",)}, r"-i '\(' is no regular expression"),
    "a share above 1": (("tuned", "base"), {"energy": 1.5}, "--energy is a share, above 0 and up to 1, not 1.5"),
    "another way": (("tuned", "base"), {"way": "qr"}, "--way 'qr' is unknown; known are gram, exact, randomized"),
    "another shape": (("wider", "base"), {}, "the model has shape .* an adapter cannot hold such a change"),
    "a tensor more": (("more", "base"), {}, "tensor score.weight is not in the base; .* leave it out with -e"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, pair: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, base, _ = pair
    (model, other), settings, message = REFUSED[case]
    if model in ("copy", "wider", "more"):
        made = make_llama(**{**LARGE, "intermediate_size": 170}) if model == "wider" else base
        write_model(made, tmp_path / model)
        if model == "more":
            path = tmp_path / model / "model.safetensors"
            save_file({**load_file(path), "score.weight": torch.ones(2, 96)}, path)
    place = folder if (folder / model).exists() else tmp_path
    with pytest.raises(PlanError, match=message):
        make_lora_plan(str(place / model), str(folder / other), **settings)


def test_what_fits_nowhere_is_refused_with_the_number_that_would_do(
    pair: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    folder, _, _ = pair
    plan = make_lora_plan(str(folder / "tuned"), str(folder / "base"), max_rank=6)
    with pytest.raises(PlanError, match=r"--memory .* is too little: tensor base_model.*lora_A.weight needs \d+ bytes"):
        run(plan, tmp_path / "out", workers=0, memory=1 << 19)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(bool(find_skip_reason()), reason=find_skip_reason() or "mergekit is there")
def test_its_errors_are_those_of_mergekit_extract_lora(pair: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, base, tuned = pair
    command = [Path(os.environ["MERGEMILL_MERGEKIT_PYTHON"]).with_name("mergekit-extract-lora"), "--max-rank", "6"]
    command += ["--model", folder / "tuned", "--base-model", folder / "base", "--out-path", tmp_path / "theirs"]
    subprocess.run([*map(str, command)], check=False, capture_output=True)  # it fails at its card, once all is written
    extract(folder, tmp_path / "ours", max_rank=6)
    found = [load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs")]
    before, wanted = base.state_dict(), tuned.state_dict()
    for name in (name for name in wanted if "proj" in name):
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        change = wanted[name].double() - before[name].double()
        ours, theirs = (each[f"{key}B.weight"].double() @ each[f"{key}A.weight"].double() for each in found)
        assert float((change - ours).norm()) <= 1.001 * float((change - theirs).norm())
