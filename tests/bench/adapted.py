"""What adapters cost as inputs, all programs in turn: python tests/bench/adapted.py.

Two models of the shape of 1.1B parameters (with `--layers` of its layers), each with a LoRA of rank 16 on all its
projections: merged with them, without them, and by peft's `merge_and_unload`, saved, and then mergekit (where
MERGEMILL_MERGEKIT_PYTHON names it). Then four adapters on an embedding of a billion elements (not with `--no-large`),
under the promise `--memory`. Prints medians of CPU seconds (user and system, with the programs' start), of wall
seconds, the most resident memory and the bytes that were written.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from checkpoints import LLAMAS, Llama, list_shapes, make_config, open_models, write_model
from programs import PYTHON_VARIABLE, find_script
from rounds import find_medians, measure_anew
from safetensors.torch import save_file

RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LARGE = Llama(8192, 1, 512, 256, 131072)
METHODS: Mapping[str, Mapping[str, float]] = {"linear": {"weight": 0.5}, "ties": {"weight": 0.5, "density": 0.5}}
COPY = """
import sys, torch, transformers, peft
base, adapter, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--methods", default="linear,ties")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--no-large", action="store_true", help="leave the tensor of a billion elements out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        llama = replace(LLAMAS["1.1B"], layers=options.layers)
        models = open_models(folder, dict.fromkeys(("base", "a", "b"), "BF16"), llama, "random")
        for number, name in enumerate("ab"):
            write_adapter(folder / f"lora-{name}", models[name], list_shapes(llama), PROJECTIONS, number)
        for method in options.methods.split(","):
            compare(method, make_commands(folder, models, method), options.runs, folder)
        if not options.no_large:
            compare("large", {"four adapters": make_large(folder, options.memory)}, 1, folder)


def compare(title: str, commands: Mapping[str, Sequence[str]], runs: int, folder: Path) -> None:
    """Run the commands in turn; print a row for each, and the ratios within runs of the rest to the first."""
    outs = [folder / name for name in ("out", "copy-a", "copy-b")]
    rounds = [{name: measure_anew(command, outs) for name, command in commands.items()} for _ in range(runs)]
    first = next(iter(commands))
    for name in commands:
        of = find_medians(rounds, name, first)
        ratios = f"{of.cpu_ratio:.2f}, {of.wall_ratio:.2f}"
        row = f"{of.cpu_s:.1f} | {of.wall_s:.1f} | {ratios} | {of.peak_mib} | {of.written_mib}"
        sys.stdout.write(f"| {title}: {name} | {row} |\n")
        sys.stdout.flush()


def make_commands(folder: Path, models: Mapping[str, Path], method: str) -> Mapping[str, Sequence[str]]:
    """Return what is run, by its name in the table."""
    adapted = {name: f"{models[name]}+{folder / f'lora-{name}'}" for name in "ab"}
    commands: dict[str, Sequence[str]] = {}
    for title, named in (("without", {name: str(models[name]) for name in "ab"}), ("with adapters", adapted)):
        recipe = write_recipe(folder / f"{method}-{title.replace(' ', '-')}.yml", method, models["base"], named)
        commands[title] = [find_script("mergemill"), "merge", recipe, str(folder / "out"), "--quiet"]
    if python := os.environ.get(PYTHON_VARIABLE):
        copies = {name: str(folder / f"copy-{name}") for name in "ab"}
        recipe = write_recipe(folder / f"{method}-copies.yml", method, models["base"], copies)
        steps = [
            [python, "-c", COPY, str(models[name]), str(folder / f"lora-{name}"), out] for name, out in copies.items()
        ]
        steps += [[find_script("mergekit-yaml"), recipe, str(folder / "out"), "--no-write-model-card", "--quiet"]]
        commands["peft, then mergekit"] = ["sh", "-ec", "\n".join(map(shlex.join, steps))]
    return commands


def make_large(folder: Path, memory: str) -> Sequence[str]:
    """Return the command that merges a model with each of four adapters on its tied embedding."""
    shapes = {name: shape for name, shape in list_shapes(LARGE).items() if name != "lm_head.weight"}
    config = {**make_config(LARGE), "tie_word_embeddings": True}
    write_model(folder / "large", shapes, number=0, data="sparse", config=config)
    named = {}
    for number, name in enumerate("wxyz"):
        write_adapter(folder / f"lora-{name}", folder / "large", shapes, ["embed_tokens"], number)
        named[name] = f"{folder / 'large'}+{folder / f'lora-{name}'}"
    recipe = write_recipe(folder / "large.yml", "linear", None, named)
    return [find_script("mergemill"), "merge", recipe, str(folder / "out"), "--quiet", "--memory", memory]


def write_recipe(path: Path, method: str, base: Path | None, models: Mapping[str, str]) -> str:
    """Write a recipe, and return its path."""
    entries = [{"model": model, "parameters": {"weight": METHODS[method]["weight"]}} for model in models.values()]
    recipe = {"merge_method": method, "models": entries, "dtype": "bfloat16"}
    if method != "linear":
        recipe |= {"base_model": str(base), "parameters": {"density": METHODS[method]["density"]}}
    path.write_text(json.dumps(recipe))
    return str(path)


def write_adapter(
    folder: Path, base: Path, shapes: Mapping[str, tuple[int, ...]], targets: list[str], seed: int
) -> None:
    """Write a LoRA of float32 factors, as peft saves what it trained."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn, tensors = torch.Generator().manual_seed(seed), {}
    for name, (rows, *columns) in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in targets:
            continue
        embeds = module.endswith("embed_tokens")
        sides = (rows, columns[0]) if embeds else (columns[0], rows)
        letters = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A.weight", "lora_B.weight")
        for letter, shape in zip(letters, ((RANK, sides[0]), (sides[1], RANK)), strict=True):
            tensors[f"base_model.model.{module}.{letter}"] = torch.randn(shape, generator=drawn) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    config |= {"target_modules": targets, "base_model_name_or_path": str(base), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
