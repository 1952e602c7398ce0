"""``mergemill demo``: three small checkpoints, merged; the shortest way to see what mergemill does."""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergemill.cli import console

if TYPE_CHECKING:
    from torch import Tensor

    from mergemill.engine import events

Folder = Annotated[Path, typer.Argument(metavar="[FOLDER]", help="New or empty.")]

MARK = "# mergemill demo"
ELSEWHERE = "choose another place: mergemill demo other-folder"
VARIANTS = ("variant-a", "variant-b")
VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 4096, 128, 384, 6, 4, 2
NOISE = 0.01  # standard deviation of what a variant adds to the base

RECIPE = f"""{MARK}; paths are relative to the folder in which mergemill is started
merge_method: ties
base_model: {{base}}
models:
  - model: {{a}}
    parameters: {{{{weight: 0.6, density: 0.5}}}}
  - model: {{b}}
    parameters: {{{{weight: 0.4, density: 0.5}}}}
dtype: bfloat16
"""


def demo(folder: Folder = Path("mergemill-demo")) -> None:
    """Make three small models and merge them.

    Example: mergemill demo mergemill-demo
    """
    from mergemill.engine import load_recipe, make_plan, run, verify

    _check_folder(folder)
    _write_recipe(folder)
    tensors = write_models(folder)
    committed = run(make_plan(load_recipe(folder / "recipe.yml")), folder / "merged")
    verify(folder / "merged")
    for line in story(folder, tensors, committed):
        console.say(line)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but this demo."""
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is a file; {ELSEWHERE}")
    recipe = folder / "recipe.yml"
    ours = recipe.is_file() and recipe.read_bytes().startswith(MARK.encode())
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise typer.BadParameter(f"{folder} holds other files; {ELSEWHERE}")


def _write_recipe(folder: Path) -> None:
    """Write the recipe first: it marks the folder as ours."""
    folder.mkdir(parents=True, exist_ok=True)
    models = {key: json.dumps(str(folder / name)) for key, name in zip("ab", VARIANTS, strict=True)}
    text = RECIPE.format(base=json.dumps(str(folder / "base")), **models)
    if not (folder / "recipe.yml").exists():
        (folder / "recipe.yml").write_text(text, encoding="utf-8")


def write_models(folder: Path) -> "Mapping[str, Tensor]":
    """Write the base and its variants where they are missing; returns the base's tensors."""
    base = make_tensors(seed=0)
    _write_model(folder / "base", base)
    for seed, name in enumerate(VARIANTS, start=1):
        noise = make_tensors(seed=seed)
        _write_model(folder / name, {key: tensor + NOISE * noise[key] for key, tensor in base.items()})
    return base


def make_tensors(*, seed: int) -> "dict[str, Tensor]":
    """Return normal float32 values for every tensor of the small Llama, its head tied to the embedding."""
    import torch

    stream = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=stream) / shape[-1] ** 0.5 for name, shape in _shapes()}


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    kv_size = HIDDEN // HEADS * KV_HEADS
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        for name, size in (("q", HIDDEN), ("k", kv_size), ("v", kv_size), ("o", HIDDEN)):
            yield f"{start}.self_attn.{name}_proj.weight", (size, HIDDEN)
        for name, shape in (
            ("gate", (INTERMEDIATE, HIDDEN)),
            ("up", (INTERMEDIATE, HIDDEN)),
            ("down", (HIDDEN, INTERMEDIATE)),
        ):
            yield f"{start}.mlp.{name}_proj.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{start}.{name}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)


def _write_model(folder: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write a checkpoint in bfloat16, the weights last and at once: a stopped demo can be run again."""
    import torch
    from safetensors.torch import save_file

    weights = folder / "model.safetensors"
    if weights.exists():
        return
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(make_config(), indent=2) + "\n", encoding="utf-8")
    unfinished = weights.with_suffix(".tmp")
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(stored, unfinished, metadata={"format": "pt"})
    unfinished.replace(weights)


def make_config() -> dict[str, object]:
    """Return the small Llama's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 512,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "vocab_size": VOCABULARY,
    }


def story(folder: Path, tensors: "Mapping[str, Tensor]", committed: "events.Committed") -> Iterator[str]:
    """Yield what happened and what to try next."""
    recipe, merged = shlex.quote(str(folder / "recipe.yml")), shlex.quote(str(folder / "merged"))
    if committed.redone_parts:
        millions = sum(tensor.numel() for tensor in tensors.values()) / 1e6
        yield f"Made three Llama models of {millions:.1f} M parameters in {folder}: a base, two variants."
        yield f"Merged the variants into the base with TIES, as {recipe} says, in {committed.seconds:.1f} s."
        yield f"Verified {merged}: every byte is as it was written."
    else:
        other = shlex.quote(f"{folder}-2")
        yield f"{folder} holds the demo already, finished and verified; for a new one: mergemill demo {other}"
    yield ""
    yield "Try next:"
    yield f"  mergemill plan {recipe}"
    yield f"  mergemill inspect {merged}"
    yield f"  mergemill verify {merged} --replay 2"
    yield "  mergemill methods"
