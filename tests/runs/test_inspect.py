"""What is told of a model, an adapter and their ancestors, without a weight being read."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergemill.cli.inspect import list_facts
from mergemill.engine import errors, inspect

pytest.importorskip("huggingface_hub")

from hubs import Use, use_hub
from servers.hub import Hub

MIXTURE = {
    "model.embed_tokens.weight": (40, 8),
    **{f"model.layers.{i}.self_attn.q_proj.weight": (8, 8) for i in (0, 2)},
    **{f"model.layers.{i}.linear_attn.in_proj.weight": (8, 8) for i in (1, 3)},
    **{f"model.layers.{i}.input_layernorm.weight": (8,) for i in range(4)},
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    **{f"model.layers.{i}.mlp.gate.weight": (2, 8) for i in (1, 2, 3)},
    **{f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": (16, 8) for i in (1, 2, 3) for e in (0, 1)},
}
CONFIG = {
    "model_type": "mixture_of_the_tests",
    "num_hidden_layers": 4,
    "layer_types": ["full_attention", "linear_attention"] * 2,
    "tie_word_embeddings": True,
    "vocab_size": 38,
}
CARD = "---\nlicense: mit\nbase_model:\n- org/base\n- /etc\nbase_model_relation: merge\n---\n"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mixture"
    folder.mkdir()
    save_file({name: torch.zeros(shape) for name, shape in MIXTURE.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def use(hub: Hub, tmp_path: Path) -> Iterator[Use]:
    with use_hub(hub, tmp_path / "home") as start:
        yield start


def test_layers_are_told_by_what_they_are_made_of(mixture: Path) -> None:
    found = inspect(mixture)
    groups = [(group.kind, group.said, group.layers) for group in found.groups]
    full, linear = ('layer_types: "full_attention"',), ('layer_types: "linear_attention"',)
    assert groups == [
        ("attention + mlp", full, "0"),
        ("mixer + experts", linear, "1, 3"),
        ("attention + experts", full, "2"),
    ]
    assert sum(found.kinds.values()) == found.nbytes
    assert list(found.kinds) == ["embedding", "attention", "mixer", "mlp", "experts", "router", "norm"]
    assert found.kinds["experts"] == 6 * 16 * 8 * 4


def test_the_vocabulary_is_counted_by_tensors_and_config(mixture: Path) -> None:
    vocabulary = inspect(mixture).vocabulary
    assert vocabulary is not None
    assert (dict(vocabulary.rows), vocabulary.said) == ({"model.embed_tokens.weight": 40}, 38)
    assert vocabulary.tied == "lm_head.weight is model.embed_tokens.weight"


def test_quantisation_is_told_with_its_evidence(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert inspect(tmp_path).quantization == "block FP8; it stores a.weight_scale_inv"


STEM = "base_model.model.model.layers"
PAIR = {f"{STEM}.0.self_attn.q_proj.lora_A.weight": (3, 8), f"{STEM}.0.self_attn.q_proj.lora_B.weight": (8, 3)}


def write_adapter(folder: Path, more: dict[str, tuple[int, ...]] | None = None, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {name: torch.zeros(shape) for name, shape in {**PAIR, **(more or {})}.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", **said}))
    return folder


def test_an_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    found = inspect(write_adapter(tmp_path, use_rslora=True))
    assert found.kind == "adapter"
    assert found.adapter is not None
    assert (found.adapter.method, found.adapter.rank, dict(found.adapter.modules)) == ("rsLoRA", 3, {"q_proj": 1})
    assert (found.adapter.targets, found.adapter.refused) == (("q_proj",), "")
    assert found.card is not None
    assert found.card.bases == ("org/base",)
    assert (found.parameters, found.layers) == (48, {"model.layers": 1})


KINDS: dict[str, tuple[dict[str, object], str, str]] = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "PiSSA", ""),
    "DoRA without magnitudes": (
        {"use_dora": True, "use_rslora": True},
        "DoRA with rsLoRA",
        "q_proj has no magnitude, and use_dora is true in its config",
    ),
    "another rank": ({"r": 4}, "LoRA", "q_proj is of rank 3, and by its config of 4"),
    "fast SVD": ({"init_lora_weights": "pissa_niter_4"}, "PiSSA", "it belongs to a base that peft changes on loading"),
    "a spelling of PiSSA that peft does not load": ({"init_lora_weights": "PiSSA"}, "PiSSA", "'PiSSA': it belongs to"),
    "another type": ({"peft_type": "LOHA", "alpha": 2}, "LOHA", "only adapters of the type LORA can be merged"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_an_adapter_and_whether_it_is_an_input_are_told(kind: str, tmp_path: Path) -> None:
    config, method, refused = KINDS[kind]
    found = inspect(write_adapter(tmp_path, **config))
    assert found.adapter is not None
    assert found.adapter.method == method
    assert refused in found.adapter.refused
    assert bool(refused) == bool(found.adapter.refused)
    assert dict(found.adapter.modules) == {"q_proj": 1}


def test_what_an_adapters_config_leaves_out_is_told_as_it_is_merged(tmp_path: Path) -> None:
    assert (found := inspect(write_adapter(tmp_path / "a", r=None, lora_alpha=None)).adapter) is not None
    assert (found.rank, found.alpha) == (8, 8.0)
    assert (found := inspect(write_adapter(tmp_path / "b", lora_alpha=float("nan"))).adapter) is not None
    assert (found.alpha, "lora_alpha must be a number, not NaN" in found.refused) == (0.0, True)


def test_what_an_adapter_holds_beside_factors_is_told_by_the_command(tmp_path: Path) -> None:
    more: dict[str, tuple[int, ...]] = {
        f"{STEM}.1.mlp.up_proj.lora_A.weight": (5, 8),
        f"{STEM}.1.mlp.up_proj.lora_B.weight": (8, 5),
        "base_model.model.model.embed_tokens.lora_embedding_A": (3, 20),
        "base_model.model.model.embed_tokens.lora_embedding_B": (8, 3),
        "base_model.model.model.norm.weight": (8,),
    }
    folder = write_adapter(tmp_path, more, rank_pattern={"up_proj": 5}, target_parameters=["mlp.experts.down_proj"])
    told = dict(list_facts(inspect(folder)))
    assert told["adapter"] == "LoRA of rank 3 (from 3 to 5), alpha 6"
    assert told["targets"] == "q_proj, mlp.experts.down_proj"
    assert told["changes"] == "1 embed_tokens, 1 q_proj, 1 up_proj"
    assert (told["tokens"], told["replaces"]) == ("model.embed_tokens", "model.norm.weight")
    assert told["base model"] == "org/base"
    assert told["as an input"].startswith("BASE+ADAPTER is taken")


def test_experts_one_by_one_are_told_as_one(tmp_path: Path) -> None:
    paths = [f"layers.{i}.experts.{k}.{last}" for i in range(2) for k in range(4) for last in ("up_proj", "down_proj")]
    folder = write_adapter(tmp_path, target_modules=["q_proj", *paths, "layers.1.norm"])
    told = dict(list_facts(inspect(folder)))
    experts = "layers.0-1.experts.0-3.up_proj (8), layers.0-1.experts.0-3.down_proj (8)"
    assert told["targets"] == f"q_proj, {experts}, layers.1.norm"


def test_a_folder_of_neither_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointError, match="has no file of weights"):
        inspect(tmp_path)


def test_the_family_tree_follows_cards_on_the_hub(hub: Hub, use: Use, mixture: Path) -> None:
    hub.add_repo("org/base", {"README.md": b"---\nlicense: other\nlicense_name: llama3\nbase_model: org/root\n---\n"})
    hub.add_repo("org/root", {"README.md": b"---\nlicense: apache-2.0\nbase_model: [org/base, org/gone]\n---\n"})
    found = inspect(mixture, family_tree=True).ancestors
    assert found is not None
    assert [(each.name, each.license) for each in found.values()] == [
        ("org/base", "llama3"),
        ("/etc", ""),
        ("org/root", "apache-2.0"),
        ("org/gone", ""),
    ]
    assert found["/etc"].unread == "is no name of a model on the Hub"
    assert "org/gone" in found["org/gone"].unread


def test_no_card_is_looked_for_unasked(hub: Hub, use: Use, mixture: Path) -> None:
    assert inspect(mixture).ancestors is None
    assert sum(hub.journal.count().values()) == 0


def test_a_model_is_looked_at_without_what_writes_outputs(family: Path) -> None:
    """Which takes as long to load as all else."""
    asked = f"import sys; from mergemill.engine import inspect; assert inspect({str(family / 'A')!r}).tensors"
    code = f"{asked}; assert 'mergemill.engine.runs.outputs.output' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
