"""The approximations by name: what each needs, what a batch of it takes, and how it makes rows.

To add one: a file with its formula, and a line in `METHODS`. A batch has as many rows as `BATCH_BYTES` hold, whatever
memory a worker has: so no byte of the output hangs on that.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.pursuit import count_room_bytes
from mergemill.engine.tensors.row_maps import Ints
from mergemill.engine.tensors.workspace import Lasting
from mergemill.engine.transplants.affine import Affine
from mergemill.engine.transplants.batch_omp import AT_ONCE, hold_atoms, pursue_by_gram
from mergemill.engine.transplants.changes import Changes
from mergemill.engine.transplants.focus import weigh_by_sparsemax
from mergemill.engine.transplants.gram_file import GramFile, count_filling_bytes, count_gram_bytes
from mergemill.engine.transplants.john_hewitt import fit_normal
from mergemill.engine.transplants.landmark_pca import align
from mergemill.engine.transplants.mp_rope import Rotary, pursue_turned, turn
from mergemill.engine.transplants.nearest import Metric, Weights, interpolate, soften
from mergemill.engine.transplants.normal import make_normals
from mergemill.engine.transplants.omp import pursue
from mergemill.engine.transplants.stb import find_basis
from mergemill.engine.transplants.streams import NONE, Combination, Passes, combine_rows, gather_rows
from mergemill.engine.transplants.subword import Subword, weigh_pieces

if TYPE_CHECKING:
    import numpy as np

BATCH_BYTES = 128 << 20
MOST_ROWS = 512  # of a batch
MOST_TOGETHER = 4096  # of one whose rows share what is made first
TOGETHER_BYTES = 160 << 20  # of such a one: 4096 rows between widths of 2048
_BESIDE_BYTES = 48 << 20  # what solving takes, whatever the batch
_STREAMED = 4096  # rows that stream by at once, at most, against which a batch is held
HELD_BYTES = 256 << 20  # the most of a donor's matrix that is held
FILE_BYTES = 4 << 30  # the most of a file with the products of shared rows
_COMBINED = 256  # pursuits whose sums are made at once
_FEWEST = 128  # shared rows for each new one, at most, for which their products are worth it

Sizes = tuple[int, int, int]  # the widths of donor and model, and how many tokens both have
NEIGHBOURS, TEMPERATURE = 10, 0.1  # of WECHSEL, as its paper has them


@dataclass(frozen=True, slots=True)
class Manner:
    """How rows of one tensor are to be made."""

    method: str
    tensor: str  # the output's name of it, which randomness depends on
    k: int = 64
    metric: Metric = "euclidean"
    weights: Weights = "distance_proportional"
    subword: Subword = "mean"
    is_head: bool = False
    noise: float = 0.0
    scale: float = 1.0
    seed: int = 0
    rotary: tuple[Rotary, Rotary] | None = None  # of donor and model

    def describe(self) -> Mapping[str, Any]:
        """Return it as JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """New rows that are made at once."""

    rows: Ints
    first: int  # the place of the first among all new rows


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """What rows are made of."""

    shared_x: Passes | None  # the donor's rows of the tokens that both have
    shared_w: Passes  # the model's of the same, in the same order
    model: Passes  # all rows of the model
    models: Tensor  # the model's rows of the shared tokens
    width: int  # of the model

    @property
    def shared(self) -> Passes:
        """The donor's rows, which are there."""
        assert self.shared_x is not None
        return self.shared_x

    def combine(self, found: Combination) -> Tensor:
        """Return the sums over the model's rows of what was found among the shared ones."""
        return combine_rows(self.model, Combination(self._find(found.numbers), found.weights), self.width)

    def gather(self, numbers: Tensor) -> Tensor:
        """Return the model's rows of shared tokens, ``[new, terms, width]``."""
        return gather_rows(self.model, self._find(numbers), self.width)

    def _find(self, numbers: Tensor) -> Tensor:
        return torch.where(numbers == NONE, NONE, self.models[numbers.clamp_min(0)])


@dataclass(frozen=True, slots=True, eq=False)
class Making:
    """What makes a batch."""

    targets: Tensor | None  # the donor's rows of the batch, [rows, width of the donor]
    batch: Batch
    sources: Sources
    asked: Manner
    changes: Changes
    stored: str  # the donor's dtype
    lasting: Lasting  # what other batches have made
    key: tuple[str, ...]  # equal for batches of the same matrices and shared tokens
    mean: "np.ndarray | None"  # the model's mean row
    solved: Affine | None

    @property
    def wanted(self) -> Tensor:
        """The donor's rows, which are there."""
        assert self.targets is not None
        return self.targets

    @property
    def k(self) -> int:
        """As many rows as there are, at most."""
        return min(self.asked.k, len(self.changes.donors))


@dataclass(frozen=True, slots=True)
class Approximation:
    """One way to make rows."""

    title: str  # for people
    source: str  # one line
    make: Callable[[Making], Tensor]  # [rows of the batch, width of the model]
    row_bytes: Callable[[Sizes, int], int]  # that a row of a batch takes, for k terms
    takes_targets: bool = True  # whether it looks at the donor's rows
    passes_often: bool = False  # whether it goes over the donor's rows many times
    sums: Literal["", "mean", "rows", "pairs"] = ""  # that are gathered first: of the model's rows, or of both
    solve: Callable[[Any, Sources, Manner], Affine] | None = None  # what follows from these sums
    uses_k: bool = False
    at_once: int = 0  # rows of a batch against which others stream, where that is not all: then it has many
    beside_bytes: Callable[[Sizes, int], int] = lambda sizes, k: 0  # that a batch takes for k terms, whatever its rows

    @property
    def is_costly(self) -> bool:
        """Whether what is made goes over a matrix: then it is made for many rows at once."""
        return self.takes_targets and self.solve is None

    def count_rows(self, sizes: Sizes, asked: Manner) -> int:
        """Return the most rows of a batch."""
        if self.at_once:
            return max(1, min(MOST_TOGETHER, TOGETHER_BYTES // self._row_bytes(sizes, asked)))
        return max(1, min(MOST_ROWS, BATCH_BYTES // (self._row_bytes(sizes, asked) + _count_streamed(sizes))))

    def count_bytes(self, rows: int, sizes: Sizes, asked: Manner) -> int:
        """Return an upper bound of what a batch takes."""
        streamed = min(rows, self.at_once or rows) * _count_streamed(sizes)
        beside = _BESIDE_BYTES + self.beside_bytes(sizes, _count_terms(sizes, asked))
        return rows * self._row_bytes(sizes, asked) + streamed + beside

    def _row_bytes(self, sizes: Sizes, asked: Manner) -> int:
        return self.row_bytes(sizes, _count_terms(sizes, asked))


def _count_terms(sizes: Sizes, asked: Manner) -> int:
    return max(1, min(asked.k, sizes[2]))


def _count_streamed(sizes: Sizes) -> int:
    """Return what a row takes while others stream by."""
    return 16 * (sizes[0] + sizes[1] + _STREAMED)


def find_method(name: str, sizes: Sizes, new: int, stored: str) -> Approximation:
    """Return the approximation of that name: a pursuit of many new rows by the products of the shared ones.

    That hangs on shapes and the donor's dtype alone: where it is right, where the products fit into a file, and where
    they are fewer than those of a pursuit without them.
    """
    width, _, shared = sizes
    held = stored in {"F32", "F16", "BF16"} and width * shared * item_bytes(stored) <= HELD_BYTES
    pays = new * _FEWEST >= shared and count_gram_bytes(shared) <= FILE_BYTES
    return BATCH_OMP if name == "omp" and held and pays else METHODS[name]


def _pursue(making: Making) -> Tensor:
    return making.sources.combine(pursue(making.wanted, making.sources.shared, making.k))


def _pursue_by_gram(making: Making) -> Tensor:
    """Return the rows; of the pursuits' sums some at a time."""
    gram = making.lasting.find(making.key, lambda: GramFile(len(making.changes.donors)))
    atoms = hold_atoms(making.sources.shared, making.wanted.shape[1], making.stored, gram)
    found = pursue_by_gram(making.wanted, atoms, making.k)
    del atoms
    pieces = [slice(first, first + _COMBINED) for first in range(0, len(found.numbers), _COMBINED)]
    return torch.cat([making.sources.combine(Combination(found.numbers[i], found.weights[i])) for i in pieces])


def _interpolate(making: Making) -> Tensor:
    asked = making.asked
    found = interpolate(making.wanted, making.sources.shared, making.k, asked.metric, asked.weights)
    return making.sources.combine(found)


def _soften(making: Making) -> Tensor:
    k = min(NEIGHBOURS, len(making.changes.donors))
    return making.sources.combine(soften(making.wanted, making.sources.shared, k, TEMPERATURE))


def _project(making: Making) -> Tensor:
    return making.sources.combine(weigh_by_sparsemax(making.wanted, making.sources.shared))


def _pursue_turned(making: Making) -> Tensor:
    assert making.asked.rotary is not None
    of_donor, of_model = making.asked.rotary
    found, positions = pursue_turned(making.wanted, making.sources.shared, making.k, of_donor)
    rows = turn(making.sources.gather(found.numbers).double(), positions, of_model)
    return (rows * found.weights[:, :, None]).sum(1)


def _spell(making: Making) -> Tensor:
    batch = making.batch
    spellings = [making.changes.find_spelling(batch.first + i) for i in range(len(batch.rows))]
    found = weigh_pieces(spellings, making.asked.subword, is_head=making.asked.is_head)
    rows = combine_rows(making.sources.model, found, making.sources.width)
    rows[[not len(each) for each in spellings]] = _mean(making)[0].to(rows.dtype)
    return rows


def _mean(making: Making) -> Tensor:
    assert making.mean is not None
    return torch.from_numpy(making.mean).expand(len(making.batch.rows), -1)


def _zero(making: Making) -> Tensor:
    return torch.zeros(len(making.batch.rows), making.sources.width)


def _draw(making: Making) -> Tensor:
    asked, rows = making.asked, making.batch.rows.tolist()
    return torch.from_numpy(make_normals(asked.seed, asked.tensor, rows, making.sources.width))


def _map(making: Making) -> Tensor:
    assert making.solved is not None
    return torch.from_numpy(making.solved.move(making.wanted.double().numpy()))


def _map_drawn(making: Making) -> Tensor:
    assert making.solved is not None
    return torch.from_numpy(making.solved.move(_draw(making).numpy()))


def _of_widths(sizes: Sizes, k: int) -> int:
    return 16 * (sizes[0] + sizes[1])


def _count_beside_pursuits(sizes: Sizes, k: int) -> int:
    """Return what shared rows take that are held, their products while they are made, and what a pursuit works in."""
    width, _, shared = sizes
    held = min(4 * width * shared, HELD_BYTES)
    correlations = AT_ONCE * (4 * shared + 16 * width) + 64 * shared
    return held + count_filling_bytes(width) + correlations + count_room_bytes(shared, width, k)


SURGEON = "Goddard and Fernandes Neto, arXiv:2506.06607"

METHODS: Mapping[str, Approximation] = {
    "omp": Approximation(
        "Orthogonal matching pursuit",
        f"{SURGEON}.",
        _pursue,
        lambda sizes, k: 4 * sizes[0] * (k + 6) + 16 * k,
        passes_often=True,
        uses_k=True,
    ),
    "common_interpolation": Approximation(
        "Interpolation between the nearest shared tokens",
        f"{SURGEON}.",
        _interpolate,
        lambda sizes, k: 32 * sizes[0] * (k + 8) + 24 * k,
        uses_k=True,
    ),
    "subword": Approximation(
        "Rows of the pieces that spell a token", f"{SURGEON}.", _spell, _of_widths, takes_targets=False, sums="mean"
    ),
    "mean": Approximation("The mean row", "", _mean, _of_widths, takes_targets=False, sums="mean"),
    "zero": Approximation("Zeros", "", _zero, _of_widths, takes_targets=False),
    "randn": Approximation("Normal random rows", "", _draw, _of_widths, takes_targets=False),
    "john_hewitt": Approximation(
        "Rows drawn as the model's own are distributed",
        "Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021.",
        _map_drawn,
        _of_widths,
        takes_targets=False,
        sums="rows",
        solve=lambda sums, sources, asked: fit_normal(*sums),
    ),
    "landmark_pca": Approximation(
        "Landmark PCA",
        f"{SURGEON}.",
        _map,
        _of_widths,
        sums="pairs",
        solve=lambda sums, sources, asked: align(sums),
    ),
    "stb": Approximation(
        "Sparse token basis",
        f"{SURGEON}.",
        _map,
        _of_widths,
        sums="pairs",
        solve=lambda sums, sources, asked: find_basis(sums, sources.shared, sources.shared_w, asked.k),
        uses_k=True,
    ),
    "mp_rope": Approximation(
        "Matching pursuit with rotary positions",
        f"{SURGEON}; rotary embedding: arXiv:2104.09864.",
        _pursue_turned,
        lambda sizes, k: 48 * (sizes[0] + sizes[1]) * k,
        passes_often=True,
        uses_k=True,
    ),
    "focus": Approximation("FOCUS", "Dobler and de Melo, arXiv:2305.14481.", _project, lambda sizes, k: 24 * sizes[2]),
    "wechsel": Approximation(
        "WECHSEL",
        "Minixhofer et al., arXiv:2112.06598.",
        _soften,
        lambda sizes, k: 32 * sizes[0] * (NEIGHBOURS + 8),
    ),
}

BATCH_OMP = replace(
    METHODS["omp"],
    make=_pursue_by_gram,
    row_bytes=lambda sizes, k: 8 * (sizes[0] + sizes[1]) + 40 * k,
    passes_often=False,
    at_once=_COMBINED,
    beside_bytes=_count_beside_pursuits,
)
"""omp, by the products of all shared rows with all."""
