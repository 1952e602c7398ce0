"""A mixture of experts is what its recipe says, and what transformers and mergekit take it for."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixing import CHANNELS, HIDDEN, LAYERS, find_logits, load, mix, write_all, write_dense
from models import read_tensors
from reference.mergekit import PYTHON_VARIABLE, find_skip_reason

from mergemill.engine import errors, make_plan, run, verify

Tensors = dict[str, torch.Tensor]
MATRICES = ("gate_proj", "up_proj", "down_proj")
CALLED = dict(zip(MATRICES, ("w1", "w3", "w2"), strict=True))
KEYS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "deepseek": {
        "architectures": ["DeepseekForCausalLM"],
        "n_routed_experts": 2,
        "n_shared_experts": None,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "moe_intermediate_size": CHANNELS,
    },
    "qwen": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "moe_intermediate_size": CHANNELS,
        "shared_expert_intermediate_size": CHANNELS,
        "use_sliding_window": False,
    },
    "qwen3": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "moe_intermediate_size": CHANNELS,
    },
}
TAKES = [
    ("mixtral", "llama"),
    ("mixtral", "mistral"),
    ("deepseek", "llama"),
    ("deepseek", "mistral"),
    ("qwen", "llama"),
    ("qwen", "mistral"),
    ("qwen", "qwen2"),
    ("qwen3", "qwen3"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("models"))


def say(models: Path, kind: str, architecture: str, *experts: str | dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a recipe of experts, by the letters of their models."""
    given = [{"source_model": each} if isinstance(each, str) else each for each in experts]
    found = [each | {"source_model": str(models / f"{kind}-{each['source_model']}")} for each in given]
    shared = more.pop("shared", ["c"] if architecture == "qwen" else [])
    return {
        "base_model": str(models / f"{kind}-a"),
        "gate_mode": "random",
        "architecture": architecture,
        "experts": found,
        **({"shared_experts": [{"source_model": str(models / f"{kind}-{each}")} for each in shared]} if shared else {}),
        **more,
    }


def name_expert(architecture: str, layer: int, number: int, matrix: str) -> str:
    if architecture == "mixtral":
        return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{CALLED[matrix]}.weight"
    return f"model.layers.{layer}.mlp.experts.{number}.{matrix}.weight"


def name_router(architecture: str, layer: int) -> str:
    return f"model.layers.{layer}.{'block_sparse_moe' if architecture == 'mixtral' else 'mlp'}.gate.weight"


@pytest.mark.parametrize(("architecture", "kind"), TAKES)
def test_every_tensor_is_its_sources_and_transformers_loads_all(
    architecture: str, kind: str, models: Path, tmp_path: Path
) -> None:
    made = mix(say(models, kind, architecture, "b", "c"), tmp_path / "out")
    sources = {name: read_tensors(models / f"{kind}-{name}") for name in "abc"}
    left = dict(made)
    for layer in range(LAYERS):
        for number, source in enumerate("bc"):
            for matrix in MATRICES:
                own = sources[source][f"model.layers.{layer}.mlp.{matrix}.weight"]
                assert torch.equal(left.pop(name_expert(architecture, layer, number, matrix)), own)
        if architecture == "qwen":
            for matrix in MATRICES:
                own = sources["c"][f"model.layers.{layer}.mlp.{matrix}.weight"]
                assert torch.equal(left.pop(f"model.layers.{layer}.mlp.shared_expert.{matrix}.weight"), own)
            assert left.pop(f"model.layers.{layer}.mlp.shared_expert_gate.weight").shape == (1, HIDDEN)
            for each in "qkv":
                bias, rows = f"model.layers.{layer}.self_attn.{each}_proj.bias", sources["a"]
                if bias not in rows:
                    weight = rows[f"model.layers.{layer}.self_attn.{each}_proj.weight"]
                    assert torch.equal(left.pop(bias), torch.zeros(len(weight)))
        assert left.pop(name_router(architecture, layer)).shape == (2, HIDDEN)
    base = {name: value for name, value in sources["a"].items() if ".mlp." not in name}
    assert left.keys() == base.keys()
    assert all(torch.equal(left[name], value) for name, value in base.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((models / f"{kind}-a" / "config.json").read_text())
    assert {key: config[key] for key in KEYS[architecture]} == KEYS[architecture]
    for key in ("rope_parameters", "head_dim", "tie_word_embeddings", "vocab_size"):
        assert config.get(key) == before.get(key)
    if architecture == "deepseek":
        assert config["auto_map"]["AutoModelForCausalLM"].startswith("deepseek-ai/deepseek-moe-16b-base--")
    else:
        assert find_logits(load(tmp_path / "out")).isfinite().all()


@pytest.mark.parametrize(
    ("architecture", "kind", "more"),
    [
        ("mixtral", "llama", {}),
        ("qwen3", "qwen3", {"layout": "packed"}),
        ("mixtral", "mistral", {"granularity": 2, "experts_per_token": 1}),
        ("qwen3", "qwen3", {"granularity": 3, "layout": "packed", "experts_per_token": 2}),
    ],
)
def test_equal_experts_do_what_the_dense_model_does(
    architecture: str, kind: str, more: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    recipe = say(models, kind, architecture, {"source_model": "a", "count": 3}, **more)
    assert any("equal" in warning for warning in make_plan(recipe).warnings)
    mix(recipe, tmp_path / "out")
    expected, found = find_logits(load(models / f"{kind}-a")), find_logits(load(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_packed_experts_are_the_separate_ones(models: Path, tmp_path: Path) -> None:
    recipe = say(models, "llama", "mixtral", {"source_model": "b", "noise_scale": 0.1}, "c")
    apart, packed = mix(recipe, tmp_path / "apart"), mix(recipe | {"layout": "packed"}, tmp_path / "packed")
    for layer in range(LAYERS):
        own = {m: [apart[name_expert("mixtral", layer, e, m)] for e in (0, 1)] for m in MATRICES}
        both = [torch.cat(pair) for pair in zip(own["gate_proj"], own["up_proj"], strict=True)]
        assert torch.equal(packed[f"model.layers.{layer}.mlp.experts.gate_up_proj"], torch.stack(both))
        assert torch.equal(packed[f"model.layers.{layer}.mlp.experts.down_proj"], torch.stack(own["down_proj"]))
        assert torch.equal(packed[f"model.layers.{layer}.mlp.gate.weight"], apart[name_router("mixtral", layer)])
    load(tmp_path / "packed")


def test_two_shared_experts_are_one_mlp_that_is_their_sum(models: Path, tmp_path: Path) -> None:
    made = mix(say(models, "llama", "deepseek", "a", "b", shared=["b", "c"]), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_shared_experts"] == 2
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp"
        parts = [read_tensors(models / f"llama-{each}") for each in "bc"]
        expected = sum(run_mlp(x, [part[f"{name}.{m}.weight"] for m in MATRICES]) for part in parts)
        found = run_mlp(x, [made[f"{name}.shared_experts.{m}.weight"] for m in MATRICES])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def run_mlp(x: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
    gate, up, down = (each.double() for each in matrices)
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_noise_residual_scale_and_reinit_are_as_they_say(models: Path, tmp_path: Path) -> None:
    changed = {"source_model": "b", "noise_scale": 0.5, "residual_scale": 0.25, "count": 2}
    anew = {"source_model": "b", "reinit": 0.5}
    recipe = say(models, "llama", "mixtral", changed, anew)
    made, again, other = (mix(recipe, tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    own = read_tensors(models / "llama-b")
    noise = {0: [], 1: []}
    for layer in range(LAYERS):
        names = [name_expert("mixtral", layer, number, "down_proj") for number in range(3)]
        before = own[f"model.layers.{layer}.mlp.down_proj.weight"]
        for number in (0, 1):
            noise[number].append(made[names[number]] / 0.25 - before)
            assert not torch.equal(made[names[number]], other[names[number]])
        replaced = (made[names[2]] != before).any(0)
        assert replaced.sum() == CHANNELS // 2
        kept = ~replaced
        assert torch.equal(made[names[2]][:, kept], before[:, kept])
        for matrix in ("gate_proj", "up_proj"):
            rows = made[name_expert("mixtral", layer, 2, matrix)]
            assert torch.equal((rows != own[f"model.layers.{layer}.mlp.{matrix}.weight"]).any(1), replaced)
        drawn, gone = made[names[2]][:, replaced].double(), before[:, replaced].double()
        assert abs(drawn.mean() - gone.mean()) < 5 * gone.std() / drawn.numel() ** 0.5
        assert abs(drawn.std() / gone.std() - 1) < 5 / drawn.numel() ** 0.5
    both = [torch.cat(noise[number]).flatten().numpy() for number in (0, 1)]
    for each in both:
        assert abs(each.mean()) < 4 * 0.5 / each.size**0.5
        assert abs(each.std() - 0.5) < 0.02
    assert abs(np.corrcoef(*both)[0, 1]) < 4 / both[0].size ** 0.5
    assert all(torch.equal(value, again[name]) for name, value in made.items())


def test_random_gates_have_their_distribution_and_hang_on_the_seed(models: Path, tmp_path: Path) -> None:
    recipe = say(models, "qwen2", "qwen", {"source_model": "b", "noise_scale": 0.01, "count": 16})
    for mode, scale, law in (("random", 1.0, "normal"), ("uniform_random", HIDDEN**-0.5, "uniform")):
        made, other = (mix(recipe | {"gate_mode": mode}, tmp_path / f"{mode}{s}", seed=s) for s in (0, 1))
        rows = torch.cat([made[name_router("qwen", layer)] for layer in range(LAYERS)]).flatten()
        deviation = scale if law == "normal" else scale / 3**0.5
        assert abs(float(rows.std()) / deviation - 1) < 0.1
        assert abs(float(rows.mean())) < 4 * deviation / rows.numel() ** 0.5
        assert law == "normal" or float(rows.abs().max()) <= scale
        assert len(torch.unique(rows)) == rows.numel()
        assert not torch.equal(made[name_router("qwen", 0)], other[name_router("qwen", 0)])


def test_experts_with_adapters_and_a_base_that_is_a_stage(models: Path, tmp_path: Path) -> None:
    adapters = pytest.importorskip("adapters")
    import transformers

    dense = transformers.AutoModelForCausalLM.from_pretrained(models / "llama-b")
    merged = adapters.write_adapter(dense, tmp_path / "adapter", target_modules=["down_proj", "q_proj"])
    text = f"""
name: mean
merge_method: linear
models: [{{model: {models}/llama-a, parameters: {{weight: 1}}}}, {{model: {models}/llama-c, parameters: {{weight: 1}}}}]
---
base_model: mean
gate_mode: uniform_random
experts:
- source_model: {models}/llama-b+{tmp_path}/adapter
- source_model: mean
"""
    made = mix(text, tmp_path / "out")
    a, c = (read_tensors(models / f"llama-{each}") for each in "ac")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        torch.testing.assert_close(made[name_expert("mixtral", layer, 0, "down_proj")], merged[name])
        torch.testing.assert_close(made[name_expert("mixtral", layer, 1, "down_proj")], (a[name] + c[name]) / 2)
    torch.testing.assert_close(made["lm_head.weight"], (a["lm_head.weight"] + c["lm_head.weight"]) / 2)
    load(tmp_path / "out")
    assert verify(tmp_path / "out", replay=100).replayed >= 1


def test_mixtures_are_stages_that_are_merged_with_each_other(models: Path, tmp_path: Path) -> None:
    def mixture(name: str, *experts: str) -> dict[str, Any]:
        sources = [{"source_model": str(models / f"llama-{each}"), "noise_scale": 0.01} for each in experts]
        return {"name": name, "base_model": str(models / "llama-a"), "gate_mode": "random", "experts": sources}

    def average(*names: str, **more: Any) -> dict[str, Any]:
        entries = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
        return {"merge_method": "linear", "models": entries, "dtype": "float32", **more}

    both = [mixture("one", "a", "b"), mixture("two", "a", "c")]
    plan = make_plan(average("one", "two", stages=both, round_stages=True))
    run(plan, tmp_path / "out", workers=0)
    for each in both:
        run(make_plan(each), tmp_path / each["name"], workers=0)
    run(make_plan(average(*(str(tmp_path / name) for name in ("one", "two")))), tmp_path / "apart", workers=0)
    drawn = [read_tensors(tmp_path / name)[name_router("mixtral", 0)] for name in ("one", "two")]
    assert not torch.equal(*drawn), "stages draw each their own"
    made, apart = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "apart")
    assert made.keys() == apart.keys()
    assert all(torch.equal(made[name], each) for name, each in apart.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    assert verify(tmp_path / "out", replay=100).replayed == len(plan.parts)
    prompted = {**both[1], "gate_mode": "cheap_embed"}
    prompted["experts"] = [{**each, "positive_prompts": [each["source_model"]]} for each in prompted["experts"]]
    with pytest.raises(errors.PlanError, match=r"stage two: its gates are computed from prompts .* gate_mode: file"):
        make_plan(average("one", "two", stages=[both[0], prompted]))


def test_gates_of_a_file_are_taken_and_kept(models: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    stream = torch.Generator().manual_seed(0)
    gates = {f"layers.{i}.gate": torch.randn(2, HIDDEN, generator=stream) for i in range(LAYERS)}
    save_file(gates, tmp_path / "gates.safetensors")
    asked = {"gate_mode": "file", "gates": str(tmp_path / "gates.safetensors"), "granularity": 2}
    run(make_plan(say(models, "llama", "mixtral", "b", "c", **asked)), tmp_path / "out", workers=0)
    made = read_tensors(tmp_path / "out")
    for layer in range(LAYERS):
        expected = gates[f"layers.{layer}.gate"].repeat_interleave(2, 0)
        assert torch.equal(made[name_router("mixtral", layer)], expected)
    assert (tmp_path / "out" / "gates.safetensors").read_bytes() == (tmp_path / "gates.safetensors").read_bytes()
    with pytest.raises(errors.PlanError, match=r"layers\.0\.gate has shape \[2, 32\]; this mixture needs \[3, 32\]"):
        make_plan(say(models, "llama", "mixtral", "b", "c", "a", **asked))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no experts": ({"experts": []}, "'experts' is an empty list"),
    "too many a token": ({"experts_per_token": 3}, "'experts_per_token' is 3, and there are 2 experts"),
    "none a token": ({"experts_per_token": 0}, "must be from 1 to"),
    "experts without end": ({"experts": [{"source_model": "b", "count": 100_000_000}]}, "must be from 1 to 4096"),
    "unknown key": ({"noise_std": 0.1}, "unknown key 'noise_std'"),
    "unknown mode": ({"gate_mode": "hiden"}, "did you mean 'hidden'"),
    "unknown architecture": ({"architecture": "mixtal"}, "did you mean 'mixtral'"),
    "prompts missing": ({"gate_mode": "hidden"}, "needs positive_prompts or prompts_file of every expert"),
    "gates without mode": ({"gates": "x"}, "'gates' names the file of gate_mode: file"),
    "shared without place": ({"shared": ["c"]}, "mixtral has no shared experts, and here are 1"),
    "two shared": ({"shared": ["b", "c"], "architecture": "qwen"}, "has exactly 1 of shared_experts, and here are 2"),
    "not its family": ({"architecture": "qwen3"}, "qwen3 takes models of type qwen3, and the base model is llama"),
    "granularity": ({"granularity": 5}, "granularity 5 does not divide the 48 channels"),
    "packed deepseek": ({"architecture": "deepseek", "layout": "packed"}, "has no deepseek"),
    "packed reinit": (
        {"experts": [{"source_model": "b", "reinit": 0.5}, {"source_model": "c"}], "layout": "packed"},
        "leave layout packed out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(case: str, models: Path, tmp_path: Path) -> None:
    changes, words = dict(REFUSED[case][0]), REFUSED[case][1]
    experts = changes.pop("experts", ["b", "c"])
    recipe = say(models, "llama", changes.pop("architecture", "mixtral"), *experts, **{"shared": [], **changes})
    with pytest.raises(errors.InputError, match="(?s)" + words.replace("[", r"\[")):
        run(make_plan(recipe), tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_refused_by_name(models: Path, tmp_path: Path) -> None:
    write_dense(tmp_path / "wide", "llama", seed=0, intermediate_size=64)
    write_dense(tmp_path / "deep", "llama", seed=0, num_hidden_layers=3)
    write_dense(tmp_path / "biased", "llama", seed=0, attention_bias=True)
    write_dense(tmp_path / "odd", "llama", seed=0, mlp_bias=True)
    cases = {
        "wide": r"mlp.gate_proj.weight: .*llama-a has shape \[48, 32\] in its first layer, .*wide \[64, 32\]",
        "deep": "llama-a has 2 layers, .*deep 3",
        "biased": r"biased: tensor model.layers.0.self_attn.k_proj.bias would be lost: a mixtral has no place",
        "odd": r"odd: tensor model.layers.0.mlp.down_proj.bias would be lost",
        str(models / "qwen3-a"): "is a model of type qwen3; a mixtral takes llama or mistral",
    }
    for model, words in cases.items():
        recipe = say(models, "llama", "mixtral", "a", "b")
        recipe["experts"][1]["source_model"] = str(tmp_path / model)
        with pytest.raises(errors.PlanError, match=words):
            make_plan(recipe)


def test_prompts_of_a_file_are_kept_with_the_recipe(models: Path, tmp_path: Path) -> None:
    (tmp_path / "sums.txt").write_text("1 + 1\n\n2 + 2\n")
    (tmp_path / "words.jsonl").write_text('{"text": "a poem"}\n')
    experts = [("b", "sums.txt"), ("c", "words.jsonl")]
    listed = "\n".join(f"- {{source_model: {models}/llama-{m}, prompts_file: {file}}}" for m, file in experts)
    (tmp_path / "moe.yml").write_text(f"base_model: {models}/llama-a\ngate_mode: random\nexperts:\n{listed}\n")
    run(make_plan(tmp_path / "moe.yml"), tmp_path / "out", workers=0)
    kept = json.loads((tmp_path / "out" / "recipe.yml").read_text())
    assert [each["positive_prompts"] for each in kept["experts"]] == [["1 + 1", "2 + 2"], ["a poem"]]
    assert verify(tmp_path / "out", replay=1).replayed == 1
    (tmp_path / "sums.txt").unlink()
    with pytest.raises(errors.RecipeError, match=r"sums\.txt: cannot be read: No such file"):
        make_plan(tmp_path / "moe.yml")


MERGEKIT = """
from mergekit.scripts.moe import main
for name in ("deepseek", "qwen"):
    main([f"{name}.yml", f"{name}-expected"], standalone_mode=False)
"""


@pytest.mark.skipif(find_skip_reason() is not None, reason=str(find_skip_reason()))
def test_mergekits_files_run_unchanged_and_its_mixtures_are_ours(models: Path, tmp_path: Path) -> None:
    """Its hidden states are those of a model in bfloat16; all else is equal."""
    within = {"deepseek": 1e-6, "qwen": 1e-2}
    for name, words in (("deepseek", "DeepSeek MoE\ngate_mode: cheap_embed"), ("qwen", "Qwen MoE\ngate_mode: hidden")):
        prompted = 'positive_prompts: ["the"]' if name == "qwen" else "residual_scale: 0.25"
        (tmp_path / f"{name}.yml").write_text(f"""
base_model: {models}/llama-a
architecture: {words}
experts_per_token: 1
experts:
  - source_model: {models}/llama-b
    positive_prompts: ["a poem of the sea", "songs"]
    negative_prompts: ["numbers and more numbers"]
    residual_scale: 0.5
  - source_model: {models}/llama-c
    positive_prompts: ["1 + 1 = 2"]
shared_experts:
  - source_model: {models}/llama-b
    {prompted}
""")
    done = subprocess.run(
        [os.environ[PYTHON_VARIABLE], "-c", MERGEKIT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, most in within.items():
        made, expected = mix(tmp_path / f"{name}.yml", tmp_path / name), read_tensors(tmp_path / f"{name}-expected")
        assert made.keys() == expected.keys()
        for tensor, value in made.items():
            torch.testing.assert_close(value, expected[tensor], rtol=0, atol=most if "gate.weight" in tensor else 0.0)
