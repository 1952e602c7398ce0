"""Experts: from the MLPs of dense models to the tensors of a mixture's layer.

An expert's matrix is its source's, cut into channels where MLPs become several experts, drawn anew in some channels,
with noise, and scaled: all by expressions, so that no expert is ever whole anywhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offers
from mergemill.engine.plan.architectures import MATRICES, PACKED, Architecture
from mergemill.engine.recipe.mixtures import Expert, Mixture
from mergemill.engine.tensors.channels import cut_columns, cut_rows, put_beside
from mergemill.engine.tensors.drawn import Noisy
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.redrawn import Redraw, Redrawn
from mergemill.engine.tensors.stacked import stack

MLP = tuple(f"mlp.{matrix}.weight" for matrix in MATRICES)  # of a dense model's layer
LAYERS = "model.layers"

Tensors = Iterator[tuple[str, Expression]]  # names after the layer


@dataclass(frozen=True, slots=True)
class Assembly:
    """What the experts of all layers are made with."""

    mixture: Mixture
    architecture: Architecture
    offers: Mapping[str, Offers]  # by model
    seed: int
    where: str  # for errors

    def key(self, name: str) -> str:
        """Return the name by which something is drawn: stages of one file draw each their own."""
        return f"{self.mixture.name}/{name}" if self.mixture.name else name

    @property
    def packed(self) -> bool:
        """Whether a layer's experts are one tensor."""
        return self.mixture.layout == "packed"

    @property
    def routed(self) -> tuple[Expert, ...]:
        """The experts, each as often as it is wanted."""
        return _repeat(self.mixture.experts)

    @property
    def shared(self) -> tuple[Expert, ...]:
        """The shared experts, each as often as it is wanted."""
        return _repeat(self.mixture.shared_experts)

    @property
    def count(self) -> int:
        """How many experts the router chooses from."""
        return len(self.routed) * self.mixture.granularity


def _repeat(experts: Sequence[Expert]) -> tuple[Expert, ...]:
    return tuple(expert for expert in experts for _ in range(expert.count))


def check_experts(making: Assembly, layers: int) -> int:
    """Return how many channels the MLPs have; `PlanError` for matrices of other shapes, or that are not there."""
    base = str(making.mixture.base_model)
    first = str(making.routed[0].source_model)
    shapes = _find_shapes(making, first, 0)
    channels, hidden = shapes[MATRICES.index("gate_proj")]
    embedding = making.offers[base].get("model.embed_tokens.weight")
    if embedding is not None and embedding.shape[-1] != hidden:
        raise PlanError(
            f"{making.where}: {LAYERS}.0.{MLP[0]} of {first} has shape {[channels, hidden]}, and the base model {base} "
            f"has rows of {embedding.shape[-1]} in model.embed_tokens.weight; experts must be as wide as the base"
        )
    for expert in dict.fromkeys((*making.routed, *making.shared)):
        model = str(expert.source_model)
        for layer in range(layers):
            for name, found, wanted in zip(MLP, _find_shapes(making, model, layer), shapes, strict=True):
                if found != wanted:
                    raise PlanError(
                        f"{making.where}: tensor {LAYERS}.{layer}.{name}: {first} has shape {list(wanted)} in its "
                        f"first layer, {model} {list(found)}; experts must have one shape"
                    )
    if channels % making.mixture.granularity:
        raise PlanError(
            f"{making.where}: granularity {making.mixture.granularity} does not divide the {channels} channels of the "
            f"MLPs"
        )
    return channels


def _find_shapes(making: Assembly, model: str, layer: int) -> list[tuple[int, ...]]:
    found = []
    for name in MLP:
        offer = making.offers[model].get(f"{LAYERS}.{layer}.{name}")
        if offer is None:
            raise PlanError(f"{making.where}: {model} has no {LAYERS}.{layer}.{name}, of which an expert is made")
        found.append(offer.shape)
    return found


def make_experts(making: Assembly, layer: int) -> Tensors:
    """Yield the matrices of a layer's experts."""
    experts = [
        fine for number, expert in enumerate(making.routed) for fine in _make_fine(making, expert, number, layer)
    ]
    if not making.packed:
        for number, matrices in enumerate(experts):
            for matrix, made in zip(MATRICES, matrices, strict=True):
                yield making.architecture.name_expert(number, matrix), made
        return
    channels, hidden = experts[0][0].shape
    both = [each for matrices in experts for each in matrices[:2]]
    yield making.architecture.name_packed(PACKED[0]), _stack(making, both, (len(experts), 2 * channels, hidden))
    down = [matrices[2] for matrices in experts]
    yield making.architecture.name_packed(PACKED[1]), _stack(making, down, (len(experts), hidden, channels))


def make_shared(making: Assembly, layer: int) -> Tensors:
    """Yield the matrices of a layer's shared experts, which are one MLP of the channels of all."""
    made = [
        _finish(making, expert, making.count + number, layer, _take(making, expert, layer), 1.0)
        for number, expert in enumerate(making.shared)
    ]
    if not made:
        return
    for matrix, parts in zip(MATRICES, zip(*made, strict=True), strict=True):
        name = making.architecture.name_shared(matrix)
        if matrix == "down_proj" or len(parts) == 1:
            yield name, put_beside(parts)
        else:
            yield name, _stack(making, parts, (sum(part.shape[0] for part in parts), parts[0].shape[1]))


def _stack(making: Assembly, parts: Sequence[Expression], shape: tuple[int, ...]) -> Expression:
    """Return the parts as one tensor; `PlanError` for what must be known whole before it is made."""
    if any(part.count_rounds()[1] for part in parts):
        raise PlanError(
            f"{making.where}: an expert needs statistics of its whole matrix first (reinit, or a stage whose method "
            f"does), and cannot be part of a larger tensor: leave layout packed out, or merge the stage first"
        )
    return stack(parts, shape)


def _take(making: Assembly, expert: Expert, layer: int) -> list[Expression]:
    offers = making.offers[str(expert.source_model)]
    return [offers[f"{LAYERS}.{layer}.{name}"].expression for name in MLP]


def _make_fine(making: Assembly, expert: Expert, number: int, layer: int) -> Iterator[list[Expression]]:
    """Yield the experts that an MLP is cut into: all of it together gives what it gave."""
    parts = making.mixture.granularity
    gate, up, down = _take(making, expert, layer)
    if parts > 1 and any(each.count_rounds()[1] for each in (gate, up, down)):
        raise PlanError(
            f"{making.where}: granularity: {expert.source_model} is made from statistics of whole matrices, which "
            f"cannot be cut before they are made; merge it first, and name the folder"
        )
    cut = zip(cut_rows(gate, parts), cut_rows(up, parts), cut_columns(down, parts), strict=True)
    for fine, matrices in enumerate(cut):
        yield _finish(making, expert, number * parts + fine, layer, list(matrices), float(parts))


def _finish(
    making: Assembly, expert: Expert, number: int, layer: int, matrices: Sequence[Expression], factor: float
) -> list[Expression]:
    """Return matrices drawn anew in some channels, with noise; the last one scaled by what is asked and by `factor`."""
    mlp = making.key(f"{LAYERS}.{layer}.mlp")
    channels = matrices[0].shape[0]
    redraw = Redraw(making.seed, mlp, number, channels, int(expert.reinit * channels))
    made: list[Expression] = []
    for matrix, each in zip(MATRICES, matrices, strict=True):
        name, down = f"{mlp}.{matrix}", matrix == "down_proj"
        if redraw.count:
            each = Redrawn(each, int(down), redraw, f"{name}/anew")
        scale = expert.residual_scale * factor if down else 1.0
        if expert.noise_scale or scale != 1.0:
            each = Noisy(each, expert.noise_scale, scale, making.seed, f"{name}/noise", number)
        made.append(each)
    return made


def warn_of_equal(making: Assembly) -> Iterator[str]:
    """Yield a warning where experts begin equal: no router can tell them apart before they are trained."""
    plain: dict[tuple[object, ...], list[int]] = {}
    for number, expert in enumerate(making.routed):
        if not expert.noise_scale and int(expert.reinit * 1e9) == 0:
            plain.setdefault((str(expert.source_model), expert.residual_scale), []).append(number)
    for numbers in plain.values():
        if len(numbers) > 1:
            yield (
                f"{making.where}: experts {', '.join(map(str, numbers))} are equal, so that the mixture does what the "
                f"model does until it is trained; noise_scale or reinit makes them differ"
            )
