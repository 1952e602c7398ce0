"""What a head says of each position: the loss of the token that comes, and the entropy of what is predicted.

Logits are made for some rows of the head at a time, with a running log-sum-exp: of a vocabulary of a quarter of a
million, all logits of a text would take more than its layers. The family's own code makes them of the last hidden
states, so whatever it does to them (a cap, a scale) is done.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mergemill.engine.errors import PlanError
from mergemill.engine.evaluation.passing import ShellLayout
from mergemill.engine.evaluation.shell import Shell
from mergemill.engine.tensors.lazy import Tensor, torch

BLOCK = 4096  # rows of the head at a time

Scores = tuple[Tensor, Tensor]
"""Loss and entropy of each position, [texts, length], float64, in nats."""


@dataclass(slots=True)
class RunningSums:
    """Sums over the vocabulary so far, of each position: [texts, length], float32."""

    top: Tensor
    """The largest logit."""
    total: Tensor
    """Of exp(logit - top)."""
    moment: Tensor
    """Of logit * exp(logit - top)."""
    label: Tensor
    """The logit of the token that comes."""

    def add(self, rows: slice, logits: Tensor, labels: Tensor, first: int) -> None:
        """Add the logits [texts, length, some] of tokens from `first` on, of the texts `rows`."""
        top = torch.maximum(self.top[rows], logits.amax(-1))
        kept = torch.exp(self.top[rows] - top)
        shares = torch.exp(logits - top[..., None])
        self.total[rows] = self.total[rows] * kept + shares.sum(-1)
        self.moment[rows] = self.moment[rows] * kept + (shares * logits).sum(-1)
        self.top[rows] = top
        here = (labels >= first) & (labels < first + logits.shape[-1])
        places = (labels - first).clamp(0, logits.shape[-1] - 1)
        found = logits.gather(-1, places[..., None])[..., 0]
        self.label[rows] = torch.where(here, found, self.label[rows])

    def finish(self) -> Scores:
        """Return the loss and the entropy of each position, in nats, float64."""
        log_sum = self.top.double() + self.total.double().log()
        return log_sum - self.label.double(), log_sum - (self.moment.double() / self.total.double())


def start_running(shape: Sequence[int]) -> RunningSums:
    """Return the sums over no token."""
    low = torch.full(tuple(shape), -1e30)
    zero = torch.zeros(tuple(shape))
    return RunningSums(low, zero.clone(), zero.clone(), zero.clone())


def score_whole(shell: Shell, ids: Tensor, labels: Tensor) -> Scores:
    """Return loss and entropy [texts, length] of a model that is in memory as a whole."""
    running = start_running(labels.shape)
    with torch.no_grad():
        running.add(slice(None), shell.model(input_ids=ids, use_cache=False).logits.float(), labels, 0)
    return running.finish()


def score_states(
    shell: Shell, layout: ShellLayout, tensors: Mapping[str, Tensor], hidden: Tensor, labels: Tensor, step: int
) -> Scores:
    """Return loss and entropy [texts, length] of one model, of its last hidden states [texts, length, width].

    tensors: of the head. labels: the token that comes after each position. step: texts at a time.
    """
    running = start_running(labels.shape)
    head = shell.model.get_output_embeddings()
    with torch.no_grad(), _given_states(shell.model) as states:
        for first, stop in _iter_blocks(len(next(iter(tensors.values())))):
            with _slab(head, shell, layout, tensors, first, stop):
                for start in range(0, len(hidden), step):
                    rows = slice(start, start + step)
                    states.append(hidden[rows])
                    logits = shell.model(input_ids=labels[rows], use_cache=False).logits.float()
                    running.add(rows, logits, labels[rows], first)
    return running.finish()


def _iter_blocks(size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, size, BLOCK):
        yield first, min(first + BLOCK, size)


class _LastStates:
    """What a base model gives, of which all but the last hidden states is None."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None


@contextmanager
def _given_states(model: Any) -> Iterator[list[Tensor]]:
    """In the block, the model's base gives the states that are put into the list, and computes nothing."""
    base, states = model.base_model, list[Tensor]()
    base.forward = lambda *args, **kwargs: _LastStates(states.pop())
    try:
        yield states
    finally:
        del base.forward


@contextmanager
def _slab(head: Any, shell: Shell, layout: ShellLayout, tensors: Any, first: int, stop: int) -> Iterator[None]:
    """In the block, the head has some of its rows."""
    before = dict(head._parameters)
    for name, parameter in before.items():
        if parameter is not None:
            found = _find_tensor(name, layout, tensors)
            if found is None:
                raise PlanError(f"{shell.where}: no tensor is for the head's {name}, which transformers' model has")
            head._parameters[name] = torch.nn.Parameter(found[first:stop].float(), requires_grad=False)
    try:
        yield
    finally:
        head._parameters.update(before)


def _find_tensor(name: str, layout: ShellLayout, tensors: Any) -> Any:
    """Return the tensor of a head's parameter; a tied weight is the embedding's."""
    named = [each for each in layout.head if each.rpartition(".")[2] == name]
    return tensors[named[0]] if named else None
