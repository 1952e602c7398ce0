"""Task vectors for tests of the methods on whole matrices, and what these make of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from methods.harness import fill_settings
from torch import Tensor

from mergemill.engine.methods.catalogue import get_method, get_step
from mergemill.engine.tensors.place import Place

SHAPES = [(40, 60), (60, 40), (50, 50), (20, 90), (90, 7)]  # the fourth has rows for few models only
PLACE = Place("model.layers.3.mlp.up_proj.weight", (), 7, (1, 2, 3))


def merge_deltas(method: str, *deltas: Tensor, **given: Any) -> Tensor:
    """Return what the method makes of task vectors on a base of zeros."""
    named = {key.removesuffix("_"): value for key, value in given.items()}
    settings = fill_settings(get_method(method), named, len(deltas))
    shape = tuple(deltas[0].shape)
    place, base = PLACE._replace(shape=shape), torch.zeros(shape, dtype=deltas[0].dtype)
    flat = [delta.clone().reshape(-1) for delta in deltas]
    return get_method(method).combine(flat, base.view(-1), None, place, settings).view(shape)


def apply_svc(merged: Tensor, *deltas: Tensor, alpha: float = 1.0) -> Tensor:
    """Return what SVC makes of a merged task vector."""
    place, flat = PLACE._replace(shape=tuple(merged.shape)), [delta.reshape(-1) for delta in deltas]
    result = get_step("svc").apply(merged.clone().reshape(-1), flat, place, {"alpha": alpha})
    return result.view(merged.shape)


def make_deltas(shape: Sequence[int], count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Tensor]:
    """Return random task vectors."""
    stream = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=stream, dtype=torch.float64).to(dtype) for _ in range(count)]


def make_orthogonal(shape: tuple[int, int], count: int, rank: int) -> list[Tensor]:
    """Return task vectors of one rank, their left and right spaces orthogonal, no singular value twice."""
    bases = [torch.linalg.qr(make_deltas((side, count * rank), 1)[0])[0].split(rank, 1) for side in shape]
    spectra = [torch.linspace(1 + 2 * i, 2 + 2 * i, rank, dtype=torch.float64).diag() for i in range(count)]
    return [left @ spectrum @ right.T for left, right, spectrum in zip(*bases, spectra, strict=True)]


def check_close(result: Tensor, wanted: Tensor | np.ndarray[Any, Any], relative: float = 1e-12) -> None:
    """Check to `relative` of the largest value."""
    wanted = torch.as_tensor(wanted)
    assert (result - wanted).abs().max() <= relative * wanted.abs().max()
