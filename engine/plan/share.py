"""Files that several models have alike, as a fine-tune has the shards that it did not change: they are read once."""

from collections.abc import Mapping
from dataclasses import replace

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.weights import StoredTensor
from mergemill.engine.storage.pin import Pin, find_content


def share_reads(checkpoints: Mapping[str, Checkpoint]) -> Mapping[str, Checkpoint]:
    """Return the checkpoints with each tensor read from the first file of its content, in the order of the models.

    Only that changes: in ledger and digest every tensor stays the one of its own file.
    """
    first: dict[str, Pin] = {}
    return {name: replace(each, tensors=_share(each.tensors, first)) for name, each in checkpoints.items()}


def _share(tensors: Mapping[str, StoredTensor], first: dict[str, Pin]) -> Mapping[str, StoredTensor]:
    return {name: _read_from(stored, first) for name, stored in tensors.items()}


def _read_from(stored: StoredTensor, first: dict[str, Pin]) -> StoredTensor:
    content = find_content(stored.file)
    pin = first.setdefault(content, stored.file) if content is not None else stored.file
    return stored if pin == stored.file else stored._replace(read_from=pin)
