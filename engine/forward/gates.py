"""Rows of routers from prompts: by the hidden states of a model, or by its embedding alone.

An expert's row in a layer is the direction from the states of its negative prompts to those of its positive ones; of
the same pass comes which experts such a router would pick for each prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mergemill.engine.forward.layers import LayerSeen, ModelWeights, Pass, group_lengths, run_layers
from mergemill.engine.tensors.lazy import Tensor, torch

Mode = Literal["hidden", "hidden_avg", "router_input", "cheap_embed"]
Floats = np.ndarray[Any, np.dtype[np.float64]]
BATCH_TOKENS = 2048  # of prompts of one length, at once
_LEAST_NORM = 1e-8


@dataclass(frozen=True, slots=True)
class GatePrompts:
    """The prompts, each once, and which of them every row of a router is for and against."""

    mode: Mode
    contrast: bool
    prompts: tuple[tuple[int, ...], ...]  # token ids
    positive: tuple[tuple[int, ...], ...]  # of each row, numbers of prompts
    negative: tuple[tuple[int, ...], ...]
    routed: int  # how many rows are of a router; those that follow are of shared experts


@dataclass(frozen=True, slots=True)
class GatesFound:
    """Gates, and what they are like."""

    rows: Floats  # [layers, rows, hidden], in float64
    states: Mapping[int, Floats]  # by layer, [prompts, hidden]: what a router sees of each prompt; empty: not known


def find_gates(
    config: Mapping[str, Any], weights: ModelWeights, asked: GatePrompts, embedding: str, how: Pass
) -> GatesFound:
    """Return the gates of all layers; `embedding` is its tensor's name."""
    layers = int(config["num_hidden_layers"])
    if asked.mode == "cheap_embed":
        rows = _make_rows(_embed(weights, asked, embedding), asked)
        return GatesFound(np.stack([rows] * layers), {})
    notes = _Notes(asked, layers)
    groups = group_lengths(asked.prompts, BATCH_TOKENS)
    batches = [torch.tensor([asked.prompts[number] for number in group]) for group in groups]
    run_layers(config, weights, batches, lambda seen: notes.take(seen, groups[seen.batch]), how)
    rows = np.stack([_make_rows(_subtract(states, asked), asked) for states in notes.vectors])
    return GatesFound(rows, dict(notes.states))


class _Notes:
    """What is kept of a pass: one vector of each prompt and layer."""

    def __init__(self, asked: GatePrompts, layers: int) -> None:
        self._mode = asked.mode
        self._count = len(asked.prompts)
        self.vectors: list[Floats] = []  # by layer, [prompts, hidden]
        self.states: dict[int, Floats] = {}
        self._layers = layers

    def take(self, seen: LayerSeen, prompts: Sequence[int]) -> None:
        """Note a batch, whose rows are those prompts."""
        if seen.layer == self._layers:
            return
        if seen.layer == len(self.vectors):
            self.vectors.append(np.zeros((self._count, seen.inputs.shape[-1])))
        of = seen.routed if self._mode == "router_input" else seen.inputs
        assert of is not None
        picked = of.mean(1, dtype=torch.float64) if self._mode == "hidden_avg" else of[:, -1]
        self.vectors[-1][prompts] = _to_array(picked)
        if seen.routed is not None:
            states = self.states.setdefault(seen.layer, np.zeros_like(self.vectors[-1]))
            states[prompts] = _to_array(seen.routed[:, -1])


def _to_array(values: Tensor) -> Floats:
    array: Floats = values.double().cpu().numpy()
    return array


def _subtract(vectors: Floats, asked: GatePrompts) -> Floats:
    """Return the mean of each row's positive prompts less that of its negative ones, ``[rows, hidden]``."""
    pairs = zip(asked.positive, asked.negative, strict=True)
    return np.stack([_mean(vectors, positive) - _mean(vectors, negative) for positive, negative in pairs])


def _mean(vectors: Floats, numbers: Sequence[int]) -> Floats:
    return vectors[list(numbers)].mean(0) if numbers else np.zeros(vectors.shape[1])


def _make_rows(vectors: Floats, asked: GatePrompts) -> Floats:
    """Return vectors as rows of length 1; with contrast, the mean of the router's is subtracted from each before."""
    if asked.contrast:
        vectors = vectors - vectors[: asked.routed].mean(0)
    return _scale(vectors)


def _scale(vectors: Floats) -> Floats:
    scaled: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), _LEAST_NORM)
    return scaled


def _embed(weights: ModelWeights, asked: GatePrompts, embedding: str) -> Floats:
    """Return for each row the difference of the directions in which the tokens' embeddings of its prompts point."""
    tokens = sorted({token for prompt in asked.prompts for token in prompt})
    rows = _to_array(weights.read_rows(embedding, tokens))
    places = {token: place for place, token in enumerate(tokens)}

    def point(numbers: Sequence[int]) -> Floats:
        listed = [places[token] for number in numbers for token in asked.prompts[number]]
        return _scale(rows[listed].sum(0)) if listed else np.zeros(rows.shape[1])

    pairs = zip(asked.positive, asked.negative, strict=True)
    return np.stack([point(positive) - point(negative) for positive, negative in pairs])
