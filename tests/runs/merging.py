"""What the tests of running share: small models whose tensors are cut over parts, recipes, and ways to look at outputs.

Workers can import this module (`tests` is on their path), so functions that are sent to them live here.
"""

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from models import read_tensors, write_llama

from mergemill.engine import make_plan, run
from mergemill.engine.checkpoint.unfinished import STATE_NAME
from mergemill.engine.plan import layout
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import Recipe, parse_recipe
from mergemill.engine.runs import running
from mergemill.engine.runs.clusters.cluster import Cluster
from mergemill.engine.runs.crew import Crew, open_crew
from mergemill.engine.runs.events import Event, PartFinished
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.tensors.slabs import BLOCK

SMALL_PART = 2 * BLOCK  # bytes: one block of bfloat16, so that tensors are cut wherever they may be

# What stands below `merge_method`, with the folders of the base and two variants to be filled in.
BODIES: Mapping[str, str] = MappingProxyType(
    {
        "linear": """
models:
  - {model: {A}, parameters: {weight: [0.2, 0.7]}}
  - {model: {B}, parameters: {weight: 0.6}}
""",
        "slerp": """
base_model: {base}
models: [{model: {base}}, {model: {A}}]
parameters: {t: [{filter: mlp, value: 0.3}, {value: [0.1, 0.9]}]}
""",
        "task_arithmetic": """
base_model: {base}
models:
  - {model: {A}, parameters: {weight: 0.9}}
  - {model: {B}, parameters: {weight: -0.2}}
""",
        "ties": """
base_model: {base}
models:
  - {model: {A}, parameters: {weight: 1.0, density: 0.3}}
  - {model: {B}, parameters: {weight: 0.6, density: [0.2, 0.8]}}
parameters: {rescale: true}
""",
        "dare_linear": """
base_model: {base}
models:
  - {model: {A}, parameters: {weight: 0.7, density: 0.5}}
  - {model: {B}, parameters: {weight: 0.4, density: 0.3}}
""",
        "dare_ties": """
base_model: {base}
models:
  - {model: {A}, parameters: {weight: 0.7, density: 0.5}}
  - {model: {B}, parameters: {weight: 0.4, density: 0.3}}
parameters: {rescale: true}
""",
        "passthrough": """
slices:
  - sources: [{model: {A}, layer_range: [0, 2]}]
  - sources: [{model: {B}, layer_range: [1, 2], parameters: {scale: 0.5}}]
""",
    }
)
METHODS = tuple(BODIES)
ISSUE_METHODS = ("linear", "slerp", "ties", "dare_ties", "passthrough")  # those whose bytes the issue compares


def write_family(
    folder: Path, *, vocab: int = 1500, hidden: int = 256, layers: int = 2, extras: Collection[str] = ()
) -> Path:
    """Write ``base``, ``A`` and ``B``: embeddings of 384,000 elements (5.9 blocks), matrices of 2 blocks.

    extras: odd tensors that all of them have.
    """
    write = partial(write_llama, vocab=vocab, hidden=hidden, intermediate=512, layers=layers, extras=extras)
    base = write(folder / "base", seed=0)
    for seed, name in enumerate("AB", start=1):
        write(folder / name, seed=seed, near=base)
    return folder


def make_recipe(method: str, folder: Path | str, *, more: str = "") -> Recipe:
    """Return the recipe of `method` over the family in `folder`, or at a URL."""
    return parse_recipe(write_recipe(method, folder, more=more), name=f"{method}.yml")


def write_recipe(method: str, folder: Path | str, *, more: str = "") -> str:
    """Return the text of that recipe."""
    body = BODIES[method]
    for name in ("base", "A", "B"):
        body = body.replace(f"{{{name}}}", f"{folder}/{name}")
    return f"merge_method: {method}{body}{more}"


def make_recipe_of(value: Mapping[str, Any]) -> Recipe:
    """Return the recipe that `value` says; its name is recipe.yml."""
    return parse_recipe(json.dumps(value))


@contextmanager
def parts_of(size_bytes: int) -> Iterator[None]:
    """Cut plans that are made meanwhile into parts of about `size_bytes`."""
    before = layout.LEAST_PART_BYTES, layout.PART_BYTES
    layout.LEAST_PART_BYTES = layout.PART_BYTES = size_bytes
    try:
        yield
    finally:
        layout.LEAST_PART_BYTES, layout.PART_BYTES = before


def plan_merge(
    method: str,
    folder: Path | str,
    *,
    part_bytes: int = SMALL_PART,
    shard_size: str = "5GB",
    seed: int = 0,
    more: str = "",
) -> Plan:
    """Plan the recipe of `method` over the family in `folder`, or at a URL."""
    with parts_of(part_bytes):
        return make_plan(make_recipe(method, folder, more=more), seed=seed, shard_size=shard_size)


def hash_output(out: Path) -> dict[str, str]:
    """Return the sha256 of every file of an output but mergemill's own, by name."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and STATE_NAME not in path.relative_to(out).parts
    }


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit by bit."""
    left, right = read_tensors(a), read_tensors(b)
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def is_loadable(out: Path) -> bool:
    """Whether a loader finds something that it takes for a whole model."""
    return any((out / name).exists() for name in ("model.safetensors.index.json", "model.safetensors"))


def list_files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished_parts(out: Path) -> list[int]:
    """Return the part numbers in the journal, in the order of their lines."""
    return [receipt.part for receipt in FolderOutput(out).journal.read()]


class Killed(BaseException):
    """Stands for the end of the driver's process: nothing in the engine catches it."""


def run_until(plan: Plan, out: Path, parts: int) -> None:
    """Run `plan` and end as if killed after `parts` receipts."""

    def stop(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == parts:
            raise Killed

    with suppress(Killed):
        run(plan, out, workers=0, threads=1, on_event=stop)
    assert len(finished_parts(out)) == parts
    assert not is_loadable(out)


@contextmanager
def slowed(seconds: float) -> Iterator[None]:
    """Let every slab that this process or the workers of its clusters merge meanwhile take `seconds` longer."""
    open_before, check_before = running.open_crew, Workplace.check_going

    @contextmanager
    def open_slow_crew(workers: Workers, *more: Any) -> Iterator[Crew]:
        with open_crew(workers, *more) as crew:
            if isinstance(crew, Cluster):
                crew.client.run(slow_down, seconds, on_error="ignore")  # of a worker that is dying
            yield crew

    running.open_crew = open_slow_crew
    slow_down(seconds)
    try:
        yield
    finally:
        running.open_crew, Workplace.check_going = open_before, check_before


def slow_down(seconds: float) -> None:
    """Let every slab of this process take `seconds` longer."""
    before = Workplace.check_going

    def check_going(self: Workplace) -> None:
        time.sleep(seconds)
        before(self)

    Workplace.check_going = check_going  # type: ignore[method-assign]


def flip_bit(path: Path, offset_bytes: int) -> None:
    """Flip one bit of a file, in place."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(descriptor, 1, offset_bytes)
        os.pwrite(descriptor, bytes([byte ^ 1]), offset_bytes)
    finally:
        os.close(descriptor)
