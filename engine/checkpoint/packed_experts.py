"""Factors of experts that peft packs (`target_parameters`), and the tensors that they change, packed or one by one.

A is ``[E·r, in]`` and B ``[out, r·E]``: of expert e, ``A.view(E, r, in)[e]`` and ``B.view(out, r, E)[…, e]``. Several
parameters of one module are wrapped one in another (``X.base_layer.lora_A``), the first that the module declares
innermost; transformers' mixtures declare what goes into an expert before what comes out of it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergemill.engine.checkpoint.adapter import Adapter
from mergemill.engine.checkpoint.changes import FactorPlace, Product
from mergemill.engine.checkpoint.family import Family, Layout, is_packed_otherwise

_INNER = ".base_layer"


@dataclass(frozen=True, slots=True)
class PackedFactors:
    """The factors of one parameter: of all experts of a layer."""

    name: str  # of the parameter, as the adapter calls it
    left: str  # B, among the tensors of the model with the adapter
    right: str  # A
    rank: int
    scale: float
    count: int  # of experts
    into: int
    out: int


def strip_inner(module: str) -> tuple[str, int]:
    """Return a module without what wraps its parameters, and how many stand around this one.

    >>> strip_inner("layers.0.mlp.experts.base_layer"), strip_inner("layers.0.mlp.experts")
    (('layers.0.mlp.experts', 1), ('layers.0.mlp.experts', 0))
    """
    bare = module
    while bare.endswith(_INNER):
        bare = bare.removesuffix(_INNER)
    return bare, (len(module) - len(bare)) // len(_INNER)


def find_parameter(adapter: Adapter, module: str) -> str | None:
    """Return the parameter that a module's factors are of; None where they are of its weight."""
    if not adapter.config.parameters:
        return None
    bare, depth = strip_inner(module)
    leaves = sorted({each.rpartition(".")[2] for each in adapter.config.parameters if _is_of(each, bare)}, key=_order)
    known = [strip_inner(each) for each in adapter.parts]
    wrapped = 1 + max((around for each, around in known if each == bare), default=0)
    if wrapped != len(leaves) or depth >= len(leaves):
        return None
    return f"{bare}.{leaves[-1 - depth]}"


def make_packed(
    given: PackedFactors, target: str, names: Collection[str], shapes: Sequence[int], family: Family
) -> Iterator[Product]:
    """Yield the change of the tensor `target`, of this shape, or of each expert's where these are stored one by one."""
    into, out, rank, count = given.into, given.out, given.rank, given.count
    of_a, of_b = FactorPlace(1, into, rank * into, 0), FactorPlace(rank * count, count, 1, 0)
    if target in names:
        turned = len(shapes) == 3 and is_packed_otherwise(target, family)
        places = (of_a, of_b) if turned else (of_b, of_a)
        yield _make(given, target, places, (into, out) if turned else (out, into), turned=turned)
        return
    for layout in family.layouts:
        if not layout.numbered or not target.endswith(layout.whole):
            continue
        begin, rows = target.removesuffix(layout.whole), out // len(layout.parts)
        if any(f"{begin}{part.replace('#', '0')}" not in names for part in layout.parts):
            continue
        for expert in range(count):
            for place, part in enumerate(layout.parts):
                b = FactorPlace(rank * count, count, 0, place * rows * rank * count + expert)
                a = FactorPlace(1, into, 0, expert * rank * into)
                name = f"{begin}{part.replace('#', str(expert))}"
                yield _make(given, name, (b, a), (rows, into), turned=False)
        return


def _make(
    given: PackedFactors, name: str, places: tuple[FactorPlace, FactorPlace], shape: tuple[int, int], *, turned: bool
) -> Product:
    left, right = (given.right, given.left) if turned else (given.left, given.right)
    return Product(
        tensor=name,
        left=left,
        right=right,
        magnitude=None,
        rank=given.rank,
        scale=given.scale,
        transposed=turned,
        rows=shape[0],
        columns=shape[1],
        places=places,
    )


def name_experts(packed: str, shape: tuple[int, ...], family: Family) -> Mapping[str, tuple[int, ...]]:
    """Return the tensors that a packed one has its experts in, in their order, with their shapes; none: it packs none.

    >>> from mergemill.engine.checkpoint.family import choose_family
    >>> list(name_experts("h.0.mlp.experts.gate_up_proj", (1, 6, 4), choose_family({})).items())
    [('h.0.mlp.experts.0.gate_proj.weight', (3, 4)), ('h.0.mlp.experts.0.up_proj.weight', (3, 4))]
    """
    layout = _find_layout(packed, family) if len(shape) == 3 else None
    if layout is None or shape[1] % len(layout.parts):
        return {}
    begin, own = packed.removesuffix(layout.whole), (shape[1] // len(layout.parts), shape[2])
    return {f"{begin}{part.replace('#', str(i))}": own for i in range(shape[0]) for part in layout.parts}


def count_experts(a_rows: int, rank: int) -> int:
    """Return how many experts a factor of so many rows is of; 0 where it is of no whole number."""
    return 0 if a_rows % rank else a_rows // rank


def _find_layout(name: str, family: Family) -> Layout | None:
    layouts = (*family.separate, *family.layouts)
    return next((each for each in layouts if each.numbered and f".{name}".endswith(f".{each.whole}")), None)


def _is_of(parameter: str, module: str) -> bool:
    """Whether a parameter, of which the end may be named alone, is one of the module's."""
    parent = parameter.rpartition(".")[0]
    return not parent or f".{module}".endswith(f".{parent}")


def _order(leaf: str) -> tuple[bool, str]:
    return "down" in leaf, leaf
