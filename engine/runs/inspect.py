"""What a folder holds: a checkpoint, a finished merge or an unfinished one, from headers and receipts alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergemill.engine.checkpoint.checkpoint import open_checkpoint
from mergemill.engine.checkpoint.family import layer_stacks
from mergemill.engine.checkpoint.layout import TensorInfo
from mergemill.engine.errors import OutputError
from mergemill.engine.runs.outputs.output import Output, find_output
from mergemill.engine.runs.outputs.receipts import keep_planned
from mergemill.engine.runs.outputs.record import Record
from mergemill.engine.storage.store import Options, Storage, make_storage


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model folder in numbers."""

    path: str
    kind: str  # "checkpoint", or "merge" for a folder that mergemill wrote
    state: str  # of a merge: "finished", or "unfinished: 3 of 64 parts"
    digest: str  # of a merge's plan
    model_type: str  # of config.json; "" where it says none
    tensors: tuple[TensorInfo, ...]  # by name; none while a merge is unfinished
    dtypes: Mapping[str, int]  # bytes stored in each
    layers: Mapping[str, int]  # layers of each stack
    shards: int  # files

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(self.dtypes.values())


def inspect(path: str | Path, *, storage_options: Options | None = None) -> Inspection:
    """Look at the model or the merge in the folder `path`; `CheckpointError` where there is neither.

    `storage_options` are those of `abort`.
    """
    storage = make_storage(storage_options)
    output = _find_output(path, storage)
    record = output.read_record() if output else None
    if output is None or record is None:
        return _inspect_checkpoint(str(path), storage)
    if output.journal.is_committed():
        return _inspect_checkpoint(str(path), storage, record)
    done = len(keep_planned(output.journal.read(), record.parts))
    state = f"unfinished: {done} of {len(record.parts)} parts"
    return Inspection(str(path), "merge", state, record.digest, "", (), {}, {}, len(record.shards))


def _find_output(path: str | Path, storage: Storage) -> Output | None:
    """Return the output that a path or URL may be; None where no merge can be written to such."""
    try:
        return find_output(path, storage)
    except OutputError:
        return None


def _inspect_checkpoint(path: str, storage: Storage, record: Record | None = None) -> Inspection:
    """Look at a checkpoint; `record` where it is a finished merge."""
    checkpoint = open_checkpoint(path, storage=storage)
    dtypes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] += tensor.nbytes
    return Inspection(
        path=path,
        kind="merge" if record else "checkpoint",
        state="finished" if record else "",
        digest=record.digest if record else "",
        model_type=str(checkpoint.config.get("model_type", "")),
        tensors=tuple(TensorInfo(t.name, t.dtype, t.shape) for t in checkpoint.tensors.values()),
        dtypes=dict(sorted(dtypes.items())),
        layers={stack: len(layers) for stack, layers in layer_stacks(checkpoint.tensors).items()},
        shards=len({tensor.file.url for tensor in checkpoint.tensors.values()}),
    )
