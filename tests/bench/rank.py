"""The exact m-th largest magnitude of a tensor: this engine's select, slab by slab, against torch.topk, by CPU time.

Run as ``python tests/bench/rank.py``; for each density the m largest of 50 million float32 elements are found by

* select: the passes of a trim (`select_largest`), each over copies of slabs as a worker decodes them, on one thread;
* topk: ``torch.topk(x.abs(), m)`` of the whole tensor, on one thread.

Both must name the same threshold. CPU seconds are the medians of the runs, the ratio is of these.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mergemill.engine.tensors.cut import Cut
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.select import select_largest
from mergemill.engine.tensors.slabs import Span, iter_slabs

T = TypeVar("T")


@dataclass(frozen=True)
class Race:
    """The CPU seconds that both took for one density."""

    density: float
    count: int  # of elements that stay
    threshold: float
    select_s: list[float]
    topk_s: list[float]

    @property
    def ratio(self) -> float:
        """How many times less CPU time the select took."""
        return statistics.median(self.topk_s) / statistics.median(self.select_s)


def main() -> None:
    """Run the races that the command line asks for."""
    options = parse_options()
    torch.set_num_threads(1)
    values = torch.empty(options.size).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    races = [race(values, density, options.runs) for density in options.densities]
    sys.stdout.write(format_table(races, options.size) + "\n")
    if options.json:
        found = [{**asdict(each), "ratio": each.ratio} for each in races]
        options.json.write_text(json.dumps({"size": options.size, "races": found}, indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=50_000_000, help="elements")
    parser.add_argument(
        "--densities", type=lambda text: [float(part) for part in text.split(",")], default=[0.01, 0.1, 0.5, 0.9]
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def race(values: Tensor, density: float, runs: int) -> Race:
    """Find the same threshold both ways, in turn."""
    count = max(1, int(density * len(values)))
    select_s, topk_s = [], []
    threshold = 0.0
    for number in range(runs):
        cut, taken_s = measure(lambda: select(values, count))
        select_s.append(taken_s)
        least, taken_s = measure(lambda: float(torch.topk(values.abs(), count).values[-1]))
        topk_s.append(taken_s)
        threshold = cut.threshold
        if threshold != least:
            raise SystemExit(f"density {density}: select says {threshold!r}, topk {least!r}")
        sys.stderr.write(f"{density} {number + 1}/{runs} select {select_s[-1]:.2f} s, topk {topk_s[-1]:.2f} s\n")
    return Race(density, count, threshold, select_s, topk_s)


def select(values: Tensor, count: int) -> Cut:
    """Drive the passes over slabs, each a copy, as the engine does."""
    place = Place("x", tuple(values.shape), 0, (0,))
    slabs = list(iter_slabs(Span(0, len(values))))
    memory = torch.empty(slabs[0].size)
    rounds = select_largest(place, [(count,)], "F32")
    try:
        gather = next(rounds)
        while True:
            total: Partial = ()
            for slab in slabs:
                copied = memory[: slab.size].copy_(values[slab.start : slab.stop])
                total = add_partials(total, gather([copied], place.at(slab.start)))
            gather = rounds.send(total)
    except StopIteration as finished:
        ((cut,),) = finished.value
        return cut


def measure(run: Callable[[], T]) -> tuple[T, float]:
    """Return what `run` returns, and its CPU seconds."""
    started = time.process_time()
    result = run()
    return result, time.process_time() - started


def format_table(races: list[Race], size: int) -> str:
    lines = [
        f"| density of {size:,} float32 | m | select CPU s (ns/element) | topk CPU s (ns/element) | topk / select |",
        "|---|---|---|---|---|",
    ]
    for each in races:
        select_s, topk_s = statistics.median(each.select_s), statistics.median(each.topk_s)
        lines.append(
            f"| {each.density:g} | {each.count:,} | {select_s:.2f} ({select_s / size * 1e9:.1f}) "
            f"| {topk_s:.2f} ({topk_s / size * 1e9:.1f}) | {each.ratio:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
