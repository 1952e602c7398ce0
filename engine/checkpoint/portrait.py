"""What can be told of a model without its weights: layers and their kinds, vocabulary, ties, bytes by kind."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.config import layer_entries, says_tied
from mergemill.engine.checkpoint.family import Family, find_tie, is_vocabulary, split_layer
from mergemill.engine.checkpoint.tensor_kinds import KINDS, find_layer_kinds, find_tensor_kind, say_numbers
from mergemill.engine.checkpoint.weights import StoredTensor

_MOST_ENTRIES = 3  # of what a config says of a layer that are told


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one stack that are of one kind."""

    stack: str
    kind: str  # "attention + experts"
    said: tuple[str, ...]  # what the config says of each of them: 'layer_types: "full_attention"'
    count: int
    layers: str  # their numbers: "0-2, 4"


@dataclass(frozen=True, slots=True)
class VocabularySize:
    """A model's tokens, as its tensors and its config count them."""

    rows: Mapping[str, int]  # of each tensor that has one a token
    said: int | None  # vocab_size of the config
    tied: str  # in words: whether the head is the embedding


def group_layers(checkpoint: Checkpoint, family: Family) -> tuple[LayerGroup, ...]:
    """Return the layers of all stacks, those alike together, by stack and first layer."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[int]] = {}
    for (stack, layer), kind in sorted(find_layer_kinds(checkpoint.tensors, family).items()):
        said = layer_entries(checkpoint.config, family, stack, layer)[:_MOST_ENTRIES]
        groups.setdefault((stack, kind, said), []).append(layer)
    return tuple(
        LayerGroup(stack, kind, said, len(layers), say_numbers(layers))
        for (stack, kind, said), layers in sorted(groups.items(), key=lambda group: (group[0][0], group[1][0]))
    )


def count_kinds(tensors: Iterable[StoredTensor], family: Family) -> Mapping[str, int]:
    """Return the bytes of each kind of tensor, in the order of `KINDS`."""
    found: Counter[str] = Counter()
    for tensor in tensors:
        found[find_tensor_kind(tensor.name, family)] += tensor.nbytes
    return {kind: found[kind] for kind in KINDS if kind in found}


def read_size(checkpoint: Checkpoint, family: Family) -> VocabularySize:
    """Return what headers and config say of the vocabulary."""
    rows = {
        name: tensor.shape[0]
        for name, tensor in checkpoint.tensors.items()
        if is_vocabulary(name, family) and len(tensor.shape) == 2 and split_layer(name) is None
    }
    inner = checkpoint.config.get("text_config")
    places = (checkpoint.config, inner if isinstance(inner, Mapping) else {})
    said = next((each["vocab_size"] for each in places if type(each.get("vocab_size")) is int), None)
    return VocabularySize(rows, said, _say_tied(checkpoint, rows, family))


def _say_tied(checkpoint: Checkpoint, rows: Mapping[str, int], family: Family) -> str:
    said = says_tied(checkpoint.config)
    for name in ("lm_head.weight", *rows):
        tie = find_tie(name, checkpoint.tensors, family)
        if tie is None:
            continue
        if name not in checkpoint.tensors:
            return f"{name} is {tie}" if said is not False else f"{name} is missing, and the config says untied"
        if said:
            return f"{name} is {tie}, says the config; a copy of it is stored"
    return "untied" if said is False or len(rows) > 1 else ""
