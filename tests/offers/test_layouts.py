"""A merge does not depend on what its models store as one tensor, and the output has the donor's layout."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import read_tensors, write_llama, write_tensors
from offers.toy_models import load_strictly, save_model
from oracles import Array, slerp, ties
from oracles.gram import model_stock
from runs.merging import SMALL_PART, make_recipe_of, parts_of

from mergemill.engine import make_plan, run
from mergemill.engine.errors import PlanError

LAYOUTS = (False, True)
KINDS = ("mixtral", "phimoe", "granitemoe", "qwen3_moe", "deepseek_v3")
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.4},
    "task_arithmetic": {"weight": 0.7},
    "slerp": {"t": 0.3},
    "ties": {"weight": 0.7, "density": 0.3},
    "dare_ties": {"weight": 0.7, "density": 0.3},
    "model_stock": {},
    "breadcrumbs": {"weight": 0.7, "density": 0.5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three fine-tunes of one model, of each kind, in both layouts."""
    folder = tmp_path_factory.mktemp("layouts")
    for kind in KINDS:
        base = save_model(kind, folder / f"{kind}-base-False", 1, packed=False)
        for name, seed in (("a", 2), ("b", 3)):
            save_model(kind, folder / f"{kind}-{name}-False", seed, packed=False, near=base)
        for name in ("base", "a", "b"):
            own = folder / f"{kind}-{name}-False"
            model = load_and_save(own, folder / f"{kind}-{name}-True")
            assert model.keys() != read_tensors(own).keys()
    return folder


def load_and_save(source: Path, target: Path) -> dict[str, torch.Tensor]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(target, save_original_format=False)
    return read_tensors(target)


def merge(folder: Path, out: Path, method: str, models: list[str], **more: Any) -> Path:
    base = {} if method == "linear" else {"base_model": str(folder / models[0])}
    named = models[:2] if method == "slerp" else models if method == "linear" else models[1:]
    body = {
        "merge_method": method,
        **base,
        "models": [{"model": str(folder / name)} for name in named],
        "parameters": METHODS[method],
        **more,
    }
    with parts_of(SMALL_PART):
        run(make_plan(make_recipe_of(body)), out, workers=0)
    return out


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_does_not_depend_on_the_layouts_of_its_models(method: str, folder: Path, tmp_path: Path) -> None:
    made = []
    for number, packed in enumerate(itertools.product(LAYOUTS, repeat=3)):
        models = [f"mixtral-{name}-{each}" for name, each in zip(("base", "a", "b"), packed, strict=True)]
        out = merge(folder, tmp_path / str(number), method, models)
        donor = read_tensors(folder / models[0])
        assert {name: tensor.shape for name, tensor in read_tensors(out).items()} == {
            name: tensor.shape for name, tensor in donor.items()
        }
        made.append(load_strictly(out))
    for other in made[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in made[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_of_experts_merges_in_both_layouts(kind: str, folder: Path, tmp_path: Path) -> None:
    made = []
    for packed in itertools.product(LAYOUTS, repeat=2):
        models = [f"{kind}-{name}-{each}" for name, each in zip(("base", "a"), packed, strict=True)]
        made.append(load_strictly(merge(folder, tmp_path / f"{packed}", "ties", models)))
    for other in made[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in made[0].items())


@pytest.mark.parametrize("method", ["ties", "slerp", "model_stock"])
def test_experts_are_merged_as_the_tensor_that_packs_them(method: str, folder: Path, tmp_path: Path) -> None:
    models = [f"mixtral-{name}-False" for name in ("base", "a", "b")]
    merged = load_strictly(merge(folder, tmp_path / "out", method, models))
    base, a, b = (load_strictly(folder / name) for name in models)
    for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        x, y, z = (tensors[name].double().numpy() for tensors in (base, a, b))
        np.testing.assert_allclose(merged[name].double().numpy(), EXPECTED[method](x, y, z), rtol=0, atol=2e-6)


def expect_ties(base: Array, a: Array, b: Array) -> Array:
    return ties(base, [a - base, b - base], weight=[0.7, 0.7], density=[0.3, 0.3])


EXPECTED: dict[str, Any] = {
    "ties": expect_ties,
    "slerp": lambda base, a, _: slerp(base, a, t=0.3),
    "model_stock": lambda base, a, b: model_stock(base, [a - base, b - base]),
}


def test_the_ledger_accounts_for_every_expert(folder: Path) -> None:
    models = [f"qwen3_moe-{name}-{each}" for name, each in (("base", False), ("a", True))]
    body = {
        "merge_method": "ties",
        "base_model": str(folder / models[0]),
        "models": [{"model": str(folder / models[1])}],
    }
    plan = make_plan(make_recipe_of({**body, "parameters": METHODS["ties"]}))
    for source, name in zip(reversed(plan.sources), models, strict=True):
        stored = read_tensors(folder / name)
        assert (source.merged, source.tensors) == (len(stored), len(stored))
        assert source.read_bytes == sum(tensor.nbytes for tensor in stored.values())


def test_a_filter_that_names_one_expert_still_holds(folder: Path, tmp_path: Path) -> None:
    models = [f"mixtral-{name}-False" for name in ("base", "a")]
    weight = [{"filter": "experts.2.", "value": 0.0}, {"value": 1.0}]
    parameters = {"weight": weight, "density": 1.0}
    body = {"merge_method": "ties", "base_model": str(folder / models[0]), "parameters": parameters}
    run(
        make_plan(make_recipe_of({**body, "models": [{"model": str(folder / models[1])}]})), tmp_path / "out", workers=0
    )
    made, base, a = (read_tensors(each) for each in (tmp_path / "out", folder / models[0], folder / models[1]))
    for number, other in ((2, base), (1, a)):
        name = f"model.layers.1.block_sparse_moe.experts.{number}.w1.weight"
        torch.testing.assert_close(made[name], other[name])


def test_a_filter_of_the_donors_names_finds_a_stack(folder: Path, tmp_path: Path) -> None:
    for number, packed in enumerate(LAYOUTS):
        models = ["mixtral-base-False", f"mixtral-a-{packed}"]
        t = [{"filter": "re:block_sparse_moe.experts.\\d", "value": 0.0}, {"value": 1.0}]
        body = {"merge_method": "slerp", "base_model": str(folder / models[0]), "parameters": {"t": t}}
        plan = make_plan(make_recipe_of({**body, "models": [{"model": str(folder / name)} for name in models]}))
        run(plan, tmp_path / str(number), workers=0)
        made, base = read_tensors(tmp_path / str(number)), read_tensors(folder / models[0])
        name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
        torch.testing.assert_close(made[name], base[name])


def test_slices_move_experts_as_they_are_stored(folder: Path, tmp_path: Path) -> None:
    made = []
    for packed in LAYOUTS:
        models = [str(folder / "mixtral-base-False"), str(folder / f"mixtral-a-{packed}")]
        slices = [
            {
                "sources": [{"model": model, "layer_range": [layer, layer + 1]} for model in models],
                "base_model": models[0],
            }
            for layer in (1, 0, 1)
        ]
        body = {"merge_method": "ties", "base_model": models[0], "slices": slices, "parameters": METHODS["ties"]}
        run(make_plan(make_recipe_of(body)), tmp_path / str(packed), workers=0)
        made.append(load_strictly(tmp_path / str(packed)))
    assert "model.layers.2.mlp.experts.down_proj" in made[0]
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("packed", LAYOUTS)
def test_a_stage_is_a_model_in_its_donors_layout(method: str, packed: bool, folder: Path, tmp_path: Path) -> None:
    base, a = str(folder / "mixtral-base-False"), str(folder / f"mixtral-a-{packed}")
    inner = {"merge_method": "ties", "base_model": base, "models": [{"model": a}], "parameters": METHODS["ties"]}
    run(make_plan(make_recipe_of({**inner, "dtype": "float32"})), tmp_path / "inner", workers=0)
    made = []
    for name, stage in (("one by one", str(tmp_path / "inner")), ("stages", "inner")):
        parameters = {"weight": 0.5, **({"density": 0.3} if method == "ties" else {})}
        models = [{"model": stage}, {"model": a}]
        documents = [{"merge_method": method, "base_model": stage, "models": models, "parameters": parameters}]
        if name == "stages":
            documents.insert(0, {"name": "inner", **inner})
        text = "---\n".join(json.dumps(document, indent=1) + "\n" for document in documents)
        run(make_plan(text), tmp_path / name, workers=0)
        made.append(load_strictly(tmp_path / name))
        assert read_tensors(tmp_path / name).keys() == read_tensors(Path(base)).keys()
    for name, tensor in made[0].items():
        torch.testing.assert_close(made[1][name], tensor, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three fine-tunes of a gpt-oss, and the same as Unsloth stores them: a linear layer an expert, [out, in]."""
    folder = tmp_path_factory.mktemp("turned")
    for name, seed in (("base", 1), ("a", 2), ("b", 3)):
        near = folder / "base-True" if seed > 1 else None
        own = save_model("gpt_oss", folder / f"{name}-True", seed, packed=True, near=near)
        shutil.copytree(own, folder / f"{name}-False")
        write_tensors(folder / f"{name}-False", separate(read_tensors(own)))
    return folder


def separate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with one linear layer an expert; what is so already stays so."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if ".experts." in f"{name}." and not last.startswith(("weight", "bias")):
            kind = "bias" if last.endswith("_bias") else "weight"
            for i, own in enumerate(tensor):
                made[f"{stem}.{last.removesuffix('_bias')}s.{i}.{kind}"] = (
                    own.T if kind == "weight" else own
                ).contiguous()
        else:
            made[
                name.replace(".router.weight", ".router.linear.weight").replace("router.bias", "router.linear.bias")
            ] = tensor
    return made


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_experts_that_are_packed_transposed_merge_with_experts_one_by_one(
    method: str, turned: Path, tmp_path: Path
) -> None:
    """Ranks of equal values may fall otherwise where the order of elements differs, so within rounding of a sum."""
    made = []
    for number, layouts in enumerate(
        ((True, True, True), (True, False, True), (False, True, False), (False, False, False))
    ):
        models = [f"{name}-{each}" for name, each in zip(("base", "a", "b"), layouts, strict=True)]
        out = merge(turned, tmp_path / str(number), method, models)
        found = read_tensors(out)
        donor = read_tensors(turned / models[0])
        assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in donor.items()}
        made.append(separate(found))
    for other in made[1:]:
        assert all(torch.allclose(tensor, other[name], rtol=1e-6, atol=1e-7) for name, tensor in made[0].items())
    if method in EXPECTED:
        base, a, b = (read_tensors(turned / f"{name}-True") for name in ("base", "a", "b"))
        name = "model.layers.1.mlp.experts.gate_up_proj"
        expected = EXPECTED[method](*(each[name].double().numpy() for each in (base, a, b)))
        np.testing.assert_allclose(read_tensors(tmp_path / "0")[name].double().numpy(), expected, rtol=0, atol=2e-6)


def take_gates_apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors as llm-compressor saves them: a module an expert, gate and up apart."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if not stem.endswith(".experts"):
            made[name] = tensor
            continue
        kind, last = ("bias" if last.endswith("_bias") else "weight"), last.removesuffix("_bias")
        parts = {"gate_proj": tensor[..., ::2], "up_proj": tensor[..., 1::2]} if last != "down_proj" else {last: tensor}
        for part, values in parts.items():
            for i, own in enumerate(values):
                made[f"{stem}.{i}.{part}.{kind}"] = (own.T if kind == "weight" else own).contiguous()
    return made


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_experts_whose_gates_lie_apart_merge_with_packed_ones(method: str, turned: Path, tmp_path: Path) -> None:
    """Theirs are in FP8, as llm-compressor quantises them; the packed ones have the same values."""
    for name in ("apart", "rounded"):
        shutil.copytree(turned / "a-True", turned / name, dirs_exist_ok=True)
    tensors, scale = read_tensors(turned / "a-True"), torch.tensor([2.0**-10])
    experts = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    rounded = {name: (tensors[name] / scale).to(torch.float8_e4m3fn) for name in experts}
    write_tensors(turned / "rounded", tensors | {name: codes.float() * scale for name, codes in rounded.items()})
    apart = take_gates_apart(tensors | rounded)
    scales = {f"{name}_scale": scale.clone() for name, codes in apart.items() if codes.dtype == torch.float8_e4m3fn}
    write_tensors(turned / "apart", apart | scales)
    config = json.loads((turned / "apart" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    (turned / "apart" / "config.json").write_text(json.dumps(config))
    found, wanted = (
        read_tensors(merge(turned, tmp_path / each, method, ["base-True", each, "b-True"]))
        for each in ("apart", "rounded")
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_packed_experts_are_not_taken_apart_for_a_donor_whose_gates_lie_apart(turned: Path, tmp_path: Path) -> None:
    shutil.copytree(turned / "a-True", turned / "a-apart", dirs_exist_ok=True)
    write_tensors(turned / "a-apart", take_gates_apart(read_tensors(turned / "a-True")))
    with pytest.raises(PlanError, match=r"gate and up apart .*gate_proj.weight\), .*b-True.* as base_model, or first"):
        merge(turned, tmp_path / "out", "linear", ["a-apart", "b-True", "base-True"])


FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three fine-tunes with projections of their own, and the same as Phi-3 fuses them."""
    folder = tmp_path_factory.mktemp("fused")
    for seed, name in enumerate(("base", "a", "b")):
        split = write_llama(
            folder / f"{name}-False", seed=seed, layers=2, dtype="float32", near=folder / "base-False" if seed else None
        )
        shutil.copytree(split, folder / f"{name}-True")
        write_tensors(folder / f"{name}-True", fuse(read_tensors(split)))
    return folder


def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with query, key and value as one matrix, and gate and up as one, where they are several."""
    made = dict(tensors)
    for layer, (whole, parts) in itertools.product(range(2), FUSED.items()):
        place = f"model.layers.{layer}.{whole.partition('.')[0]}."
        if f"{place}{parts[0]}.weight" in made:
            rows = [made.pop(f"{place}{part}.weight") for part in parts]
            made[f"model.layers.{layer}.{whole}.weight"] = torch.cat(rows)
    return made


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "model_stock"])
def test_a_merge_does_not_depend_on_which_projections_are_fused(method: str, fused: Path, tmp_path: Path) -> None:
    """Where none are, each is merged by itself, as everybody expects of such models."""
    made = []
    for number, layouts in enumerate(itertools.product(LAYOUTS, repeat=3)):
        if method != "linear" and not any(layouts[:2]):
            continue
        models = [f"{name}-{each}" for name, each in zip(("base", "a", "b"), layouts, strict=True)]
        out = merge(fused, tmp_path / str(number), method, models)
        assert read_tensors(out).keys() == read_tensors(fused / models[0]).keys()
        made.append(fuse(read_tensors(out)))
    for other in made[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in made[0].items())
    if method in EXPECTED:
        base, a, b = (fuse(read_tensors(fused / f"{name}-False")) for name in ("base", "a", "b"))
        for whole in FUSED:
            name = f"model.layers.1.{whole}.weight"
            expected = EXPECTED[method](*(each[name].double().numpy() for each in (base, a, b)))
            np.testing.assert_allclose(made[0][name].double().numpy(), expected, rtol=0, atol=2e-6)


def test_layers_that_store_one_projection_beside_layers_that_store_three_stay_so(fused: Path, tmp_path: Path) -> None:
    """As minimax, whose layers are of two kinds."""
    for name in ("base", "a", "b"):
        split, whole = (read_tensors(fused / f"{name}-{each}") for each in LAYOUTS)
        layers = {key: value for key, value in split.items() if ".layers.1." not in key}
        shutil.copytree(fused / f"{name}-False", tmp_path / f"{name}-mixed")
        write_tensors(tmp_path / f"{name}-mixed", layers | {k: v for k, v in whole.items() if ".layers.1." in k})
    expected = read_tensors(merge(fused, tmp_path / "expected", "linear", ["base-False", "a-False", "b-False"]))
    found = read_tensors(merge(tmp_path, tmp_path / "out", "linear", ["base-mixed", "a-mixed", "b-mixed"]))
    assert found.keys() == read_tensors(tmp_path / "a-mixed").keys()
    alike, wanted = fuse(found), fuse(expected)
    assert alike.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in alike.items())
