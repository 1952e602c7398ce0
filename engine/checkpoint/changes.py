"""What an adapter changes in a model, as values: each names a tensor of the model, and those that change it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias


class FactorPlace(NamedTuple):
    """Where the elements of a factor lie: what its vectors, ranks and matrices are apart, and where it begins."""

    along_side: int
    along_rank: int
    along_batch: int
    start: int


@dataclass(frozen=True, slots=True)
class Product:
    """The product of two small factors, added to a matrix; with magnitudes (DoRA) its vectors are scaled after."""

    tensor: str  # the weight
    left: str  # the factor with a vector for each row
    right: str  # the factor with a vector for each column
    magnitude: str | None
    rank: int
    scale: float
    transposed: bool  # whether it is stored [in, out], so that A is the left one and B the right one
    rows: int
    columns: int
    places: tuple[FactorPlace, FactorPlace] | None = None  # of left and right, where not one matrix alone is stored


@dataclass(frozen=True, slots=True)
class Residual:
    """What factors were begun as, taken out of the weight before their product is added (`tensors/residual.py`)."""

    tensor: str
    beginning: Literal["pissa", "olora"]
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Shift:
    """A bias, added to the module's own."""

    tensor: str
    added: str
    scale: float


@dataclass(frozen=True, slots=True)
class Replacement:
    """Rows of single tokens, which stand for the matrix's own."""

    tensor: str
    rows: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """Experts that were changed one by one, packed again as the model stores them; the last of all changes."""

    tensor: str
    parts: tuple[str, ...]  # in their order
    shape: tuple[int, ...]


Change: TypeAlias = Product | Residual | Shift | Replacement | Packed


def find_parts(change: Change) -> tuple[str, ...]:
    """Return the names of the tensors that a change is made of."""
    if isinstance(change, Residual):
        return ()
    if isinstance(change, Packed):
        return change.parts
    if isinstance(change, Product):
        return (change.left, change.right, *([change.magnitude] if change.magnitude is not None else []))
    return (change.added,) if isinstance(change, Shift) else (change.rows,)
