"""What tools that build models cost beside the floor and beside mergekit's, in turn: python tests/bench/tools.py.

A mixture of four experts with `cheap_embed` and with `random` gates beside plain reading and writing of as many bytes;
an adapter of rank 32 beside mergekit-extract-lora; three stages beside the floor of mergekit-multi, which reads and
writes each stage. Models have the shapes of 1.1B parameters, with `--layers` of its layers. Prints medians, in CPU
seconds (user and system, with the program's start) and wall seconds.
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

from checkpoints import LLAMAS, count_bytes, list_shapes, open_models
from programs import PYTHON_VARIABLE, find_script, list_weights
from rounds import find_medians, measure_anew

RANK = 32
EXPERTS = ("a", "b", "c", "base")
NAMES = ("base", "a", "b", "c")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", default="", help="programs whose names begin so")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        llama = replace(LLAMAS["1.1B"], layers=options.layers)
        models = open_models(folder, dict.fromkeys(NAMES, "BF16"), llama, "random")
        _write_tokenizers(models)
        made_of = make_commands(folder, models, count_bytes(list_shapes(llama)))
        commands = {name: command for name, command in made_of.items() if name.startswith(options.only)}
        outs = [folder / "out"]
        rounds = [
            {name: measure_anew(command, outs) for name, command in commands.items()} for _ in range(options.runs)
        ]
    for name in commands:
        of = find_medians(rounds, name, name)
        sys.stdout.write(f"| {name} | {of.cpu_s:.1f} | {of.wall_s:.1f} | {of.peak_mib} |\n")


def make_commands(folder: Path, models: Mapping[str, Path], model_bytes: int) -> Mapping[str, Sequence[str]]:
    """Return what is run, by its name in the table."""
    out, mill = str(folder / "out"), find_script("mergemill")
    mlp_bytes = _count_mlp_bytes(models["base"])
    mixed_bytes = model_bytes + 3 * mlp_bytes
    files = [str(file) for name in NAMES for file in list_weights(models[name])]
    floor = [sys.executable, "-S", "-E", str(Path(__file__).with_name("floor.py")), "after", out]
    commands: dict[str, Sequence[str]] = {"mixture: floor": [*floor, str(mixed_bytes), *files]}
    for mode in ("random", "cheap_embed"):
        experts = [{"source_model": str(models[name]), "positive_prompts": [f"{name} {name}"]} for name in EXPERTS]
        recipe = _write(
            folder / f"{mode}.yml", {"base_model": str(models["base"]), "gate_mode": mode, "experts": experts}
        )
        commands[f"mixture: mergemill, {mode}"] = [mill, "merge", recipe, out, "--quiet"]
    both = [str(models[name]) for name in ("a", "base")]
    commands["extract-lora: mergemill"] = [mill, "extract-lora", *both, out, "--max-rank", str(RANK), "--quiet"]
    if python := os.environ.get(PYTHON_VARIABLE):
        theirs = str(Path(python).with_name("mergekit-extract-lora"))
        given = ["--model", both[0], "--base-model", both[1], "--out-path", out, "--max-rank", str(RANK)]
        done = f"{shlex.join([theirs, *given])} || test -f {shlex.quote(out)}/adapter_model.safetensors"
        commands["extract-lora: mergekit"] = ["sh", "-c", done]  # offline it fails at its card, once all is written
    commands["stages: mergemill"] = [mill, "merge", _write(folder / "stages.yml", _make_stages(models)), out, "--quiet"]
    two = [str(file) for name in ("a", "b") for file in list_weights(models[name])]
    commands["stages: floor of three merges"] = [*floor, str(3 * model_bytes), *two, *two, *two]
    return commands


def _make_stages(models: Mapping[str, Path]) -> dict[str, object]:
    def average(*names: str, **more: str) -> dict[str, object]:
        entries = [{"model": str(models.get(name, name)), "parameters": {"weight": 0.5}} for name in names]
        return {"merge_method": "linear", "models": entries, **more}

    stages = [average("a", "b", name="one"), average("one", "c", name="two")]
    return {**average("two", "base"), "stages": stages}


def _count_mlp_bytes(model: Path) -> int:
    (file,) = list_weights(model)
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    places = [entry["data_offsets"] for name, entry in header.items() if ".mlp." in name]
    return sum(stop - start for start, stop in places)


def _write(path: Path, recipe: object) -> str:
    path.write_text(json.dumps(recipe))
    return str(path)


def _write_tokenizers(models: Mapping[str, Path]) -> None:
    tokens = {token: number for number, token in enumerate(("<unk>", *"abcdefghijklmnopqrstuvwxyz", "Ġ"))}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": tokens, "merges": [], "unk_token": "<unk>", "byte_fallback": False}
    written = {"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model}
    for folder in models.values():
        (folder / "tokenizer.json").write_text(json.dumps(written))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


if __name__ == "__main__":
    main()
