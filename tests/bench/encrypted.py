"""What TLS costs a merge on two worker processes here: ``python tests/bench/encrypted.py --pairs 5``.

The same merge, linear of two models, on a cluster with a throw-away certificate, as `--workers 2` starts it, and on one
that talks plain TCP, in turn; which of a pair comes first changes from pair to pair. A table of the medians, with the
least and most, and of the ratios within pairs.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from checkpoints import LLAMAS, Llama, count_bytes, list_shapes
from costs import Cost, measure_merge, write_models, write_recipe
from tables import format_table

from mergemill.engine.recipe.clusters import parse_cluster

LAYERS = 9  # of a 1.1B Llama: 1.06 GB
FILE = "kind: local\nworkers: 2\nthreads: 1\nmemory: 1GiB\n"
TRANSPORTS = {"TLS": FILE, "TCP": f"{FILE}options: {{protocol: tcp}}\n"}
COLUMNS = ("", "TLS", "TCP", "TLS / TCP within pairs")
ROWS: dict[str, Callable[[Cost], float]] = {
    "start s": lambda cost: cost.start.wall_s,
    "merging s": lambda cost: cost.merge.wall_s,
    "commit and end s": lambda cost: cost.commit.wall_s,
    "all s": lambda cost: cost.wall_s,
    "CPU s": lambda cost: cost.cpu_s,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="of the models and outputs; by default a temporary one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        shapes = list_shapes(_cut(LLAMAS["1.1B"], LAYERS))
        write_models(Path(folder), shapes, 2, "random")
        recipe = write_recipe(Path(folder), "linear", 2)
        taken: dict[str, list[Cost]] = {name: [] for name in TRANSPORTS}
        for pair in range(-1, asked.pairs):  # the first warms up
            for name in list(TRANSPORTS)[:: 1 if pair % 2 else -1]:
                cost = measure_merge(
                    recipe, Path(folder) / "out", cluster=parse_cluster(TRANSPORTS[name], name="bench.yml")
                )
                if pair >= 0:
                    taken[name].append(cost)
    sys.stdout.write(
        f"{count_bytes(shapes) / 1e9:.2f} GB of output, {taken['TLS'][0].parts} parts, {asked.pairs} pairs\n"
    )
    table = format_table(COLUMNS, [_make_row(name, get, taken) for name, get in ROWS.items()])
    sys.stdout.write(f"{table}\n")


def _cut(llama: Llama, layers: int) -> Llama:
    return Llama(llama.hidden, layers, llama.intermediate, llama.kv_rows, llama.vocabulary)


def _make_row(name: str, get: Callable[[Cost], float], taken: dict[str, list[Cost]]) -> list[str]:
    tls, tcp = ([get(cost) for cost in taken[transport]] for transport in TRANSPORTS)
    return [name, _say(tls), _say(tcp), _say([one / other for one, other in zip(tls, tcp, strict=True)])]


def _say(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


if __name__ == "__main__":
    main()
