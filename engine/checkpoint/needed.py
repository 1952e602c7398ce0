"""Files that a model cannot be loaded without, beside its weights and tokenizer: its own code, and its modules.

Code is what ``auto_map`` names: transformers imports those modules, and what they import from beside them, where its
user trusts them. Here code is bytes: copied, and never looked into or run. Modules are those of sentence-transformers:
``modules.json`` names folders such as ``1_Pooling``. A model's own way to generate is code in ``custom_generate/``.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergemill.engine.checkpoint.checkpoint import MODULES_NAME, Checkpoint, read_file, read_modules
from mergemill.engine.storage.ranges import list_files

GENERATION_FOLDER = "custom_generate"
_MAPPING_FILES = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_CLASS = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\.[A-Za-z_][A-Za-z0-9_]*")  # org/name--module.Class lies elsewhere


@dataclass(frozen=True, slots=True)
class Needed:
    """What a model's configs and its ``modules.json`` name, by names of files."""

    present: tuple[str, ...]  # the code and the modules that an output copies
    missing: tuple[str, ...]  # what is named and is not in the model's folder


def add_generation(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the files of its own way to generate, which transformers loads and runs if it may.

    https://huggingface.co/docs/transformers/generation_strategies#custom-generation-methods. They are looked for in the
    donor alone, since in remote storage that is one request more.
    """
    if not checkpoint.files:
        return checkpoint
    found = list_files(checkpoint.path, GENERATION_FOLDER, checkpoint.storage) or {}
    beneath = {name: pin for name, pin in found.items() if name.startswith(f"{GENERATION_FOLDER}/")}
    return replace(checkpoint, pins=dict(sorted({**checkpoint.pins, **beneath}.items()))) if beneath else checkpoint


def find_needed(checkpoint: Checkpoint) -> Needed:
    """Return what a model cannot be loaded without; its configs are read once."""
    named, folders = dict.fromkeys(_iter_code(checkpoint)), _list_modules(checkpoint)
    held = {name.rpartition("/")[0] for name in checkpoint.files}
    code = [name for name in checkpoint.files if name.endswith(".py") and "/" not in name]
    generation = [name for name in checkpoint.files if name.startswith(f"{GENERATION_FOLDER}/")]
    modules = [name for name in checkpoint.files if name == MODULES_NAME or name.rpartition("/")[0] in folders]
    lost = [f"{folder}/config.json" for folder in folders if folder not in held]
    return Needed(
        present=(*(code if named else ()), *(modules if folders else ()), *generation),
        missing=(*(name for name in named if name not in checkpoint.files), *lost),
    )


def _list_modules(checkpoint: Checkpoint) -> tuple[str, ...]:
    return read_modules(checkpoint.pins[MODULES_NAME], checkpoint.storage) if MODULES_NAME in checkpoint.pins else ()


def _iter_code(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the file names of the modules that are named in any of the configs."""
    for name in _MAPPING_FILES:
        found = checkpoint.config if name == "config.json" else _read_json(checkpoint, name)
        yield from (f"{module}.py" for module in _iter_modules(found.get("auto_map")))


def _iter_modules(auto_map: Any) -> Iterator[str]:
    if isinstance(auto_map, Mapping):
        auto_map = list(auto_map.values())
    for value in auto_map if isinstance(auto_map, list) else [auto_map]:
        if isinstance(value, list):
            yield from _iter_modules(value)
        elif isinstance(value, str) and (found := _CLASS.fullmatch(value)):
            yield found[1]


def _read_json(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    """Return a config beside the model's own; empty for one that is none, which is copied as it is."""
    try:
        found = json.loads(read_file(checkpoint, name)) if name in checkpoint.files else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}
