"""Several adapters of one module as one: its two factors, from the factors of each, by peft's formulas or by spaces.

Of an adapter with A ``[r, in]``, B ``[out, r]`` and the scale s the change is D = s·B·A. Sources: peft's
`add_weighted_adapter` (0.21) for the combination types; Core Space, arXiv:2509.17786: the changes in the bases that all
factors span; KnOTS, arXiv:2410.19735: in the vectors that all changes have in common. No base is needed for any.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from mergemill.engine.tensors.expressions import Expression, Held, Leaf
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.thin import Found, Side, settle_whole
from mergemill.engine.tensors.workspace import Workspace

Sign = Literal["total", "frequency"]

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
BY_SVD = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
TYPES = (*ON_FACTORS, "cat", *BY_SVD)
"""peft's words."""


class FactorPair(NamedTuple):
    """An adapter's factors of one module."""

    a: Leaf
    b: Leaf
    rank: int
    scale: float
    weight: float


@dataclass(frozen=True, slots=True)
class Formula:
    """How changes become one."""

    kind: str  # one of `TYPES`, or a space: core, knots
    density: float = 1.0
    majority: Sign = "total"
    clamp: float | None = None  # quantile at which both factors are clamped
    seed: int = 0  # of what is dropped at random
    merge: Merged | None = None  # of a space: the method, over tensors in it
    bases: int = 0  # how many of its inputs come before the adapters'

    def describe(self) -> dict[str, Any]:
        """All that it holds; of the method what its result depends on."""
        plain = [self.kind, self.density, self.majority, self.clamp, self.seed]
        return {"formula": plain, "merge": None if self.merge is None else self.merge.describe()}


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """The factors of one module that adapters are combined to."""

    pairs: tuple[FactorPair, ...]
    into: int
    out: int
    rank: int
    formula: Formula
    tells_loss = False

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The factors."""
        return tuple(each for pair in self.pairs for each in (pair.a, pair.b))

    @property
    def sides(self) -> Mapping[Side, tuple[int, int]]:
        """The shapes of the factors."""
        return {"A": (self.rank, self.into), "B": (self.out, self.rank)}

    @property
    def own_bytes(self) -> int:
        """The factors three times over, in float64; where whole changes are looked at, all of these and an SVD."""
        ranks = sum(pair.rank for pair in self.pairs)
        factors = 8 * 6 * (self.into + self.out) * (ranks + self.rank) + 8 * 4 * ranks**2
        read = max(each.slab_bytes(each.size, "F32") for each in self.inputs)
        whole = 0
        if self.formula.kind in BY_SVD and self.formula.kind != "svd":
            whole = 8 * (len(self.pairs) * 3 + 6) * self.into * self.out
        if self.formula.merge is not None:
            made = self.formula.merge
            whole = made.slab_bytes(made.size, "F32") + 8 * 6 * made.size * (len(self.pairs) + 2)
        return factors + read + whole

    def describe(self) -> Mapping[str, Any]:
        """The factors, and how they are combined."""
        pairs = [[pair.a.describe(), pair.b.describe(), pair.rank, pair.scale, pair.weight] for pair in self.pairs]
        return {"combined": pairs, "shape": [self.into, self.out, self.rank], **self.formula.describe()}

    def compute(self, work: Workspace) -> Found:
        """Return both factors, float32; what is lost is not known."""
        factors = [(self._take(pair.a, work), self._take(pair.b, work)) for pair in self.pairs]
        shaped = [
            (a.view(pair.rank, self.into), b.view(self.out, pair.rank))
            for (a, b), pair in zip(factors, self.pairs, strict=True)
        ]
        a, b = _combine(shaped, self, work)
        rank = len(a)
        made_a, made_b = torch.zeros(self.rank, self.into), torch.zeros(self.out, self.rank)
        made_a[:rank], made_b[:, :rank] = a, b
        return made_a, made_b, torch.zeros(1, 2, dtype=torch.float64)

    def _take(self, factor: Leaf, work: Workspace) -> Tensor:
        work.next_slab()
        return factor.slab(Span(0, factor.size), work, "F32").clone()


def _combine(factors: Sequence[tuple[Tensor, Tensor]], of: Combined, work: Workspace) -> tuple[Tensor, Tensor]:
    kind, pairs = of.formula.kind, of.pairs
    if kind == "cat":
        a = torch.cat([a * (pair.weight * pair.scale) for (a, _), pair in zip(factors, pairs, strict=True)])
        return a, torch.cat([b for _, b in factors], 1)
    if kind in ON_FACTORS:
        roots = [math.sqrt(abs(pair.weight * pair.scale)) for pair in pairs]
        signed = [math.copysign(root, pair.weight * pair.scale) for root, pair in zip(roots, pairs, strict=True)]
        stream = torch.Generator().manual_seed(of.formula.seed)
        a = combine_tensors(kind, [a for a, _ in factors], signed, of.formula, stream)
        return a, combine_tensors(kind, [b for _, b in factors], roots, of.formula, stream)
    if kind == "svd":
        return _cut_small(_span(factors, of, [pair.weight for pair in pairs]), of)
    if kind in BY_SVD:
        stream = torch.Generator().manual_seed(of.formula.seed)
        changes = [pair.scale * (b @ a) for (a, b), pair in zip(factors, pairs, strict=True)]
        whole = combine_tensors(kind.removesuffix("_svd"), changes, [p.weight for p in pairs], of.formula, stream)
        left, values, right = torch.linalg.svd(whole.double(), full_matrices=False)
        rank = min(of.rank, len(values))
        return _clamp(right[:rank], left[:, :rank] * values[:rank], of.formula.clamp)
    return _merge_in_core(factors, of, work) if kind == "core" else _merge_in_knots(factors, of, work)


def combine_tensors(
    kind: str, tensors: Sequence[Tensor], weights: Sequence[float], formula: Formula, stream: Any
) -> Tensor:
    """Return what peft's function of this name makes of tensors of one shape (peft/utils/merge_utils.py).

    ``ties`` and ``dare_ties`` take the sign of the sum without weights, 0 as positive, and divide the sum of what
    agrees by its number.
    """
    kept = [_thin_out(kind, each, formula.density, stream) for each in tensors]
    weighted = [each * weight for each, weight in zip(kept, weights, strict=True)]
    if kind not in ("ties", "dare_ties"):
        return torch.stack(weighted).sum(0)
    stacked = torch.stack(kept)
    votes = stacked.sum(0) if formula.majority == "total" else stacked.sign().sum(0)
    agrees = stacked.sign() == torch.where(votes >= 0, 1.0, -1.0)
    return (torch.stack(weighted) * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _thin_out(kind: str, tensor: Tensor, density: float, stream: Any) -> Tensor:
    """Return the largest elements, or some at random, that many more of themselves; the others are 0."""
    if kind in ("linear", "svd") or density >= 1:
        return tensor
    if kind.startswith("dare"):
        return tensor * (torch.rand(tensor.shape, generator=stream) < density) / density
    count = int(density * tensor.numel())
    largest = tensor.abs().flatten().topk(count).indices
    mask = torch.zeros(tensor.numel()).index_fill_(0, largest, 1.0)
    return tensor * mask.view(tensor.shape)


class _Core(NamedTuple):
    """A change in bases: left · small · rightᵀ."""

    left: Tensor  # [out, p], orthonormal
    small: Tensor  # [p, q]
    right: Tensor  # [into, q], orthonormal


def _bases(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of what all B and of what all A span, float64."""
    left = torch.linalg.qr(torch.cat([b for _, b in factors], 1).double())[0]
    right = torch.linalg.qr(torch.cat([a for a, _ in factors]).double().T)[0]
    return left, right


def _span(factors: Sequence[tuple[Tensor, Tensor]], of: Combined, weights: Sequence[float]) -> _Core:
    left, right = _bases(factors)
    parts = _list_cores(factors, of, left, right)
    small = sum((part * weight for part, weight in zip(parts, weights, strict=True)), torch.zeros_like(parts[0]))
    return _Core(left, small, right)


def _list_cores(factors: Sequence[tuple[Tensor, Tensor]], of: Combined, left: Tensor, right: Tensor) -> list[Tensor]:
    return [
        pair.scale * (left.T @ b.double()) @ (a.double() @ right)
        for (a, b), pair in zip(factors, of.pairs, strict=True)
    ]


def _cut_small(core: _Core, of: Combined) -> tuple[Tensor, Tensor]:
    """Return the best factors of the asked rank of a change in bases, as peft has them: A with rows of length 1."""
    left, values, right = torch.linalg.svd(core.small, full_matrices=False)
    rank = min(of.rank, len(values))
    a, b = right[:rank] @ core.right.T, core.left @ (left[:, :rank] * values[:rank])
    return _clamp(a, b, of.formula.clamp)


def _clamp(a: Tensor, b: Tensor, quantile: float | None) -> tuple[Tensor, Tensor]:
    if quantile is None:
        return a, b
    highest = torch.quantile(torch.cat([b.flatten(), a.flatten()]), quantile)
    return a.clamp(-highest, highest), b.clamp(-highest, highest)


def _merge_in_core(factors: Sequence[tuple[Tensor, Tensor]], of: Combined, work: Workspace) -> tuple[Tensor, Tensor]:
    left, right = _bases(factors)
    merged = _merge_held(_list_cores(factors, of, left, right), of.formula, work)
    return _cut_small(_Core(left, merged, right), of)


def _merge_in_knots(factors: Sequence[tuple[Tensor, Tensor]], of: Combined, work: Workspace) -> tuple[Tensor, Tensor]:
    basis = torch.linalg.qr(torch.cat([b for _, b in factors], 1).double())[0]
    parts = [pair.scale * (basis.T @ b.double()) @ a.double() for (a, b), pair in zip(factors, of.pairs, strict=True)]
    joined = torch.cat(parts, 1)
    turn = torch.linalg.eigh(joined @ joined.T)[1].flip(1)
    merged = _merge_held([turn.T @ part for part in parts], of.formula, work)
    inner, rest = torch.linalg.qr(merged.T)
    return _cut_small(_Core(basis @ turn, rest.T, inner), of)


def _merge_held(tensors: Sequence[Tensor], formula: Formula, work: Workspace) -> Tensor:
    """Return the method's merge of tensors in a space, whose base is 0 there."""
    assert formula.merge is not None, "a space has a method"
    held = [torch.zeros_like(tensors[0], dtype=torch.float32)] * formula.bases
    held += [each.float().contiguous() for each in tensors]
    made = replace(formula.merge, inputs=tuple(Held(each) for each in held))
    ready = settle_whole(made, work)
    work.next_slab()
    return ready.slab(Span(0, made.size), work, "F32").double().view(tensors[0].shape)
