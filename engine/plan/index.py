"""The index of an output: which shard holds which tensor."""

import json
from collections.abc import Mapping, Sequence

from mergemill.engine.plan.values import OutputTensor, Shard
from mergemill.engine.tensors.dtypes import item_bytes


def make_index(shards: Sequence[Shard], tensors: Sequence[OutputTensor]) -> str:
    """Return ``model.safetensors.index.json`` as transformers writes it, in the folder of the shards."""
    weight_map = {name: shard.name.rpartition("/")[2] for shard in shards for name in shard.tensors}
    total = parameters = 0
    for tensor in tensors:
        size = tensor.expression.size
        total += size * item_bytes(tensor.dtype)
        parameters += sum([info.elements for info in tensor.stored_as]) if tensor.stored_as else size
    metadata = {"total_parameters": parameters, "total_size": total}
    return f'{{\n  "metadata": {_indent(metadata)},\n  "weight_map": {_indent(weight_map)}\n}}\n'


def _indent(flat: Mapping[str, str | int]) -> str:
    """Return a map without maps in it as ``json.dumps`` with an indent does, which is slow: it is written in Python."""
    text = json.dumps(flat, sort_keys=True, ensure_ascii=False, separators=(",\n    ", ": "))
    return f"{{\n    {text[1:-1]}\n  }}" if flat else text
