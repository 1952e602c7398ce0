"""What a merge costs by its phases, inside this process."""

import gc
import json
import resource
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from checkpoints import Data, Shapes, write_model

from mergemill.engine import load_recipe, make_plan, run
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Committed, PartFinished, Started

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MODEL = {  # what a recipe says beside a model; methods that are not here take nothing
    "linear": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
}


@dataclass(frozen=True)
class Spent:
    """Seconds since some moment."""

    wall_s: float
    cpu_s: float  # of this process and those that it has waited for

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.wall_s - other.wall_s, self.cpu_s - other.cpu_s)


@dataclass(frozen=True)
class Cost:
    """What one merge took, phase by phase."""

    plan: Spent
    start: Spent  # of the output folder and the workers
    merge: Spent  # from the first part to the last
    commit: Spent  # and the workers' end
    parts: int
    read_bytes: int
    write_bytes: int
    peak_bytes: int  # resident in this process, above what it was before

    @property
    def wall_s(self) -> float:
        """Seconds of all phases."""
        return sum(phase.wall_s for phase in (self.plan, self.start, self.merge, self.commit))

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all phases."""
        return sum(phase.cpu_s for phase in (self.plan, self.start, self.merge, self.commit))


def write_models(folder: Path, shapes: Shapes, count: int, data: Data) -> None:
    """Write a base, numbered 0, and `count` models near it."""
    for number in range(count + 1):
        write_model(folder / str(number), shapes, number=number, data=data, config=CONFIG)


def write_recipe(folder: Path, method: str, count: int) -> Path:
    """Write a recipe for `count` models of `write_models`, beside the base where the method has one."""
    models = [{"model": str(folder / str(number)), "parameters": MODEL[method]} for number in range(1, count + 1)]
    recipe = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method != "linear":
        recipe["base_model"] = str(folder / "0")
    path = folder / f"{method}-{count}.yml"
    path.write_text(json.dumps(recipe))
    return path


def plan_recipe(recipe: Path) -> Plan:
    """Read a recipe and the headers."""
    return make_plan(load_recipe(recipe))


def measure_merge(recipe: Path, out: Path, **options: object) -> Cost:
    """Merge into `out`, which is removed again; options: of `mergemill.engine.run`."""
    before_bytes = reset_peak()
    marks = [take_time()]
    plan = plan_recipe(recipe)
    marks.append(take_time())
    last: list[Spent] = []

    def note(event: Started | PartFinished | Committed) -> None:
        if isinstance(event, Started):
            marks.append(take_time())
        elif isinstance(event, PartFinished):
            last[:] = [take_time()]

    done = run(plan, out, on_event=note, **options)  # type: ignore[arg-type]
    marks += [*last, take_time()]
    shutil.rmtree(out)
    phases = [later - earlier for earlier, later in pairwise(marks)]
    peak_bytes = read_status("VmHWM") - before_bytes
    return Cost(*phases, done.parts, done.read_bytes, done.write_bytes, peak_bytes)


def take_time() -> Spent:
    """Return the clocks; processes count once they have been waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Spent(time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime)


def reset_peak() -> int:
    """Let the kernel's peak of this process begin anew; returns the resident bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return read_status("VmRSS")


def read_status(name: str) -> int:
    """Return one of the kernel's figures on this process, in bytes."""
    lines: Mapping[str, str] = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return int(lines[name].split()[0]) << 10
