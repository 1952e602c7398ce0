"""What tells that a folder is half a model: a merge's notes beside it, names of shards, a count of layers, pointers.

A merge writes ``.mergemill/plan.json`` first, and notes at the end that it is committed: in a folder by the last line
of its journal, in object storage by an object; a commit to the Hub brings its journal along.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mergemill.engine.checkpoint.config import find_layer_count
from mergemill.engine.checkpoint.family import choose_family
from mergemill.engine.errors import CheckpointError
from mergemill.engine.storage.ranges import Pin, join, pin_file, read_into
from mergemill.engine.storage.store import Storage

STATE_NAME = ".mergemill"
COMMITTED = b'{"committed": true}'  # the last line of a journal
_WHOLE_NAMES = ("committed", "journal.json")  # of object storage, and of the Hub
_SHARD = re.compile(r"(?P<model>.*)-(?P<number>\d{5,9})-of-(?P<count>\d{5,9})(?P<suffix>\.safetensors|\.bin)")
_POINTER_BYTES = 1024
_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers")  # that count the layers which are stored
_SHARING_KEYS = ("num_hidden_groups", "num_hidden_group")  # layers that are used several times, as ALBERT's


def check_pointer(pin: Pin, where: str, storage: Storage) -> None:
    """Raise `CheckpointError` for a file that Git LFS keeps elsewhere, and of which only the pointer is here.

    Format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md; a pointer has less than 1,024 bytes.
    """
    if pin.size_bytes >= _POINTER_BYTES:
        return
    text = bytearray(pin.size_bytes)
    read_into(pin, 0, memoryview(text), storage)
    if text.startswith(b"version https://git-lfs.github.com/"):
        raise CheckpointError(
            f"{where}: is a pointer of Git LFS, not the weights themselves; run 'git lfs pull' in its folder"
        )


def check_committed(place: str, ref: str, storage: Storage) -> None:
    """Raise `CheckpointError` for a folder or URL where a merge is unfinished."""
    state = join(place, STATE_NAME)
    if _find(join(state, "plan.json"), storage) is None or any(
        _find(join(state, name), storage) for name in _WHOLE_NAMES
    ):
        return
    journal = _find(join(state, "journal.jsonl"), storage)
    if journal is None or not _ends_committed(journal, storage):
        ours = not place.startswith(("http://", "https://", "hf://"))  # what we can only read is another's to end
        way = f"run the same merge again to finish it, or give it up with: mergemill abort {ref}"
        raise CheckpointError(
            f"{ref}: holds a merge that is not finished; {way if ours else 'whoever makes it must finish it first'}"
        )


def check_names(names: Collection[str], where: str) -> None:
    """Raise `CheckpointError` where shards are missing of those that the names say there are.

    For files that no index names: an index says itself which shards make the model.

    >>> check_names(["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "a")
    >>> check_names(["model-00001-of-00002.safetensors"], "a")
    Traceback (most recent call last):
    mergemill.engine.errors.CheckpointError: a: has 'model-00001-of-00002.safetensors', 1 of 2 shards, and not \
the others; is the download complete?
    """
    shards = [found for name in sorted(names) if (found := _SHARD.fullmatch(name))]
    kin = Counter((shard["model"], shard["count"]) for shard in shards)
    for shard in shards:
        there = kin[shard["model"], shard["count"]]
        if there < int(shard["count"]):
            raise CheckpointError(
                f"{where}: has {shard[0]!r}, {there} of {int(shard['count'])} shards, and not the others; is the "
                "download complete?"
            )


def check_layers(stacks: Mapping[str, Sequence[int]], config: Mapping[str, Any], where: str) -> None:
    """Raise `CheckpointError` where a stack has fewer layers than the config says.

    Only where that is certain: the model has one stack, the config counts it by a plain key of its own, and no key says
    that layers are shared. More layers than are counted are those that predict later tokens. stacks: the layers of
    each, ascending.
    """
    if len(stacks) != 1 or any(key in config for key in _SHARING_KEYS):
        return
    ((stack, layers),) = stacks.items()
    counted = find_layer_count(config, choose_family(config), stack)
    if counted is None or counted.path[-1] not in _COUNT_KEYS:
        return
    if layers[-1] + 1 < counted.count:
        raise CheckpointError(
            f"{where}: has {layers[-1] + 1} layers in {stack!r}, and config.json says {counted.count}; is the download "
            f"complete? If so, mend its {'.'.join(counted.path)}"
        )


def _find(url: str, storage: Storage) -> Pin | None:
    """Return the pin of a file; None where it cannot be seen: some servers deny what begins with a dot."""
    try:
        return pin_file(url, storage)
    except CheckpointError:
        return None


def _ends_committed(journal: Pin, storage: Storage) -> bool:
    tail = bytearray(min(journal.size_bytes, len(COMMITTED) + 2))
    read_into(journal, journal.size_bytes - len(tail), memoryview(tail), storage)
    return bytes(tail).strip() == COMMITTED
