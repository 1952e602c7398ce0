"""The plan's digest: sha256 over everything that the output's bytes depend on, and over the cut into parts.

Workers, memory and slabs are not in it: a merge may be resumed with others.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from mergemill.engine.plan.values import Origin, OutputTensor, Part, Shard, SmallFile

_AT_ONCE = 256  # tensors that are written down by one encoder: to make one takes as long as to write one of them


@functools.cache
def engine_version() -> str:
    """Return the version that goes into digests: another one may give other bytes."""
    return version("mergemill")


def make_digest(
    origin: Origin,
    tensors: Sequence[OutputTensor],
    shards: Sequence[Shard],
    parts: Sequence[Part],
    files: Sequence[SmallFile],
) -> str:
    """Return the digest as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False, check_circular=False).encode

    def add(value: Any) -> None:
        digest.update(f"{encode(value)}\n".encode())

    add(["mergemill", engine_version(), origin.kind, origin.value, origin.seed])
    for first in range(0, len(tensors), _AT_ONCE):
        some = tensors[first : first + _AT_ONCE]
        add([[tensor.name, tensor.dtype, tensor.expression.describe()] for tensor in some])
    for shard in shards:
        add([shard.name, hashlib.sha256(shard.header).hexdigest(), shard.size_bytes])
    for part in parts:
        add([part.shard, part.start_bytes, part.stop_bytes])
    for file in files:
        add([file.name, _content(file)])
    return digest.hexdigest()


def _content(file: SmallFile) -> Any:
    if file.data is not None:
        return hashlib.sha256(file.data).hexdigest()
    assert file.copied is not None
    return [file.copied.url, file.copied.size_bytes, file.copied.stamp]
