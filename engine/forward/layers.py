"""A model run layer by layer: at no time are more than one layer's weights in memory.

Each batch goes once through the model's own code up to its layers, which note what they are called with (masks,
position embeddings) and compute nothing. Then layer after layer is filled, called with that for every batch, and freed.
The numbers are those of the whole model in memory. Of the embedding only the rows that occur are asked for.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from mergemill.engine.errors import RunError
from mergemill.engine.forward.skeleton import Skeleton, empty, fill, get_shape, make_skeleton
from mergemill.engine.tensors.lazy import Tensor, torch

Stop = Literal["inputs", "routers", "end"]
MLP = "mlp"  # a layer's, in all models of transformers that routers are made for


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """What gives a model's tensors, in float32."""

    read: Callable[[str, Tensor], None]  # one by its name, into memory of its shape
    read_rows: Callable[[str, Sequence[int]], Tensor]  # some rows of a matrix, in their order


@dataclass(frozen=True, slots=True)
class LayerSeen:
    """What there is to see of one batch at one layer."""

    layer: int  # as many as there are layers: after the last one, and the norm that follows it
    batch: int
    inputs: Tensor  # [batch, tokens, hidden]: what the layer is given
    routed: Tensor | None  # the same of its MLP, after the norm before that: what a router sees; None: not known


@dataclass(frozen=True, slots=True)
class Pass:
    """How a forward pass is made."""

    stop: Stop = "end"
    """inputs: before the last layer; routers: before the last layer's MLP; end: after the norm."""
    leafwise: bool = False
    """Whether a layer's weights are read module by module and for every batch, where a layer is too large."""
    device: str = "cpu"


def run_layers(
    config: Mapping[str, Any],
    weights: ModelWeights,
    batches: Sequence[Tensor],
    see: Callable[[LayerSeen], None],
    how: Pass,
) -> None:
    """Run token ids ``[batch, tokens]`` through a model, and call `see` for each batch at each layer, in their order.

    config: the model's ``config.json``. Raises `RunError` where transformers has no such model, or tensors do not fit.
    """
    skeleton = make_skeleton(config)
    with torch.no_grad():
        caught = list(_catch(skeleton, weights, batches, how))
        states = [each.hidden for each in caught]
        room = _Room(weights, how)
        for number, layer in enumerate(skeleton.layers):
            last = number == len(skeleton.layers) - 1
            if last and how.stop == "inputs":
                for batch, hidden in enumerate(states):
                    see(LayerSeen(number, batch, hidden, None))
                return
            stop = last and how.stop == "routers"
            prefix = f"{skeleton.layers_name}.{number}"
            with _filled(layer, prefix, room, skip=f"{MLP}." if stop else None):
                for batch, (hidden, call) in enumerate(zip(states, caught, strict=True)):
                    made, routed = _call(layer, hidden, call.calls[number], stop=stop)
                    see(LayerSeen(number, batch, hidden, routed))
                    if made is not None:
                        states[batch] = made
            if stop:
                return
        with _filled(skeleton.norm, skeleton.norm_name, room, skip=None):
            for batch, hidden in enumerate(states):
                see(LayerSeen(len(skeleton.layers), batch, skeleton.norm(hidden), None))


@dataclass(frozen=True, slots=True)
class _Caught:
    """What the layers are called with for one batch."""

    hidden: Tensor  # by the first
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]  # by each, beside that


class _Enough(Exception):
    """All layers were called: what comes after them is not wanted."""


def _catch(skeleton: Skeleton, weights: ModelWeights, batches: Sequence[Tensor], how: Pass) -> Iterator[_Caught]:
    """Yield what layers are called with for each batch; the embedding has only the rows that occur."""
    known = torch.unique(torch.cat([batch.reshape(-1) for batch in batches]))
    rows = weights.read_rows(skeleton.embedding_name, known.tolist()).to(how.device)
    skeleton.embedding._parameters["weight"] = torch.nn.Parameter(rows, requires_grad=False)
    skeleton.decoder.to(how.device) if how.device != "cpu" else None
    for batch in batches:
        hidden: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(*given: Any, hidden: list[Tensor] = hidden, calls: list[Any] = calls, **named: Any) -> Tensor:
            first: Tensor = given[0] if given else named.pop("hidden_states")
            hidden.append(first)
            calls.append((given[1:], named))
            if len(calls) == len(skeleton.layers):
                raise _Enough
            return first

        for layer in skeleton.layers:
            layer.forward = note
        try:
            skeleton.decoder(input_ids=torch.searchsorted(known, batch).to(how.device), use_cache=False)
        except _Enough:
            yield _Caught(hidden[0], calls)
        else:
            raise RunError("the model's code does not call its layers one after the other")
        finally:
            for layer in skeleton.layers:
                del layer.forward
    empty(skeleton.embedding)


def _call(
    layer: Any, hidden: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]], *, stop: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return what a layer makes of its input, and what its MLP is given; nothing of that after the MLP with `stop`."""
    routed: list[Tensor] = []

    def note(module: Any, given: tuple[Any, ...]) -> None:
        routed.append(given[0])
        if stop:
            raise _Enough

    mlp = getattr(layer, MLP, None)
    hook = mlp.register_forward_pre_hook(note) if mlp is not None else None
    try:
        made = layer(hidden, *call[0], **call[1])
    except _Enough:
        return None, routed[0]
    finally:
        if hook is not None:
            hook.remove()
    return (made[0] if isinstance(made, tuple) else made), routed[0] if routed else None


class _Room:
    """Memory for the weights of one layer, which the next one gets: freed in pieces it would be lost to others."""

    def __init__(self, weights: ModelWeights, how: Pass) -> None:
        self._weights = weights
        self.how = how
        self._flat = torch.empty(0)

    def fill(self, module: Any, prefix: str, names: Sequence[str]) -> None:
        """Read these parameters of a module, in the place of whatever was read before."""
        shapes = [tuple(get_shape(module, name)) for name in names]
        sizes = [math.prod(shape) for shape in shapes]
        if len(self._flat) < sum(sizes):
            self._flat = torch.empty(0)  # before there is another
            self._flat = torch.empty(sum(sizes))
        for name, shape, start, size in zip(names, shapes, accumulate(sizes, initial=0), sizes, strict=False):
            values = self._flat[start : start + size].view(shape)
            self._weights.read(f"{prefix}.{name}" if prefix else name, values)
            fill(module, name, values.to(self.how.device))


@contextmanager
def _filled(module: Any, prefix: str, room: _Room, *, skip: str | None) -> Iterator[None]:
    """Fill a module, but for what begins with `skip`, and free it after the block."""
    with ExitStack() as stack:
        stack.callback(empty, module)
        if not room.how.leafwise:
            names = [name for name in module.state_dict() if skip is None or not name.startswith(skip)]
            room.fill(module, prefix, names)
        else:
            for inner, leaf in module.named_modules():
                own = [name for name, _ in leaf.named_parameters(recurse=False)]
                if own:
                    path = f"{prefix}.{inner}" if inner else prefix
                    stack.enter_context(_filled_when_called(leaf, path, own, room))
        yield


@contextmanager
def _filled_when_called(leaf: Any, path: str, own: Sequence[str], room: _Room) -> Iterator[None]:
    """Fill a module that has no modules when it is called, and free it right after."""

    def enter(module: Any, given: Any) -> None:
        room.fill(module, path, own)

    def leave(module: Any, given: Any, made: Any) -> None:
        empty(module)

    before, after = leaf.register_forward_pre_hook(enter), leaf.register_forward_hook(leave)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def group_lengths(prompts: Sequence[Sequence[int]], most_tokens: int) -> list[list[int]]:
    """Return the numbers of prompts in batches of equal length, of at most so many tokens, or of one prompt.

    >>> group_lengths([[1, 2], [3], [4, 5], [6, 7]], 4)
    [[1], [0, 2], [3]]
    """
    order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), number))
    groups: list[list[int]] = []
    for number in order:
        length = len(prompts[number])
        if not groups or len(prompts[groups[-1][0]]) != length or (len(groups[-1]) + 1) * length > most_tokens:
            groups.append([])
        groups[-1].append(number)
    return groups
