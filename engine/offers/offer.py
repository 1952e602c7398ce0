"""An offer: the expression that a checkpoint gives for a tensor name, and the stored tensors that this consumes."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.family import Family
from mergemill.engine.checkpoint.layout import TensorInfo
from mergemill.engine.tensors.expressions import Expression

T = TypeVar("T")


class Offer(NamedTuple):
    """What stands for one tensor of a model."""

    expression: Expression
    uses: tuple[str, ...]  # names of the stored tensors that it is made of, for the ledger
    parts: tuple[TensorInfo, ...] = ()  # what the model has in its place, where it offers these as one
    matched: str = ""  # what filters beside the model match, where that is not the name that is offered

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, as loaders see it."""
        return self.expression.shape

    @property
    def dtype(self) -> str:
        """The dtype that it has by itself."""
        return self.expression.dtype


Offers = Mapping[str, Offer]  # by tensor name, in the order of the names


def find_by_names(offers: Mapping[str, Offers], find: Callable[[Collection[str]], T]) -> dict[str, T]:
    """Return by model what `find` makes of its names, in any order; models of the same names, as most are, share it."""
    made: dict[str, T] = {}
    for model, found in offers.items():
        same = next((other for other in made if offers[other].keys() == found.keys()), None)
        made[model] = find(found) if same is None else made[same]
    return made


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks for a checkpoint's offers, and for which names."""

    checkpoint: Checkpoint
    family: Family  # of the donor
    names: Collection[str]  # of all tensors that any model of the merge offers so far


Format = Callable[[Offers, Asked], Offers]  # a format gives the offers that it does not know as they are
