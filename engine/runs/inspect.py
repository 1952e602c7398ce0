"""What a folder holds: a model, an adapter, a finished merge or an unfinished one, from headers and receipts alone.

Of small files, config and card are read. The family tree takes a request for each ancestor, and is looked for where it
is asked for.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergemill.engine.checkpoint.adapter import is_adapter
from mergemill.engine.checkpoint.ancestors import Lineage, find_ancestors, read_lineage
from mergemill.engine.checkpoint.checkpoint import open_checkpoint
from mergemill.engine.checkpoint.factors import find_factors
from mergemill.engine.checkpoint.family import choose_family, layer_stacks
from mergemill.engine.checkpoint.gguf.opening import GgufTensorFacts
from mergemill.engine.checkpoint.portrait import LayerGroup, VocabularySize, count_kinds, group_layers, read_size
from mergemill.engine.checkpoint.quantized import find_quantization
from mergemill.engine.checkpoint.terms import CARD_NAME, read_card
from mergemill.engine.checkpoint.unfinished import STATE_NAME
from mergemill.engine.checkpoint.weights import StoredTensor
from mergemill.engine.errors import Absent, CheckpointError, OutputError
from mergemill.engine.plan.sizes import say_count
from mergemill.engine.runs.inspect_adapter import AdapterFacts, inspect_adapter
from mergemill.engine.storage.bounds import CARD_BYTES
from mergemill.engine.storage.ranges import is_remote, join, pin_file, read_beginning
from mergemill.engine.storage.store import Options, Storage, make_storage
from mergemill.engine.storage.urls import parse_place

if TYPE_CHECKING:
    from mergemill.engine.runs.outputs.output import Output
    from mergemill.engine.runs.outputs.record import Record


@dataclass(frozen=True, slots=True)
class InspectedTensor:
    """One tensor of a model."""

    name: str
    dtype: str  # as the format calls it: "BF16", and in a GGUF file "Q4_K"
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model folder in numbers."""

    path: str
    kind: str  # "checkpoint", "adapter", or "merge" for a folder that mergemill wrote
    state: str  # of a merge: "finished", or "unfinished: 3 of 64 parts"
    digest: str  # of a merge's plan
    model_type: str  # of config.json; "" where it says none
    tensors: tuple[InspectedTensor, ...]  # by name; none while a merge is unfinished
    dtypes: Mapping[str, int]  # bytes stored in each
    layers: Mapping[str, int]  # layers of each stack
    shards: int  # files
    groups: tuple[LayerGroup, ...] = ()  # layers that are alike
    kinds: Mapping[str, int] = field(default_factory=dict)  # bytes of each kind of tensor
    vocabulary: VocabularySize | None = None
    quantization: str = ""  # how, and what tells it; empty where nothing is quantised
    adapter: AdapterFacts | None = None
    factors: tuple[str, ...] = ()  # of an adapter, that were left in a model
    card: Lineage | None = None  # what its own says
    ancestors: Mapping[str, Lineage] | None = None  # its bases, their bases and so on; None: not looked for

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(self.dtypes.values())


def inspect(path: str | Path, *, family_tree: bool = False, storage_options: Options | None = None) -> Inspection:
    """Look at the model, the adapter or the merge in the folder `path`; `CheckpointError` where there is none.

    family_tree: whether the cards of its base models, and of theirs, are looked for on the Hub. `storage_options` are
    those of `abort`.
    """
    storage = make_storage(storage_options)
    found = _inspect(path, storage)
    if not family_tree or found.card is None:
        return found
    return replace(found, ancestors=find_ancestors(found.card.bases, storage))


def _inspect(path: str | Path, storage: Storage) -> Inspection:
    output = _find_output(path, storage)
    record = output.read_record() if output else None
    if output is None or record is None:
        return _inspect_checkpoint(str(path), storage)
    if output.journal.is_committed():
        return _inspect_checkpoint(str(path), storage, record)
    from mergemill.engine.runs.outputs.receipts import keep_planned

    done = len(keep_planned(output.journal.read(), record.parts))
    state = f"unfinished: {done:,} of {say_count(len(record.parts), 'part')}"
    return Inspection(str(path), "merge", state, record.digest, "", (), {}, {}, len(record.shards))


def _find_output(path: str | Path, storage: Storage) -> "Output | None":
    """Return the output that a path or URL may be; None where no merge can be written to such.

    Where a folder or a prefix of S3 has no record, nothing is loaded that writes outputs: half a second.
    """
    if not _may_have_record(path, storage):
        return None
    from mergemill.engine.runs.outputs.output import find_output

    try:
        return find_output(path, storage)
    except OutputError:
        return None


def _may_have_record(path: str | Path, storage: Storage) -> bool:
    try:
        place = parse_place(path)
        if not place.startswith("s3://") and (is_remote(place) or not Path(place).is_dir()):
            return True
        pin_file(join(join(place, STATE_NAME), "plan.json"), storage)
    except Absent:
        return False
    except (CheckpointError, OSError):  # which is told where it is read
        return True
    return True


def _inspect_checkpoint(path: str, storage: Storage, record: "Record | None" = None) -> Inspection:
    """Look at a checkpoint; `record` where it is a finished merge."""
    try:
        checkpoint = open_checkpoint(path, storage=storage)
    except CheckpointError:
        if not is_adapter(path, storage):
            raise
        return _inspect_adapter(path, storage, record)
    family = choose_family(checkpoint.config)
    seen = {name: _see(stored, checkpoint.gguf.get(name)) for name, stored in checkpoint.tensors.items()}
    checkpoint = replace(checkpoint, tensors=seen)
    return Inspection(
        path=path,
        kind="merge" if record else "checkpoint",
        state="finished" if record else "",
        digest=record.digest if record else "",
        model_type=str(checkpoint.config.get("model_type", "")),
        **_count(checkpoint.tensors.values()),
        layers={stack: len(layers) for stack, layers in layer_stacks(checkpoint.tensors).items()},
        groups=group_layers(checkpoint, family),
        kinds=count_kinds(checkpoint.tensors.values(), family),
        vocabulary=read_size(checkpoint, family),
        quantization=find_quantization(checkpoint),
        factors=find_factors(checkpoint.tensors),
        card=read_lineage(path, read_card(checkpoint)),
    )


def _see(stored: StoredTensor, facts: GgufTensorFacts | None) -> StoredTensor:
    """Return a tensor as it is told of: of a GGUF file, what its bytes mean."""
    return stored if facts is None else stored._replace(dtype=facts.kind.name, shape=facts.shape)


def _count(tensors: Collection[StoredTensor]) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        dtypes[tensor.dtype] += tensor.nbytes
    return {
        "tensors": tuple(InspectedTensor(each.name, each.dtype, each.shape, each.nbytes) for each in tensors),
        "dtypes": dict(sorted(dtypes.items())),
        "shards": len({tensor.file.url for tensor in tensors}),
    }


def _inspect_adapter(path: str, storage: Storage, record: "Record | None") -> Inspection:
    """Look at an adapter; `record` where it was made here: extracted, resized, or joined of several."""
    found = inspect_adapter(path, storage)
    text = read_beginning(found.files[CARD_NAME], CARD_BYTES, storage) if CARD_NAME in found.files else b""
    card, base = read_lineage(path, text.decode(errors="replace")), found.facts.base
    return Inspection(
        path=path,
        kind="adapter",
        state="finished" if record else "",
        digest=record.digest if record else "",
        model_type="",
        **_count(sorted(found.tensors, key=lambda tensor: tensor.name)),
        layers={stack: len(layers) for stack, layers in layer_stacks(found.modules).items()},
        adapter=found.facts,
        card=replace(card, bases=card.bases or ((base,) if base else ())),
    )
