"""The index of an output: which shard holds which tensor."""

import json
from collections.abc import Sequence

from mergemill.engine.plan.values import OutputTensor, Shard
from mergemill.engine.tensors.dtypes import item_bytes


def make_index(shards: Sequence[Shard], tensors: Sequence[OutputTensor]) -> str:
    """Return ``model.safetensors.index.json`` as transformers writes it, in the folder of the shards."""
    weight_map = {name: shard.name.rpartition("/")[2] for shard in shards for name in shard.tensors}
    total = sum(tensor.expression.size * item_bytes(tensor.dtype) for tensor in tensors)
    parameters = sum(info.elements for tensor in tensors for info in tensor.infos)
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
