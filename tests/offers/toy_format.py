"""A format of the tests' own: bytes and a scale for each row, as ``NAME`` and ``NAME.zoom``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.offers.offer import Asked, Offer, Offers
from mergemill.engine.tensors.expressions import Expression, Leaf
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import Plain, Ready
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace, aligned


@dataclass(frozen=True, slots=True)
class Zoomed(Expression):
    """Row i is ``values[i] · zoom[i]``."""

    values: Leaf
    zoom: Leaf
    dtype: str = "F32"

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return (self.values,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def holds(self, span: Span) -> Any:
        return self.zoom.reads(Span(0, self.zoom.size))

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        return ReadyZoom(self.dtype, inputs[0], self.zoom, self.shape[-1])

    def slab_bytes(self, elements: int, dtype: str) -> int:
        return self.values.slab_bytes(elements, dtype) + aligned(4 * self.zoom.size)

    def describe(self) -> Mapping[str, Any]:
        return {"zoomed": [self.values.describe(), self.zoom.describe()]}


@dataclass(frozen=True, slots=True)
class ReadyZoom(Plain):
    dtype: str
    values: Ready
    zoom: Leaf
    columns: int

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Any = None) -> Tensor:
        zoom = self.zoom.slab(Span(0, self.zoom.size), work, dtype)
        rows = zoom.repeat_interleave(self.columns)[span.start : span.stop]
        return self.values.slab(span, work, dtype).mul_(rows)


def offer_zoomed(offers: Offers, asked: Asked) -> Offers:
    """Return the offers, with one expression for values and their zoom."""
    zooms = {name: offers[f"{name}.zoom"] for name in offers if f"{name}.zoom" in offers}
    made = {
        name: Offer(Zoomed(offers[name].expression, zoom.expression), (name, f"{name}.zoom"))  # type: ignore[arg-type]
        for name, zoom in zooms.items()
    }
    return {name: made.get(name, offer) for name, offer in offers.items() if not name.endswith(".zoom")}
