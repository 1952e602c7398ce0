"""Methods on matrices beside what a reader of their papers would write in float32 with torch, on the same cores.

    python tests/bench/spectra.py [--models 4] [--shapes 768x768,768x2048,2048x768] [--methods tsv,iso_c]

Both merge the same matrices in as many processes as there are cores, each on one thread, as workers do: that is kinder
to the plain way than torch's own threads on all cores, which wait for each other where anything else runs. They take
turns, and so do the methods; told are the plain way's CPU seconds over ours. WUDI's 300 steps are timed as
100 times 3 of them.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergemill.engine.methods.catalogue import get_method, get_step
from mergemill.engine.tensors.place import Place

Shape = tuple[int, int]
PLACE = Place("model.layers.3.mlp.up_proj.weight", (), 7, ())
WUDI_STEPS, WUDI_TIMED = 300, 3


# ------------------------------------------------------------------------------------------------------ the plain way
def iso_c(deltas: Sequence[Tensor]) -> Tensor:
    left, values, right = torch.linalg.svd(sum(deltas), full_matrices=False)
    return left @ torch.diag(values.mean().expand_as(values)) @ right


def polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def tsv(deltas: Sequence[Tensor]) -> Tensor:
    kept = min(deltas[0].shape) // len(deltas)
    triples = [[part[..., :kept] for part in (u, s, v.T)] for u, s, v in map(decompose, deltas)]
    left, values, right = (torch.cat(parts, -1) for parts in zip(*triples, strict=True))
    return polar(left) @ torch.diag(values) @ polar(right).T


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def iso_cts(deltas: Sequence[Tensor]) -> Tensor:
    rank = min(deltas[0].shape)
    own = round((rank - int(0.8 * rank)) / len(deltas))
    u, s, v = decompose(sum(deltas))
    parts = [(u[:, : rank - own * len(deltas)], s[: rank - own * len(deltas)], v[: rank - own * len(deltas)].T)]
    common = parts[0][0]
    for delta in deltas:
        u, s, v = decompose(delta - common @ (common.T @ delta))
        parts.append((u[:, :own], s[:own], v[:own].T))
    left, values, right = (torch.cat(each, -1) for each in zip(*parts, strict=True))
    return polar(left) @ torch.diag(values.mean().expand_as(values)) @ polar(right).T


def star(deltas: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(deltas[0])
    for u, s, v in map(decompose, deltas):
        rank = int(torch.searchsorted(s.cumsum(0), 0.4 * s.sum())) + 1
        total += u[:, :rank] @ torch.diag(s[:rank] * (s.sum() / s[:rank].sum())) @ v[:rank]
    return total / len(deltas)


def cart(models: Sequence[Tensor]) -> Tensor:
    mean = sum(models) / len(models)
    kept = int(0.08 * min(mean.shape))
    merged = mean.clone()
    for u, s, v in map(decompose, (model - mean for model in models)):
        merged += u[:, :kept] @ torch.diag(s[:kept]) @ v[:kept]
    return merged


def svc(deltas: Sequence[Tensor]) -> Tensor:
    u, s, v = decompose(sum(deltas))
    images = torch.diag(s) @ v
    total = torch.zeros_like(s)
    for delta in deltas:
        own = u.T @ delta
        total += ((images * own).sum(1) / own.square().sum(1)).clamp(min=1.0)
    return u @ torch.diag(s * len(deltas) / total) @ v


def wudi(deltas: Sequence[Tensor]) -> Tensor:
    vectors = torch.stack(list(deltas))
    merged = torch.nn.Parameter(vectors.sum(0))
    optimizer = torch.optim.Adam([merged], lr=1e-5)
    norms = vectors.flatten(1).square().sum(1)
    for _ in range(WUDI_TIMED):
        apart = merged.unsqueeze(0) - vectors
        loss = ((apart @ vectors.transpose(1, 2)).square() / norms[:, None, None]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return merged.detach()


PLAIN: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "tsv": tsv, "iso_c": iso_c, "iso_cts": iso_cts, "wudi": wudi, "svc": svc, "star": star, "cart": cart,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- ours
def merge_ours(name: str, deltas: Sequence[Tensor]) -> None:
    """Merge one matrix as a worker does."""
    shape, models = tuple(deltas[0].shape), len(deltas)
    place = PLACE._replace(shape=shape, models=tuple(range(models)))
    flat = [delta.view(-1) for delta in deltas]
    if name == "svc":
        get_step("svc").apply(sum(flat[1:], flat[0].clone()), flat, place, {"alpha": 1.0})
        return
    method = get_method(name)
    settings = {each.name: each.default for each in method.parameters}
    method.combine(flat, torch.zeros(shape).view(-1), None, place, settings)


def make_deltas(shape: Shape, models: int) -> list[Tensor]:
    """Return task vectors: a few strong directions over noise, as those of fine-tunes."""
    stream = torch.Generator().manual_seed(7)
    rank = min(shape) // 8
    noise = [torch.randn(shape, generator=stream) for _ in range(models)]
    factors = [[torch.randn(side, rank, generator=stream) for side in shape] for _ in range(models)]
    return [1e-3 * (each + left @ right.T / rank**0.5) for each, (left, right) in zip(noise, factors, strict=True)]


def time_merge(name: str, shape: Shape, models: int, plain: bool) -> float:
    """Merge one matrix on one thread; return the CPU seconds."""
    torch.set_num_threads(1)
    deltas = make_deltas(shape, models)
    before = time.process_time()
    if plain:
        PLAIN[name](deltas)
    else:
        merge_ours(name, deltas)
    took = time.process_time() - before
    return took * WUDI_STEPS / WUDI_TIMED if plain and name == "wudi" else took


def main() -> None:
    """Print a table, Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--shapes", default="768x768,768x2048,2048x768")
    parser.add_argument("--methods", default=",".join(PLAIN))
    given = parser.parse_args()
    cores = os.cpu_count() or 1
    say = sys.stdout.write
    say("| method | matrix | plain CPU s | ours CPU s | plain / ours |\n|---|---|---|---|---|\n")
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        for text in ("64x64", *given.shapes.split(",")):  # the first for what is done once
            rows, columns = map(int, text.split("x"))
            for name in given.methods.split(","):
                plain, ours = (
                    sum(pool.starmap(time_merge, [(name, (rows, columns), given.models, way)] * cores, chunksize=1))
                    for way in (True, False)
                )
                if text != "64x64":
                    say(f"| {name} | {rows} × {columns} | {plain:.2f} | {ours:.2f} | {plain / ours:.1f} |\n")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
