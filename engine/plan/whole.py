"""The whole output against the config that is written for it: would a loader find what the config makes it expect?

Each slot is right by itself; a stack of them need not be. What the config makes a loader expect is what the config's
donor stores: the same tensor outside the layers, and at each index a layer of the names and shapes that the donor has
there, or would have there as far as its own layers tell. Lists of the config that follow the layers may say otherwise.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.config import LATER_LAYERS, find_layer_count, find_null_count, layer_entries
from mergemill.engine.checkpoint.family import (
    Family,
    choose_family,
    find_ties,
    is_of_all_layers,
    is_optional,
    split_layer,
)
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.plan.stacks import Checkpoints, Stack, models_of, split_stack
from mergemill.engine.plan.values import OutputTensor

Shape = tuple[int, ...]
Layer = Mapping[str, Shape]  # what a layer is: the shapes of its tensors, by their names in it

_EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "embed_in.weight",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Output:
    shapes: Mapping[str, Shape]  # of all tensors, by name
    donor: Checkpoint
    checkpoints: Checkpoints
    offers: Mapping[str, Offers]
    family: Family
    where: str


def check_ranges(stacks: Sequence[Stack], checkpoints: Checkpoints, family: Family, *, where: str) -> None:
    """Raise `PlanError` for a slice of layers that a model stores after those that its config counts."""
    for stack in (stack for stack in stacks if not stack.whole):
        for source in (source for stretch in stack.stretches for source in stretch.sources):
            for model in models_of(source):
                count = find_layer_count(checkpoints[model].config, family, stack.name)
                if count is not None and source.layer_range[1] > count.count > 0:
                    raise PlanError(
                        f"{where}: layer_range {list(source.layer_range)} of {model}: its config counts {count.count} "
                        f"layers ({'.'.join(count.path)}); what is stored after them predicts later tokens (MTP) "
                        f"and is no layer of the stack; end at {count.count}"
                    )


def check_whole(
    tensors: Sequence[OutputTensor],
    stacks: Sequence[Stack],
    checkpoints: Checkpoints,
    offers: Mapping[str, Offers],
    donor: Checkpoint,
    family: Family,
    *,
    where: str,
) -> None:
    """Raise `PlanError` where a stack of slices is no model of the donor's config."""
    moved = [stack for stack in stacks if not stack.whole]
    if not moved:
        return
    shapes = {tensor.name: tensor.expression.shape for tensor in tensors if not is_optional(tensor.name, family)}
    output = _Output(shapes, donor, checkpoints, offers, family, where)
    for stack in moved:
        _check_shared_count(stack, stacks, output)
        _check_of_all_layers(stack, output)
        _check_stack(stack, output)
    _check_outside({stack.name for stack in stacks if stack.layered}, output)


def warn_of_numbers(stacks: Sequence[Stack], donor: Checkpoint, family: Family, *, where: str) -> list[str]:
    """Return a warning where layers move that calculate by their number, which no config can keep."""
    if all(stack.whole or _stays(stack, donor) for stack in stacks):
        return []
    return [
        f"{where}: {donor.config.get('model_type')} calculates {what} from a layer's number or the number of layers; "
        f"those that moved will calculate otherwise than in {donor.ref}, and no config can say it"
        for what, key in family.by_number
        if not key or donor.config.get(key)
    ]


def _stays(stack: Stack, donor: Checkpoint) -> bool:
    return [layer for _, layer in stack.givers(donor.ref)] == list(range(stack.layers))


def warn_of_config(
    tensors: Sequence[OutputTensor], stacks: Sequence[Stack], donor: Checkpoint, *, where: str
) -> list[str]:
    """Return a warning for layers that the output has no more, and for an embedding of which the config says less."""
    warnings = []
    parts = [part for part in (donor.config, donor.config.get("text_config")) if isinstance(part, Mapping)]
    for key in LATER_LAYERS:
        if any(part.get(key) for part in parts) and not all(stack.whole for stack in stacks):
            warnings.append(
                f"{where}: layers of {donor.ref} that predict later tokens are not in the output; {key} becomes 0"
            )
    for stack in stacks:
        if null := find_null_count(donor.config, choose_family(donor.config), stack.name):
            warnings.append(
                f"{where}: the config of {donor.ref} says {null}: null, and nowhere how many layers {stack.name!r} "
                "has; loaders will refuse the output, or make layers of their own"
            )
    rows = next((value for part in parts if type(value := part.get("vocab_size")) is int), None)
    for tensor in tensors:
        shape = tensor.expression.shape
        inner = "vision" in tensor.name or "audio" in tensor.name
        if rows is not None and not inner and tensor.name.endswith(_EMBEDDINGS) and shape[:1] != (rows,):
            warnings.append(
                f"{where}: {tensor.name} has shape {list(shape)}, but the config of {donor.ref} says vocab_size "
                f"{rows}; loaders will refuse the output, as they do {donor.ref}"
            )
    return warnings


def _check_of_all_layers(stack: Stack, output: _Output) -> None:
    """Refuse to move layers beside a tensor that holds something for each of them, such as embeddings of a layer."""
    around = stack.name.removesuffix(".layer").removesuffix(".encoder").rpartition(".")[0]
    near = [name for name in output.shapes if name.startswith(around)]
    held = next((name for name in sorted(near) if is_of_all_layers(name, output.family)), None)
    stays = _stays(stack, output.donor) and stack.layers == _count_stored(stack, output)
    if held is not None and not stays:
        raise PlanError(
            f"{output.where}: {held} holds rows or columns for each layer of {stack.name!r}, which would have to "
            f"follow the layers; only whole models of this kind can be merged"
        )


def _count_stored(stack: Stack, output: _Output) -> int:
    count = find_layer_count(output.donor.config, output.family, stack.name)
    return stack.layers if count is None else count.count


def _check_shared_count(stack: Stack, stacks: Sequence[Stack], output: _Output) -> None:
    """Refuse a stack of which the config says the number of layers by a key that is another stack's too."""
    count = find_layer_count(output.donor.config, output.family, stack.name)
    if count is None:
        return
    for other in (other for other in stacks if other.layered):
        same = find_layer_count(output.donor.config, output.family, other.name)
        if same == count and other.layers != stack.layers and other.layers == count.count:
            raise PlanError(
                f"{output.where}: {'.'.join(count.path)} in the config of {output.donor.ref} counts the layers of both "
                f"{stack.name!r} and {other.name!r}; the output would have {stack.layers} and {other.layers}"
            )


def _check_stack(stack: Stack, output: _Output) -> None:
    donor, family = output.donor, output.family
    stored = _split_layers(stack.name, {name: offer.shape for name, offer in output.offers[donor.ref].items()}, family)
    count = find_layer_count(donor.config, family, stack.name)
    givers = stack.givers(donor.ref)
    if donor.config and count is None and list(givers) != [(donor.ref, layer) for layer in sorted(stored)]:
        raise PlanError(
            f"{output.where}: the config of {donor.ref} says nowhere how many layers {stack.name!r} has, so that the "
            f"output's could not be written there; only whole models of this kind can be merged"
        )
    layers = [stored.get(i, {}) for i in range(count.count if count else len(stored))]
    if not any(layers):
        return
    kinds = _list_kinds(layers, stack.name, output)
    made = _split_layers(stack.name, output.shapes, family)
    for new, (model, old) in enumerate(givers):
        wanted = layers[new] if new < len(layers) else predict_layer(layers, new)
        layer = made.get(new, {})
        if layer == wanted:
            continue
        entries = layer_entries(output.checkpoints[model].config, family, stack.name, old)
        if kinds.get(entries) != layer:
            _refuse(new, model, old, layer, wanted, output)


def _split_layers(stack: str, shapes: Mapping[str, Shape], family: Family) -> dict[int, dict[str, Shape]]:
    layers: dict[int, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        split = split_layer(name)
        if split is not None and split[0] == stack and not is_optional(name, family):
            layers.setdefault(split[1], {})[split[2]] = shape
    return layers


def _list_kinds(layers: Sequence[Layer], stack: str, output: _Output) -> Mapping[tuple[str, ...], Layer]:
    """Return what a layer is by what the donor's config says of it; empty where that does not tell."""
    kinds: dict[tuple[str, ...], Layer] = {}
    for i, layer in enumerate(layers):
        entries = layer_entries(output.donor.config, output.family, stack, i)
        if not entries or kinds.setdefault(entries, layer) != layer:
            return {}
    return kinds


def predict_layer(layers: Sequence[Layer], index: int) -> Layer | None:
    """Return what a layer past the last would be: as the others repeat, after the first few; None where they do not.

    >>> a, b = {"a": (1,)}, {"b": (1,)}
    >>> predict_layer([a, b, b], 3), predict_layer([a, b, a, b], 5), predict_layer([a, a, b], 3)
    ({'b': (1,)}, {'b': (1,)}, None)
    """
    count = len(layers)
    for period in range(1, count // 2 + 1):
        for first in range(count - 2 * period + 1):
            if all(layers[i] == layers[i + period] for i in range(first, count - period)):
                return layers[first + (index - first) % period]
    return layers[0] if count == 1 else None


def _refuse(new: int, model: str, old: int, made: Layer, wanted: Layer | None, output: _Output) -> None:
    place = f"{output.where}: layer {new} of the output is layer {old} of {model}"
    donor = output.donor.ref
    if wanted is None:
        raise PlanError(
            f"{place}; what a layer is at that place cannot be told from those of {donor}, whose config is written and "
            f"whose layers differ"
        )
    name = next(name for name in sorted(made.keys() | wanted.keys()) if made.get(name) != wanted.get(name))
    raise PlanError(
        f"{place}, which has {_say(name, made)}; the config is that of {donor}, by which a layer has "
        f"{_say(name, wanted)} at that place. Slices must leave each kind of layer at a place of its kind"
    )


def _say(name: str, layer: Layer) -> str:
    return f"{name} of shape {list(layer[name])}" if name in layer else f"no {name}"


def _check_outside(stacks: Container[str], output: _Output) -> None:
    """Check the tensors outside the layers, each against the donor's, or against the one that it is tied to."""
    names = [name for name in output.shapes if split_stack(name, stacks) is None]
    stored = {name: offer.shape for name in names if (offer := _find_stored(name, output)) is not None}
    ties = find_ties([name for name in names if name not in stored], output.shapes, output.family)
    for name in names:
        if name in stored:
            _check_shape(name, stored[name], f"{name} of {output.donor.ref}, whose config is written,", output)
        elif name in ties:
            _check_shape(name, output.shapes[ties[name]], ties[name], output)


def _find_stored(name: str, output: _Output) -> Offer | None:
    return output.offers[output.donor.ref].get(name) if name in output.donor.tensors else None


def _check_shape(name: str, wanted: Shape, beside: str, output: _Output) -> None:
    shape = output.shapes[name]
    if shape != wanted:
        raise PlanError(
            f"{output.where}: {name} of the output has shape {list(shape)}, but {beside} has {list(wanted)}; the first "
            f"and the last slice must be of models with the same vocabulary and width as the base model"
        )
