"""Random faults in small merges, and a table of what came of them: ``python tests/bench/faults.py --faults 500``.

Each merge runs on a cluster of its own or on one over TCP, with or without nannies, and up to three faults fall into
it. Where a fault ends the run, the same command is given again, until it is done. Then every file's sha256 is compared
with that of a merge that nobody disturbed; nothing may be left of it, and nothing may take longer than `BOUND_S`.
Asked to end (SIGINT), it prints the table of what it did until then.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from runs.disturbed import BOUND_S, SLOW, Disturber, Driver, Place, open_place, say_error
from runs.merging import SMALL_PART, hash_output, make_recipe, write_family

from mergemill.engine.plan import layout

METHODS = ("linear", "slerp", "ties", "dare_ties", "task_arithmetic")
MOST = 3  # faults of a merge


@dataclass(frozen=True)
class Found:
    """What came of one fault."""

    kind: str
    resumed: bool  # whether the run ended, and was begun again
    seconds: float  # from the fault to the end of the merge


class Stage:
    """Recipes, what they give undisturbed, and two clusters."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        layout.LEAST_PART_BYTES = layout.PART_BYTES = SMALL_PART  # in all drivers, which are forks of this process
        self.folder = folder
        family = write_family(folder / "models", vocab=800, hidden=256, layers=1)
        (folder / "slow.py").write_text(SLOW)
        os.environ["DASK_DISTRIBUTED__WORKER__PRELOAD"] = f'["{folder / "slow.py"}"]'  # of clusters that drivers start
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self.recipes: dict[str, Path] = {}
        self.expected: dict[str, Mapping[str, str]] = {}
        for method in METHODS:
            self.recipes[method] = folder / f"{method}.yml"
            self.recipes[method].write_text(make_recipe(method, family).text)
            driver = Driver("merge", self.recipes[method], folder / "expected" / method, "--json", "--workers", 0)
            driver.wait(until_s=time.monotonic() + BOUND_S)
            assert driver.end() == 0, driver.said
            self.expected[method] = hash_output(folder / "expected" / method)
        self.places: list[Place] = [
            stack.enter_context(open_place(folder / name, nanny=name == "nannies")) for name in ("nannies", "alone")
        ]

    def tell(self, rng: random.Random, most: int) -> Iterator[Found]:
        """Merge once, with faults, until it is done."""
        method, out = rng.choice(METHODS), self.folder / "out"
        place = rng.choice([None, *self.places, *self.places])
        where = ("--workers", 2) if place is None else ("--scheduler", place.address)
        command = ("merge", self.recipes[method], out, "--json", "--memory", "256MiB", *where)
        made: list[tuple[str, float]] = []
        resumed: set[int] = set()
        code, left = -1, rng.randint(1, min(MOST, most))
        while code:
            if place:
                place.mend()
            until_s, first = time.monotonic() + BOUND_S, len(made)
            driver = Driver(*command)
            disturber = Disturber(rng, driver, place)
            while left and driver.wait(events=driver.events + rng.randint(1, 6), until_s=until_s, place=place):
                time.sleep(rng.uniform(0, 0.2))
                began_s = time.monotonic()
                made.append((disturber.make(), began_s))
                left -= 1
            print(f"  {method}: {made[first:]}", flush=True)  # noqa: T201
            driver.wait(until_s=until_s, place=place)
            code = driver.end()
            if code:
                assert len(made) > first, f"it failed, and nobody disturbed it: {driver.said[-3000:]}"
                print(f"  {[kind for kind, _ in made[first:]]}: {code}: {say_error(driver.said)}", flush=True)  # noqa: T201
                resumed.update(range(first, len(made)))
        if place:
            place.mend()  # what was frozen goes on, and has still something to write
        assert hash_output(out) == self.expected[method], f"another merge came out of {made}"
        assert not [path for path in (out / ".mergemill").iterdir() if ".tmp" in path.name], "something is left"
        shutil.rmtree(out)
        for number, (kind, began_s) in enumerate(made):
            yield Found(kind, number in resumed, time.monotonic() - began_s)


def make_faults(folder: Path, count: int, seed: int, found: list[Found]) -> None:
    """Merge until so many faults were made, or this process is asked to end; puts into `found` what came of each."""
    rng = random.Random(seed)
    with ExitStack() as stack, suppress(KeyboardInterrupt):
        stage = Stage(folder, stack)
        while len(found) < count:
            found += stage.tell(rng, count - len(found))
            print(f"{len(found)} of {count} faults", flush=True)  # noqa: T201


def format_table(found: list[Found]) -> str:
    """Return the table of the page of figures."""
    kinds: dict[str, list[Found]] = defaultdict(list)
    for each in found:
        kinds[each.kind].append(each)
    rows = [
        f"| {kind} | {len(all_)} | {sum(not each.resumed for each in all_)} | {sum(each.resumed for each in all_)} "
        f"| {max(each.seconds for each in all_):.1f} |"
        for kind, all_ in sorted(kinds.items())
    ]
    head = ["| fault | count | the run went on | resumed | longest, s |", "|---|---|---|---|---|"]
    return "\n".join(head + rows)


def main() -> None:
    """Make faults, and say what came of them."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--faults", type=int, default=500)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what runs beside it
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            make_faults(Path(folder), given.faults, given.seed, found)
        finally:
            print(format_table(found))  # noqa: T201


if __name__ == "__main__":
    main()
