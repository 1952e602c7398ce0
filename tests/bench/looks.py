"""What it takes to look at models: python tests/bench/looks.py.

`inspect` of a model of the shape of 70B parameters in 30 shards, in a bucket that is 50 ms away (sparse files, behind a
proxy); and `diff` of two models of 1.1B (with `--layers` of its layers) beside reading both, in turn. Whole commands
with their start: medians of wall and CPU seconds.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoints import LLAMAS, list_shapes, open_models
from measure import measure
from plan.sketches import config, write_sketch
from programs import find_script, list_weights, make_environ
from rounds import find_medians
from servers.folder import start_folder
from servers.proxy import start_proxy_process

SHARDS, LATENCY_S = 30, 0.05


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", default="", help="'inspect' or 'diff'")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        if options.only in ("", "inspect"):
            inspect_far(folder / "large", options.runs)
        if options.only in ("", "diff"):
            llama = replace(LLAMAS["1.1B"], layers=options.layers)
            models = open_models(folder, dict.fromkeys(("base", "a"), "BF16"), llama, "random")
            files = [str(file) for model in models.values() for file in list_weights(model)]
            floor = [
                sys.executable,
                "-S",
                "-E",
                str(Path(__file__).with_name("floor.py")),
                "after",
                str(folder / "nothing"),
                "0",
            ]
            diff = [find_script("mergemill"), "diff", *map(str, models.values()), "--json"]
            compare({"reading both": [*floor, *files], "diff": diff}, options.runs, make_environ())


def inspect_far(folder: Path, runs: int) -> None:
    """Inspect a 70B model far away."""
    tensors = {name: ("BF16", shape) for name, shape in list_shapes(LLAMAS["70B"]).items()}
    write_sketch(folder / "model", tensors, config=config(layers=LLAMAS["70B"].layers), shards=SHARDS, tokenizer=True)
    with start_folder(folder) as (server, _), start_proxy_process(server.url, latency_s=LATENCY_S) as url:
        environ = {**make_environ(), **server.through(url).make_environ()}
        compare({"inspect": [find_script("mergemill"), "inspect", "s3://any/model"]}, runs, environ)


def compare(commands: Mapping[str, Sequence[str]], runs: int, environ: Mapping[str, str]) -> None:
    """Run the commands in turn; print a row for each, and the ratio of the rest to the first."""
    rounds = [{name: measure(command, environ) for name, command in commands.items()} for _ in range(runs)]
    first = next(iter(commands))
    for name in commands:
        of = find_medians(rounds, name, first)
        ratios = f"{of.wall_ratio:.2f}, {of.cpu_ratio:.2f}"
        sys.stdout.write(f"| {name} | {of.wall_s:.1f} | {of.cpu_s:.1f} | {ratios} | {of.peak_mib} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
