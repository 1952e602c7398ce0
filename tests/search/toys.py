"""What the tests of searches share: two tiny models, and commands that judge in a few milliseconds."""

import json
import sys
from pathlib import Path

import torch
from models import write_llama
from safetensors.torch import load_file, save_file

PYTHON = f"{sys.executable} -S -E"  # starts in a hundredth of a second

OF_VALUES = """\
import json, sys
given = json.loads(sys.argv[1])
print("a word 12,", (given["x"] - 0.3) ** 2 + (given["y"] - 0.6) ** 2)
"""

OF_MODEL = """\
import array, json, pathlib, struct, sys
folder = pathlib.Path(sys.argv[1])
wanted, name = float(sys.argv[2]), "model.norm.weight"
for file in sorted(folder.glob("*.safetensors")):
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    if name in header:
        start, stop = header[name]["data_offsets"]
        values = array.array("f", data[8 + size + start : 8 + size + stop])
        print(abs(sum(values) / len(values) - wanted))
"""


def write_model(folder: Path, level: float) -> Path:
    """Write a tiny float32 Llama, whose last norm is `level` everywhere."""
    write_llama(folder, seed=1, layers=1, hidden=16, intermediate=16, vocab=64, dtype="float32")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.full((16,), level)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def write_toys(folder: Path) -> Path:
    """Write the models `zero`, `one`, `two`, the commands, and a recipe with the variables x and y."""
    for name, level in (("zero", 0.0), ("one", 1.0), ("two", 2.0)):
        write_model(folder / name, level)
    (folder / "values.py").write_text(OF_VALUES)
    (folder / "norm.py").write_text(OF_MODEL)
    models = [
        {"model": "./zero", "parameters": {"weight": "${x}"}},
        {"model": "./one", "parameters": {"weight": "${y}"}},
    ]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}}
    (folder / "recipe.yml").write_text(json.dumps(recipe))
    return folder


def by_values() -> str:
    """Return a command that looks at the values alone; the best are x = 0.3 and y = 0.6."""
    return f"{PYTHON} values.py {{values}}"


def by_model(level: float) -> str:
    """Return a command that says how far the merged model's last norm is from `level`."""
    return f"{PYTHON} norm.py {{model}} {level}"


def make_search(command: str, **more: object) -> dict[str, object]:
    """Return a search file of the toys."""
    return {
        "recipe": "recipe.yml",
        "variables": {"x": {"low": 0.0, "high": 1.0}, "y": {"low": 0.0, "high": 1.0}},
        "objective": {"command": command},
        **more,
    }
