"""What programs wrote, compared, so that a table compares equal work."""

from dataclasses import dataclass
from pathlib import Path

import torch
from programs import list_weights
from safetensors import safe_open
from torch import Tensor

SAMPLES = 8  # tensors that are looked into
ROWS = 64  # of each


@dataclass(frozen=True)
class Contents:
    """The tensors of an output, and the first rows of some."""

    shapes: dict[str, tuple[int, ...]]
    samples: dict[str, Tensor]  # float32


@dataclass(frozen=True)
class Likeness:
    """How far two outputs agree."""

    tensors: int  # in both, with equal names and shapes
    looked_into: int
    most_difference: float  # of an element, absolute
    equal_share: float  # of the elements looked at, those that are the same


class DifferentWorkError(Exception):
    """Two programs did not write the same tensors."""


def read_contents(folder: Path) -> Contents:
    """Return what lies in an output folder."""
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    for path in list_weights(folder):
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        shapes |= found
        places |= dict.fromkeys(found, path)
    names = sorted(shapes)
    chosen = names[:: max(1, len(names) // SAMPLES)]
    return Contents(shapes, {name: _read_rows(places[name], name) for name in chosen})


def _read_rows(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        rows: Tensor = file.get_slice(name)[:ROWS]
    return rows.float()


def compare_contents(ours: Contents, theirs: Contents) -> Likeness:
    """Return how alike two outputs are; raises `DifferentWorkError` where their tensors have other names or shapes."""
    if ours.shapes != theirs.shapes:
        odd = sorted(set(ours.shapes.items()) ^ set(theirs.shapes.items()))[:3]
        raise DifferentWorkError(f"{len(ours.shapes)} tensors against {len(theirs.shapes)}; only in one: {odd}")
    pairs = [(ours.samples[name], theirs.samples[name]) for name in ours.samples]
    equal = sum(int(torch.eq(mine, other).sum()) for mine, other in pairs)
    return Likeness(
        tensors=len(ours.shapes),
        looked_into=len(pairs),
        most_difference=max(float((mine - other).abs().max()) for mine, other in pairs),
        equal_share=equal / sum(mine.numel() for mine, _ in pairs),
    )
