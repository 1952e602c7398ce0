"""The gates that a task computes from prompts before the parts that need them, known from headers and prompts alone.

Which tensors are read, what that takes of a worker, and the digest of all that gates hang on. What runs is
`runs/tasks/gates.py`. Decided 2026-11-29: values travel with the tasks that write routers, as statistics do, since they
are small (8 experts of 32 layers, 4,096 wide: 4 MiB) and the output's own storage may not be read before it is whole.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergemill.engine.checkpoint.checkpoint import Checkpoint, read_file
from mergemill.engine.errors import PlanError
from mergemill.engine.forward.gates import BATCH_TOKENS, GatePrompts
from mergemill.engine.forward.installed import check_installed
from mergemill.engine.forward.layers import group_lengths
from mergemill.engine.forward.tokens import tokenize
from mergemill.engine.offers.offer import Offers
from mergemill.engine.plan.experts import LAYERS, Assembly
from mergemill.engine.plan.memory import make_piece
from mergemill.engine.plan.sizes import format_size, say_enough
from mergemill.engine.plan.values import OutputTensor, Piece
from mergemill.engine.recipe import Expert
from mergemill.engine.storage.ranges import Pin
from mergemill.engine.tensors.slabs import Span

EMBEDDING = "model.embed_tokens.weight"
_TOKENIZER = "tokenizer.json"
_BOS_FILES = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, slots=True)
class GateJob:
    """What gates are computed from."""

    asked: GatePrompts
    chosen: int  # experts that work on a token, before MLPs are cut
    config_text: bytes  # of the base model
    tensors: Mapping[str, Piece]  # that the pass reads, each whole, as float32
    layers: int
    hidden: int
    made_of: str  # the digest of all that
    arena_bytes: int  # for reading
    layer_bytes: int  # beside that, with a layer's weights in memory
    leaf_bytes: int  # beside that, with one matrix of a layer in memory

    @property
    def pins(self) -> Iterator[Pin]:
        """Every file that is read."""
        for piece in self.tensors.values():
            for read in (*piece.tensor.expression.reads(Span(0, 0)), *piece.tensor.expression.holds(Span(0, 0))):
                yield read.pin

    @property
    def read_bytes(self) -> int:
        """What is read: of embeddings, few rows, which are not counted."""
        sizes = (_count_stored(piece) for name, piece in self.tensors.items() if name != EMBEDDING)
        return sum(sizes)

    def check_memory(self, memory_bytes: int) -> None:
        """Raise `PlanError` with the number that would do where a worker has too little."""
        needed = self.arena_bytes + self.leaf_bytes
        if needed > memory_bytes:
            raise PlanError(
                f"--memory {format_size(memory_bytes)} is too little: the gates of {len(self.asked.prompts)} prompts "
                f"need {needed} bytes of one worker: --memory {say_enough(needed)}; fewer or shorter prompts need less"
            )

    def describe(self) -> dict[str, Any]:
        """Return its numbers, as JSON."""
        return {
            "mode": self.asked.mode,
            "prompts": len(self.asked.prompts),
            "tokens": sum(map(len, self.asked.prompts)),
            "read_bytes": self.read_bytes,
            "worker_bytes": self.arena_bytes + self.layer_bytes,
            "least_bytes": self.arena_bytes + self.leaf_bytes,
        }


def _count_stored(piece: Piece) -> int:
    return sum(read.size_bytes for read in piece.tensor.expression.reads(piece.span))


def name_gate(layer: int, *, shared: bool = False) -> str:
    """Return what a file of gates calls the rows of a layer."""
    return f"layers.{layer}.{'shared_gate' if shared else 'gate'}"


def make_gate_job(making: Assembly, base: Checkpoint, layers: int, hidden: int) -> GateJob:
    """Return what the gates of a mixture are computed from; `PlanError` for prompts that cannot be."""
    asked = _read_prompts(making, base)
    check_installed(forward=asked.mode != "cheap_embed", where=making.where)
    offers = making.offers[str(making.mixture.base_model)]
    names = [EMBEDDING, *(() if asked.mode == "cheap_embed" else _list_layers(offers, layers, asked.mode))]
    tensors = {name: _make_piece(name, offers) for name in names}
    return GateJob(
        asked=asked,
        chosen=making.mixture.experts_per_token,
        config_text=base.config_text,
        tensors=tensors,
        layers=layers,
        hidden=hidden,
        made_of=_digest(asked, base, tensors),
        arena_bytes=max(piece.projected.slab_bytes for piece in tensors.values()),
        layer_bytes=_count_bytes(asked, base, tensors, hidden, leafwise=False),
        leaf_bytes=_count_bytes(asked, base, tensors, hidden, leafwise=True),
    )


def _read_prompts(making: Assembly, base: Checkpoint) -> GatePrompts:
    mixture, where = making.mixture, making.where
    shared = making.shared if making.architecture.shared_gate else ()
    rows: Sequence[Expert] = (*making.routed, *shared)
    for expert in shared:
        if not expert.positive_prompts:
            raise PlanError(f"{where}: the shared expert needs positive_prompts too, of which its gate is made")
    pairs = {(expert.positive_prompts, expert.negative_prompts) for expert in making.routed}
    if len(pairs) == 1 and len(making.routed) > 1:
        raise PlanError(
            f"{where}: the prompts are equal for all experts, and so would be the rows of the router; give each "
            f"prompts of its own, or take gate_mode random"
        )
    texts = list(dict.fromkeys(text for each in rows for text in (*each.positive_prompts, *each.negative_prompts)))
    if _TOKENIZER not in base.files:
        raise PlanError(f"{where}: {base.ref} has no {_TOKENIZER}, by which prompts become tokens; make one")
    prompts = tokenize(read_file(base, _TOKENIZER), _find_bos(base), texts, where=where)
    most = base.config.get("max_position_embeddings")
    for text, tokens in zip(texts, prompts, strict=True):
        if type(most) is int and len(tokens) > most and mixture.gate_mode != "cheap_embed":
            raise PlanError(
                f"{where}: the prompt {text[:60]!r} has {len(tokens)} tokens, and {base.ref} takes {most} "
                f"(max_position_embeddings)"
            )
    numbers = {text: number for number, text in enumerate(texts)}
    return GatePrompts(
        mode=mixture.gate_mode,  # type: ignore[arg-type]  # the modes without prompts are not asked for here
        contrast=bool(mixture.contrast),
        prompts=tuple(prompts),
        positive=tuple(tuple(numbers[text] for text in each.positive_prompts) for each in rows),
        negative=tuple(tuple(numbers[text] for text in each.negative_prompts) for each in rows),
        routed=len(making.routed),
    )


def _find_bos(base: Checkpoint) -> str:
    """Return the text of the token that texts begin with; empty where the tokenizer has none."""
    for name in _BOS_FILES:
        try:
            found = json.loads(read_file(base, name)) if name in base.files else {}
        except (ValueError, RecursionError):
            continue
        token = found.get("bos_token") if isinstance(found, dict) else None
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            return text
    return ""


def _list_layers(offers: Offers, layers: int, mode: str) -> Iterator[str]:
    """Yield the tensors of the layers that are run; of the last one none, or all before its MLP."""
    for name in offers:
        if not name.startswith(f"{LAYERS}."):
            continue
        layer, _, rest = name.removeprefix(f"{LAYERS}.").partition(".")
        is_run = int(layer) < layers - 1 or (mode == "router_input" and not rest.startswith("mlp."))
        if is_run and "inv_freq" not in rest:
            yield name


def _make_piece(name: str, offers: Offers) -> Piece:
    expression = offers[name].expression
    return make_piece(OutputTensor(name, "F32", expression), Span(0, expression.size), 0, whole=True)


def _digest(asked: GatePrompts, base: Checkpoint, tensors: Mapping[str, Piece]) -> str:
    said = {
        "asked": [asked.mode, asked.contrast, asked.prompts, asked.positive, asked.negative, asked.routed],
        "config": hashlib.sha256(base.config_text).hexdigest(),
        "tensors": {name: piece.tensor.expression.describe() for name, piece in tensors.items()},
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _count_bytes(
    asked: GatePrompts, base: Checkpoint, tensors: Mapping[str, Piece], hidden: int, *, leafwise: bool
) -> int:
    """Return an upper bound of what a pass takes beside the reading: weights, states, and what a batch needs."""
    tokens = {token for prompt in asked.prompts for token in prompt}
    embedding = 4 * len(tokens) * hidden
    kept = 8 * (len(asked.positive) + 2 * len(asked.prompts)) * hidden * int(base.config["num_hidden_layers"])
    if asked.mode == "cheap_embed":
        return 3 * embedding + kept
    sizes = {name: 4 * piece.span.size for name, piece in tensors.items() if name != EMBEDDING}
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        layer = name.removeprefix(f"{LAYERS}.").partition(".")[0]
        layers[layer] = layers.get(layer, 0) + size
    weights = max((sizes if leafwise else layers).values(), default=0)
    states = 4 * sum(map(len, asked.prompts)) * hidden
    groups = group_lengths(asked.prompts, BATCH_TOKENS)
    batch = max(len(group) * _count_work(base, len(asked.prompts[group[0]]), hidden) for group in groups)
    return embedding + weights + states + kept + batch


def _count_work(base: Checkpoint, length: int, hidden: int) -> int:
    """Return what a layer computes for one prompt: queries, keys, values, attention, the MLP's channels."""
    config = base.config
    heads = int(config.get("num_attention_heads") or 1)
    head = int(config.get("head_dim") or hidden // heads)
    wide = 6 * hidden + 6 * heads * head + 3 * int(config.get("intermediate_size") or 4 * hidden)
    return 4 * (length * wide + 3 * heads * length * length)
