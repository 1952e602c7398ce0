"""Whole merges with steps around the method, and with task vectors that have a base of their own.

The oracle knows recipes with `models` or `slices` of Llamas; it computes in float64, from the formulas, the task
vectors first rounded to float32 as the engine computes them.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import read_arrays, read_tensors, write_llama, write_tensors
from oracles import EMBEDDING, HEAD, LAYER, Array, count_layers, read_outside, task_arithmetic, ties
from oracles.element import expo
from oracles.matrices import svc
from runs.merging import SMALL_PART, hash_output, make_recipe_of, parts_of, run_until, write_family

from mergemill.engine import make_plan, run, verify
from mergemill.engine.errors import MergeError
from mergemill.engine.plan.memory import stream_bytes
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs import graph
from mergemill.engine.runs.events import Committed, PartFinished
from mergemill.engine.tensors.slabs import BLOCK

Recipe = Mapping[str, Any]
Load = Callable[[str], Mapping[str, Array]]
Merge = Callable[[Recipe, Path], Committed]

LAYERS = 3
TOLERANCE = 2e-6  # of a tensor's largest value
MOST_DOUBTFUL = 0.01  # of TIES's elements: at the threshold, where rounding decides

EPS = {"float32": 2.0**-24, "bfloat16": 2.0**-9}  # half a unit in the last place, of what is written
OLD = {"delta_base": "old"}


# ----------------------------------------------------------------------------------------------------- oracle
@dataclass(frozen=True, slots=True)
class Vector:
    """One task vector of one output tensor."""

    key: tuple[str, str, int]  # model, what it is taken from, which of several such in a slice
    delta: Array
    parameters: Mapping[str, Any]


def expected(recipe: Recipe, load: Load) -> dict[str, Array]:
    """Return every tensor of the merge, float64."""
    outputs = list(iter_outputs(recipe, load))
    squares: Counter[tuple[str, str, int]] = Counter()
    for _, _, _, vectors in outputs:
        for vector in vectors:
            squares[vector.key] += float(np.sum(vector.delta**2))  # type: ignore[assignment]
    return {
        name: merge_tensor(recipe, base, [(each, find_factor(recipe, each, depth, squares)) for each in vectors])
        for name, depth, base, vectors in outputs
    }


def find_factor(recipe: Recipe, vector: Vector, depth: float, squares: Mapping[Any, float]) -> float:
    """Return alpha + beta·l/(L-1), or the share of the squared norm."""
    step = recipe.get("coefficients", {"method": None})
    if step["method"] == "lines":
        return float(step["alpha"] + step["beta"] * depth)
    return squares[vector.key] / sum(squares.values()) if step["method"] == "metagpt" else 1.0


def merge_tensor(recipe: Recipe, base: Array, vectors: Sequence[tuple[Vector, float]]) -> Array:
    """Return one output tensor: factors, the method, the steps."""
    deltas = [np.float64(np.float32(vector.delta) * np.float32(factor)) for vector, factor in vectors]
    settings = [{**recipe.get("parameters", {}), **vector.parameters} for vector, _ in vectors]
    weight = [each["weight"] for each in settings]
    method = recipe["merge_method"]
    if method == "task_arithmetic":
        merged = task_arithmetic(base, deltas, weight=weight)
    elif method == "expo":
        merged = expo(base, deltas, weight=weight)
    else:
        merged = ties(base, deltas, weight=weight, density=[each["density"] for each in settings])
    for step in recipe.get("post", ()):
        eps = float(np.finfo(np.float32).eps)
        merged = base + svc(merged - base, deltas, eps=eps, alpha=step.get("alpha", 1.0))
    return merged


def iter_outputs(recipe: Recipe, load: Load) -> Iterator[tuple[str, float, Array, list[Vector]]]:
    """Yield each output tensor: its name, its place in the depth, the base's tensor and the task vectors."""
    slices = recipe.get("slices") or [{"sources": whole_sources(recipe, load)}]
    count = sum(find_count(part) for part in slices)
    start = 0
    for part in slices:
        for i in range(find_count(part)):
            for rest in list_rests(load(recipe["base_model"])):
                name = f"model.layers.{start + i}.{rest}"
                base, vectors = collect(recipe, part, load, name=f"model.layers.{{}}.{rest}", layer=i)
                yield name, (start + i) / (count - 1), base, vectors
        start += find_count(part)
    models = {model for part in slices for each in part["sources"] for model in (each["model"], each.get("delta_base"))}
    for name in {name for model in models - {None} for name in load(model) if not LAYER.match(name)}:
        first = name == EMBEDDING
        yield name, float(not first), *collect(recipe, slices[0 if first else -1], load, name=name)


def whole_sources(recipe: Recipe, load: Load) -> list[Mapping[str, Any]]:
    """Return the models as sources of one slice, the base as the last where it is not listed."""
    listed = [entry["model"] for entry in recipe["models"]]
    entries = [*recipe["models"], *([] if recipe["base_model"] in listed else [{"model": recipe["base_model"]}])]
    return [{**entry, "layer_range": [0, count_layers(load(entry["model"]))]} for entry in entries]


def find_count(part: Mapping[str, Any]) -> int:
    """Return the number of layers that a slice gives."""
    first, last = part["sources"][0]["layer_range"]
    return int(last - first)


def list_rests(tensors: Mapping[str, Array]) -> list[str]:
    """Return what stands after the number of a layer."""
    return [found["rest"][1:] for name in tensors if (found := LAYER.fullmatch(name)) and found["i"] == "0"]


def collect(
    recipe: Recipe, part: Mapping[str, Any], load: Load, *, name: str, layer: int = 0
) -> tuple[Array, list[Vector]]:
    """Return the base's tensor and the task vectors of one slice's tensor."""

    def read(model: str, source: Mapping[str, Any]) -> Array:
        return read_outside(load(model), name.format(source["layer_range"][0] + layer))

    own = recipe["base_model"]
    (base,) = [read(own, source) for source in part["sources"] if source["model"] == own]
    vectors: list[Vector] = []
    for source in part["sources"]:
        if source["model"] != own:
            model, start = source["model"], source.get("delta_base", own)
            lower = read(start, source) if start != own else base
            delta = np.float32(read(model, source)) - np.float32(lower)
            nth = sum(vector.key[:2] == (model, start) for vector in vectors)
            vectors.append(Vector((model, start, nth), np.float64(delta), source.get("parameters", {})))
    return base, vectors


# ------------------------------------------------------------------------------------------------------ cases
def entry(model: str, *, more: Mapping[str, Any] | None = None, **parameters: Any) -> dict[str, Any]:
    return {"model": model, **(more or {}), "parameters": parameters}


def source(model: str, first: int, last: int, *, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, last], **(more or {})}


LINES = {"method": "lines", "alpha": 0.2, "beta": 0.9}
META = {"method": "metagpt"}
SVC = [{"method": "svc"}]
TASKS: Recipe = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [entry("a", weight=1.6), entry("b", weight=-0.7)],
}
TIES: Recipe = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [entry("a", weight=1.0, density=0.4), entry("b", weight=0.6, density=0.7)],
}
CHAT = [entry("a", more=OLD, weight=0.9, density=0.5), entry("b", weight=0.7, density=0.3)]
SLICES = [
    {"sources": [source("base", 0, 2), source("a", 1, 3, more=OLD), source("b", 0, 2)]},
    {"sources": [source("b", 0, 3), source("base", 0, 3), source("a", 0, 3)]},
]
SLICED: Recipe = {"base_model": "base", "slices": SLICES, "parameters": {"weight": 0.6, "density": 0.5}}
CASES: dict[str, Recipe] = {
    "delta_base task_arithmetic": {**TASKS, "models": CHAT},
    "delta_base ties": {**TIES, "models": CHAT},
    "delta_base expo": {**TASKS, "merge_method": "expo", "models": [entry("a", more=OLD, weight=1.7)]},
    "delta_base slices": {**SLICED, "merge_method": "task_arithmetic"},
    "delta_base ties slices": {**SLICED, "merge_method": "ties"},
    "lines task_arithmetic": {**TASKS, "coefficients": LINES},
    "lines ties": {**TIES, "coefficients": LINES},
    "lines slices": {**SLICED, "merge_method": "task_arithmetic", "coefficients": LINES},
    "metagpt": {**TASKS, "coefficients": META},
    "metagpt slices": {**SLICED, "merge_method": "task_arithmetic", "coefficients": META},
    "metagpt delta_base": {**TASKS, "models": [*CHAT, entry("a", weight=0.5)], "coefficients": META},
    "metagpt ties": {**TIES, "coefficients": META},
    "metagpt twice one model": {**TASKS, "models": [*TASKS["models"], entry("a", weight=0.5)], "coefficients": META},
    "svc task_arithmetic": {**TASKS, "post": SVC},
    "svc ties": {**TIES, "post": [{"method": "svc", "alpha": 0.5}]},
    "svc delta_base slices": {**SLICED, "merge_method": "task_arithmetic", "post": SVC},
    "lines svc": {**TASKS, "coefficients": LINES, "post": SVC},
    "metagpt svc twice delta_base": {**TIES, "models": CHAT, "coefficients": META, "post": [*SVC, *SVC]},
}
ALSO = ("delta_base ties", "delta_base slices", "lines ties", "metagpt slices", "metagpt svc twice delta_base")
KINDS = {"float32": ("float32", False), "tied": ("float32", True), "bfloat16": ("bfloat16", False)}
EVERY = [("float32", name) for name in CASES] + [(kind, name) for kind in ("tied", "bfloat16") for name in ALSO]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models for each of `KINDS`: ``a`` was trained from ``old``, ``b`` from ``base``."""
    folder = tmp_path_factory.mktemp("steps")
    for kind, (dtype, tied) in KINDS.items():
        sizes: dict[str, Any] = {"layers": LAYERS, "hidden": 32, "intermediate": 48, "vocab": 96}
        sizes |= {"dtype": dtype, "tied": tied}
        base = write_llama(folder / kind / "base", seed=0, **sizes)
        old = write_llama(folder / kind / "old", seed=3, near=base, scale=0.05, **sizes)
        write_llama(folder / kind / "a", seed=1, near=old, scale=0.02, **sizes)
        write_llama(folder / kind / "b", seed=2, near=base, scale=0.03, **sizes)
    return folder


@pytest.fixture(scope="module")
def load(zoo: Path) -> Load:
    return cache(lambda model: read_arrays(Path(model)))


def in_folder(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return the recipe with the models' folders for their short names."""
    text = json.dumps(recipe)
    for name in ("base", "old", "a", "b"):
        text = text.replace(f'"{name}"', json.dumps(str(folder / name)))
    return dict(json.loads(text))


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_merge_is_what_the_formulas_say(
    kind: str, name: str, zoo: Path, load: Load, tmp_path: Path, merge_here: Merge
) -> None:
    recipe = in_folder(CASES[name], zoo / kind)
    merge_here(recipe, tmp_path / "out")
    ours, wanted = read_arrays(tmp_path / "out"), expected(recipe, load)
    assert sorted(ours) == sorted(wanted)
    assert (HEAD in ours) == (kind != "tied")
    eps, doubtful = EPS[KINDS[kind][0]], 0
    for tensor, values in wanted.items():
        room = 2 * eps * np.abs(values) + TOLERANCE * np.abs(values).max()
        differs = np.abs(ours[tensor] - values) > room
        doubtful += differs.sum()
        assert not differs.any() or recipe["merge_method"] == "ties", f"{tensor}: {np.abs(ours[tensor] - values).max()}"
    assert doubtful <= MOST_DOUBTFUL * sum(values.size for values in wanted.values())


@pytest.mark.parametrize("step", [{"coefficients": LINES}, {"coefficients": META}, {"post": SVC}])
def test_every_step_changes_the_result(step: dict[str, Any], zoo: Path, load: Load) -> None:
    """Guards the comparison: an oracle that knew no steps would differ."""
    plain = in_folder(TASKS, zoo / "float32")
    before, after = expected(plain, load), expected({**plain, **step}, load)
    matrices = [name for name in before if before[name].ndim == 2]
    assert all(np.abs(before[name] - after[name]).max() > 1e3 * TOLERANCE for name in matrices)


def test_a_delta_base_that_is_the_base_model_gives_the_same_bytes(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    folder = zoo / "bfloat16"
    named = {**TIES, "models": [{**each, "delta_base": "base"} for each in TIES["models"]]}
    for name, recipe in {"plain": TIES, "named": named}.items():
        merge_here(in_folder(recipe, folder), tmp_path / name)
    plain, found = hash_output(tmp_path / "plain"), hash_output(tmp_path / "named")
    assert {name for name in plain if plain[name] != found[name]} <= {"README.md", "recipe.yml"}
    assert any(name.endswith(".safetensors") for name in found)


def test_lines_of_one_and_none_give_the_same_tensors(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    ones = {**TIES, "coefficients": {"method": "lines", "alpha": 1, "beta": 0}}
    for name, recipe in {"plain": TIES, "ones": ones}.items():
        merge_here(in_folder(recipe, zoo / "float32"), tmp_path / name)
    left, right = (read_tensors(tmp_path / name) for name in ("plain", "ones"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_metagpt_of_one_model_is_its_whole_task_vector(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    one = {**TASKS, "models": [entry("b", weight=1)], "coefficients": META}
    merge_here(in_folder(one, zoo / "float32"), tmp_path / "out")
    ours, b = read_arrays(tmp_path / "out"), read_arrays(zoo / "float32" / "b")
    assert all(np.abs(ours[name] - b[name]).max() <= 1e-6 * np.abs(b[name]).max() for name in b)


def test_metagpt_of_models_that_are_the_base_is_the_base(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    shutil.copytree(zoo / "float32" / "base", tmp_path / "same")
    recipe = {**TASKS, "models": [entry(str(tmp_path / "same"), weight=1)], "coefficients": META}
    merge_here(in_folder(recipe, zoo / "float32"), tmp_path / "out")
    ours, base = read_tensors(tmp_path / "out"), read_tensors(zoo / "float32" / "base")
    assert all(torch.equal(ours[name], base[name]) for name in base)


def test_metagpt_of_a_model_with_nan_says_which(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    tensors = read_tensors(zoo / "float32" / "b")
    tensors["model.norm.weight"][3] = torch.nan
    shutil.copytree(zoo / "float32" / "b", tmp_path / "broken")
    write_tensors(tmp_path / "broken", tensors)
    recipe = {**TASKS, "models": [entry("a", weight=1), entry(str(tmp_path / "broken"), weight=1)]}
    recipe = in_folder({**recipe, "coefficients": META}, zoo / "float32")
    words = f"metagpt needs the norms of all task vectors, and that of {tmp_path}/broken is not finite"
    with pytest.raises(MergeError, match=words):
        merge_here(recipe, tmp_path / "out")


# ------------------------------------------------------------------------- the same bytes, however it is merged
STAGED: dict[str, Recipe] = {
    "lines ties": {**TIES, "models": [entry("A", more={"delta_base": "B"}, weight=1, density=0.4), TIES["models"][1]]},
    "metagpt": {**TASKS, "coefficients": META},
    "metagpt ties keep-base": {**TIES, "coefficients": META, "guard": {"policy": "keep-base", "growth": 0.6}},
    "svc": {**TASKS, "coefficients": LINES, "post": SVC},
}
STAGED["lines ties"] = {**STAGED["lines ties"], "coefficients": LINES}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller ``base``, ``A`` and ``B``: embeddings of 3.1 blocks, matrices of 2."""
    return write_family(tmp_path_factory.mktemp("family"), vocab=800, layers=1)


def plan_stepd(name: str, family: Path, *, part_bytes: int) -> Plan:
    """Plan one of `STAGED` over the models of the family."""
    text = json.dumps(STAGED[name])
    for short, long in {"base": "base", "a": "A", "b": "B", "A": "A", "B": "B"}.items():
        text = text.replace(f'"{short}"', json.dumps(str(family / long)))
    with parts_of(part_bytes):
        return make_plan(make_recipe_of(json.loads(text)))


@pytest.mark.parametrize("name", STAGED)
def test_any_workers_threads_slabs_memory_and_parts_give_the_same_bytes(
    name: str, family: Path, tmp_path: Path
) -> None:
    whole, cut = (plan_stepd(name, family, part_bytes=size) for size in (1 << 30, SMALL_PART))
    assert len(whole.parts) == 1
    assert len(cut.parts) > 6
    run(whole, tmp_path / "expected", workers=0, threads=1)
    expected = hash_output(tmp_path / "expected")
    runs: dict[str, tuple[Plan, dict[str, Any]]] = {
        "threads": (cut, {"threads": 4}),
        "small slabs": (whole, {"threads": 1, "slab": BLOCK}),
        "little memory": (whole, {"threads": 1, "memory": max(map(stream_bytes, whole.parts))}),
        "little memory, small slabs": (cut, {"threads": 1, "memory": max(map(stream_bytes, cut.parts)), "slab": BLOCK}),
    }
    for what, (plan, options) in runs.items():
        run(plan, tmp_path / what, workers=0, **options)
        assert hash_output(tmp_path / what) == expected, what
    with parts_of(SMALL_PART):
        assert verify(tmp_path / "threads", replay=5).replayed == 5


def test_processes_give_the_same_bytes(family: Path, tmp_path: Path) -> None:
    plan = plan_stepd("metagpt ties keep-base", family, part_bytes=SMALL_PART)
    run(plan, tmp_path / "expected", workers=0)
    committed = run(plan, tmp_path / "out", workers=2)
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "expected")
    assert 1 < sum(fault.kept_base for fault in committed.guard.faults) < plan.tensors - 1


# ------------------------------------------------------------------------------------------------------ resume
@pytest.mark.parametrize("name", ["metagpt", "metagpt ties keep-base"])
def test_a_merge_killed_half_way_ends_with_the_same_bytes(name: str, family: Path, tmp_path: Path) -> None:
    plan = plan_stepd(name, family, part_bytes=SMALL_PART)
    whole = run(plan, tmp_path / "expected", workers=0)
    half = len(plan.parts) // 2
    run_until(plan, tmp_path / "out", half)
    committed = run(plan, tmp_path / "out", workers=0)
    assert committed.redone_parts == len(plan.parts) - half
    assert committed.guard == whole.guard
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "expected")
    with parts_of(SMALL_PART):
        assert verify(tmp_path / "out", replay=3).parts == len(plan.parts)


@pytest.mark.parametrize("name", ["metagpt", "metagpt ties keep-base"])
def test_nothing_is_gathered_for_parts_that_are_kept(
    name: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_stepd(name, family, part_bytes=SMALL_PART)
    run_until(plan, tmp_path / "out", len(plan.parts))

    def refuse(*_: object) -> None:
        raise AssertionError("inputs are read again")

    for gather in ("gather_squares", "gather_piece", "gather_rest", "run_part"):
        monkeypatch.setattr(graph, gather, refuse)
    events: list[Any] = []
    committed = run(plan, tmp_path / "out", workers=0, on_event=events.append)
    assert committed.redone_parts == committed.read_bytes == 0
    finished = [event for event in events if isinstance(event, PartFinished)]
    assert [event.kept for event in finished] == [True] * len(plan.parts)
    assert isinstance(events[-1], Committed)
