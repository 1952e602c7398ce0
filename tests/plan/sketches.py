"""Checkpoints that are headers only, their data a hole in a sparse file, and plans of them as plain data."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from models import llama_shapes, make_config, write_json, write_tokenizer

from mergemill.engine import make_plan
from mergemill.engine.checkpoint import TensorInfo, make_header, open_checkpoint
from mergemill.engine.plan.values import OutputTensor, Plan
from mergemill.engine.recipe import Recipe, parse_recipe
from mergemill.engine.tensors.expressions import Expression, Stored
from mergemill.engine.tensors.merged import Merged

Sketch = Mapping[str, tuple[str, Sequence[int]]]  # name -> dtype and shape
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def llama(
    *, layers: int = 3, hidden: int = 8, vocab: int = 16, tied: bool = False, dtype: str = "BF16"
) -> dict[str, tuple[str, Sequence[int]]]:
    """Return the tensors of a small Llama."""
    shapes = llama_shapes(
        layers=layers, hidden=hidden, kv_size=hidden // 2, intermediate=2 * hidden, vocab=vocab, tied=tied
    )
    return {name: (dtype, shape) for name, shape in shapes.items()}


def config(*, layers: int = 3, tied: bool = False, dtype: str = "bfloat16", **more: Any) -> dict[str, Any]:
    """Return the config of `llama` with `more` keys."""
    sizes = {"hidden": 8, "heads": 2, "kv_heads": 1, "intermediate": 16, "vocab": 16}
    return make_config(layers=layers, tied=tied, dtype=dtype, **sizes) | more


def write_sketch(
    folder: Path,
    tensors: Sketch,
    *,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    tokenizer: bool = False,
) -> Path:
    """Write a checkpoint with `tensors`, whose values take no disk, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = [TensorInfo(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    weight_map: dict[str, str] = {}
    for i in range(shards):
        held = infos[i * len(infos) // shards : (i + 1) * len(infos) // shards]
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_hole(folder / file, held)
        weight_map |= dict.fromkeys((info.name for info in held), file)
    if shards > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    if config is not None:
        write_json(folder / "config.json", config)
    if tokenizer:
        write_tokenizer(folder, size=16)
    return folder


def write_hole(path: Path, infos: Sequence[TensorInfo]) -> None:
    """Write a safetensors file whose data is a hole."""
    header = make_header(infos, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(info.nbytes for info in infos))


def make_recipe(value: Mapping[str, Any]) -> Recipe:
    """Return the recipe that `value` says; its name is recipe.yml."""
    return parse_recipe(json.dumps(value))


def plan_of(value: Mapping[str, Any], **options: Any) -> Plan:
    """Return the plan of the recipe that `value` says."""
    return make_plan(make_recipe(value), **options)


def list_tensors(plan: Plan) -> dict[str, OutputTensor]:
    """Return the output tensors that have elements, by name."""
    return {piece.tensor.name: piece.tensor for part in plan.parts for piece in part.pieces}


def find_settings(plan: Plan, tensor: str) -> Mapping[str, Any]:
    """Return the settings with which one tensor is merged."""
    expression = list_tensors(plan)[tensor].expression
    assert isinstance(expression, Merged)
    return expression.settings


def name_inputs(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Return for each output tensor its inputs as ``model:tensor``, the base first."""
    names = {
        (stored.file.url, stored.offset_bytes): f"{source.model}:{stored.name}"
        for source in plan.sources
        if not source.is_stage
        for stored in open_checkpoint(source.path).tensors.values()
        if stored.nbytes
    }
    return {
        name: tuple(names[stored.pin.url, stored.offset_bytes] for stored in list_stored(tensor))
        for name, tensor in list_tensors(plan).items()
    }


def list_stored(tensor: OutputTensor) -> tuple[Stored, ...]:
    """Return the stored tensors that an output tensor is made of, in their order; a delta_base after its model."""
    return tuple(_iter_stored(tensor.expression))


def _iter_stored(expression: Expression) -> Iterator[Stored]:
    if isinstance(expression, Stored):
        yield expression
    for each in expression.inputs:
        yield from _iter_stored(each)


def read_file(plan: Plan, name: str) -> bytes:
    """Return a small file as the plan will write it."""
    (file,) = [file for file in plan.files if file.name == name]
    if file.data is not None:
        return file.data
    assert file.copied is not None
    return Path(file.copied.url).read_bytes()


def read_json(plan: Plan, name: str) -> dict[str, Any]:
    """Return a small file that holds a JSON object."""
    found = json.loads(read_file(plan, name))
    assert isinstance(found, dict)
    return found


def parse_header(header: bytes) -> dict[str, Any]:
    """Return a shard's header without its metadata, read by the format's own words alone."""
    found = json.loads(header[8:])
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    found.pop("__metadata__")
    assert isinstance(found, dict)
    return found


def count_bytes(entry: Mapping[str, Any]) -> int:
    """Return what a header's entry says that its data takes."""
    begin, end = entry["data_offsets"]
    return int(end - begin)


def count_elements(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape."""
    return math.prod(shape)
