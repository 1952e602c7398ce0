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
    files = {stored.file.url: stored.file for stored in tensors.values()}
    others = {url: pin for url, file in files.items() if (pin := _find_first(file, first)) != file}
    if not others:
        return tensors
    return {name: stored._replace(read_from=others.get(stored.file.url)) for name, stored in tensors.items()}


def _find_first(file: Pin, first: dict[str, Pin]) -> Pin:
    content = find_content(file)
    return file if content is None else first.setdefault(content, file)
