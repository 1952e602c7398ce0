"""What gives the slabs of a transplanted tensor: copied rows, and those of the batches that the slab touches."""

import functools
import math
from dataclasses import dataclass, field

import numpy as np

from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.rounds import Plain, Ready
from mergemill.engine.tensors.row_maps import Ints
from mergemill.engine.tensors.slabs import BLOCK, Span
from mergemill.engine.tensors.workspace import Arena, Workspace
from mergemill.engine.transplants.affine import Affine, Doubles
from mergemill.engine.transplants.matrices import Matrices, read_rows
from mergemill.engine.transplants.methods import Batch, Making, Manner
from mergemill.engine.transplants.normal import make_normals


@dataclass(frozen=True, slots=True, eq=False)
class Transplanting(Plain):
    """A transplanted tensor of which all is known that must be known first."""

    copied: Ready
    matrices: Matrices
    asked: Manner
    batches: tuple[Batch, ...] = field(repr=False)
    mean: Doubles | None = field(repr=False)  # of the model's rows with tokens
    solved: Affine | None = field(repr=False)

    @property
    def dtype(self) -> str:
        """The model's."""
        return self.matrices.model.dtype

    @property
    def width(self) -> int:
        """The elements of a row."""
        return self.matrices.model.shape[1]

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span, whole rows, as `dtype`."""
        first, last = self._find_rows(span)
        found = self.copied.slab(span, work, dtype)
        rows = found.view(last - first, self.width)
        for batch in self.batches:
            inside = (batch.rows >= first) & (batch.rows < last)
            if inside.any():
                (made,) = work.results.find(batch, functools.partial(self._make, batch, work))
                rows[_index(batch.rows[inside] - first)] = made[torch.from_numpy(inside)].to(rows.dtype)
        means = self.matrices.changes.find_means(first, last)
        if len(means):
            assert self.mean is not None
            rows[_index(means - first)] = torch.from_numpy(self.mean).to(rows.dtype)
        return found

    def encode(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Arena:
        """Return the span's bytes; of rows that are all copied those that are stored."""
        changes, rows = self.matrices.changes, self._find_rows(span)
        if not len(changes.find_new(*rows)) and not len(changes.find_means(*rows)):
            return self.copied.encode(span, work, dtype, watch)
        return Plain.encode(self, span, work, dtype, watch)

    def make_watch(self, dtype: str) -> Watch | None:
        """Return what counts values that are no numbers."""
        return Watch(BLOCK, deltas=False)

    def _make(self, batch: Batch, work: Workspace) -> list[Tensor]:
        """Return the rows of a batch, in the dtype in which they are made."""
        asked, compute = self.asked, self.matrices.compute
        method, targets = self.matrices.find_method(asked.method), None
        if method.takes_targets:
            with work.scratch():
                targets = read_rows(self.matrices.rows_of_donor(self._find_targets(batch)), work, compute).clone()
            finite = targets.isfinite().all(1)
            targets[~finite] = 0.0
        sources = self.matrices.open_sources(work, compute)
        changes, stored = self.matrices.changes, self.matrices.stored
        key = (asked.tensor, changes.digest, repr([each.describe() for each in self.matrices.sources]))
        making = Making(targets, batch, sources, asked, changes, stored, work.lasting, key, self.mean, self.solved)
        found = method.make(making)
        if targets is not None:  # nothing is made of what is no number, and what watches the output tells it
            found[~finite] = math.nan
        if asked.noise:
            normals = make_normals(asked.seed, f"{asked.tensor}, noise", batch.rows.tolist(), self.width)
            found = found.double() + asked.noise * torch.from_numpy(normals)
        return [found if asked.scale == 1.0 else found * asked.scale]

    def _find_targets(self, batch: Batch) -> Ints:
        return self.matrices.changes.targets[batch.first : batch.first + len(batch.rows)]

    def _find_rows(self, span: Span) -> tuple[int, int]:
        return span.start // self.width, -(-span.stop // self.width)


def _index(rows: "np.ndarray") -> Tensor:
    return torch.from_numpy(rows.astype(np.int64))
