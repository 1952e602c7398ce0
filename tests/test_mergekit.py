"""The seven methods against mergekit 0.1.5, and against the float64 oracle, on whole models in float32.

Deterministic methods agree element by element, to `TOLERANCE` of each tensor's largest value. What is
random cannot: there every task vector that is thinned must show the same density, mean and rescaling
in both outputs.
mergekit runs once, for all recipes (see `reference.mergekit`); without it the oracle's half still runs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import floor, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from models import read_arrays, read_tensors, write_llama
from oracles import expected, resolve
from reference.mergekit import Job, MergekitError, find_skip_reason, run_mergekit_batch

from mergemill.engine import merge
from mergemill.engine.recipe import parse_recipe
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.random import keep_with_probability

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Tensors = Mapping[str, Array]

TOLERANCE = 2e-6  # of a tensor's largest value
SIGMAS = 5.0  # how far a random count or mean may be from what is expected
LEAST_ELEMENTS = 1000  # a norm's 64 elements say nothing about a density

LAYERS = 5


@dataclass(frozen=True, slots=True)
class Case:
    """One recipe, with models by their short names."""

    recipe: Mapping[str, Any]
    random: bool = False


def entry(model: str, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "parameters": parameters}


def source(model: str, first: int, last: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, last], "parameters": parameters}


DEPTH = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
WEIGHT = [{"filter": "mlp", "value": [0.2, 0.9]}, {"filter": "o_proj", "value": 0.0}, {"value": 0.6}]


def make_cases(base: str, a: str, b: str) -> dict[str, Case]:
    """Return every method in every shape of recipe, for models that are tied or not."""
    task_vectors = {"base_model": base, "models": [entry(a, weight=0.7), entry(b, weight=WEIGHT)]}
    sparse = {
        "base_model": base,
        "models": [
            entry(a, weight=0.7, density=[1, 0.6, 0.2]),
            entry(b, weight=WEIGHT, density=[{"filter": "mlp", "value": 0.3}, {"value": 0.55}]),
        ],
    }
    listed = {"base_model": base, "models": [{"model": base}, entry(a, weight=0.5), entry(b, weight=-0.3)]}
    half = {"parameters": {"weight": 0.6, "density": 0.5}}
    based_slices = [
        {"sources": [{**source(base, 0, 3), "parameters": {}}, source(a, 0, 3, density=[0.2, 0.8])], **half},
        {"sources": [source(b, 1, 4), source(base, 2, 5)], **half},
    ]
    slerp_slices = [
        {"sources": [source(a, 0, 5), source(b, 0, 5)]},
        {"sources": [source(b, 3, 5), source(a, 2, 4)], "parameters": {"t": 0.25}},
    ]
    no_ops = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.5}, {"value": 1.5}]
    stacked = [
        {"sources": [source(a, 0, 4)]},
        {"sources": [source(b, 1, 3, scale=no_ops)]},
        {"sources": [source(a, 3, 5, scale=[0.5, 2])]},
    ]
    plain: dict[str, dict[str, Any]] = {
        "linear": {"models": [entry(a, weight=1.0), entry(b, weight=0.3), entry(base, weight=0.5)]},
        "linear sums": {
            "models": [entry(a, weight=WEIGHT), entry(b, weight=0.3)],
            "parameters": {"normalize": False},
        },
        "linear slices": {"slices": [{"sources": [source(a, 0, 2), source(b, 3, 5)], "parameters": {"weight": 1}}]},
        "slerp": {"base_model": a, "models": [{"model": b}], "parameters": {"t": DEPTH}},
        "slerp slices": {"base_model": a, "slices": slerp_slices, "parameters": {"t": DEPTH}},
        "task_arithmetic": task_vectors | {"parameters": {"lambda": 1.3}},
        "task_arithmetic listed": listed,
        "task_arithmetic normalized": task_vectors | {"parameters": {"normalize": True}},
        "task_arithmetic slices": {"base_model": base, "slices": based_slices},
        "ties": sparse,
        "ties listed": listed | {"parameters": {"density": 0.5, "lambda": 0.8}},
        "ties sums": sparse | {"parameters": {"normalize": False, "rescale": True}},
        "ties slices": {"base_model": base, "slices": based_slices},
        "passthrough slices": {"slices": stacked},
        "passthrough": {
            "models": [{"model": a}],
            "parameters": {"scale": [{"filter": "lm_head", "value": 2}]},
        },
    }
    random: dict[str, dict[str, Any]] = {
        "dare_linear": {"base_model": base, "models": [entry(a, weight=0.8, density=0.4)]},
        "dare_linear gradient": {"base_model": base, "models": [entry(b, weight=1, density=[0.9, 0.2])]},
        "dare_linear raw": {"base_model": base, "models": [entry(a, weight=1)], **THIN},
        "dare_linear slices": {"base_model": base, "slices": [{**part, **half} for part in based_slices]},
        "dare_linear two": sparse,
        "dare_ties two": sparse,
        "dare_ties normalized": sparse | {"parameters": {"normalize": True, "rescale": False}},
        "dare_ties": {"base_model": base, "models": [entry(a, weight=0.8, density=0.4)]},
    }
    return {
        name: Case({"merge_method": name.split()[0], **recipe}, random)
        for cases, random in ((plain, False), (random, True))
        for name, recipe in cases.items()
    }


THIN = {"parameters": {"density": [{"filter": "mlp", "value": 0.25}, {"value": 0.7}], "rescale": False}}
ALSO_TIED = (
    "linear",
    "slerp",
    "task_arithmetic",
    "ties",
    "ties slices",
    "passthrough slices",
    "dare_linear",
    "dare_ties two",
)
CASES = {f"untied: {name}": case for name, case in make_cases("base", "a", "b").items()} | {
    f"tied: {name}": case for name, case in make_cases("tied-base", "tied-a", "tied-b").items() if name in ALSO_TIED
}
EXACT = [name for name, case in CASES.items() if not case.random]
RANDOM = [name for name, case in CASES.items() if case.random]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that the cases name: Llamas stored in float32."""
    folder = tmp_path_factory.mktemp("mergekit")
    for prefix, tied, seed in (("", False, 10), ("tied-", True, 20)):
        sizes: dict[str, Any] = {"layers": LAYERS, "vocab": 128, "dtype": "float32", "tied": tied}
        base = write_llama(folder / f"{prefix}base", seed=seed, **sizes)
        write_llama(folder / f"{prefix}a", seed=seed + 1, near=base, scale=0.02, **sizes)
        write_llama(folder / f"{prefix}b", seed=seed + 2, near=base, scale=0.02, **sizes)
    return folder


@pytest.fixture(scope="module")
def reference(zoo: Path) -> Mapping[str, Tensors]:
    """What mergekit makes of every case."""
    if reason := find_skip_reason():
        pytest.skip(reason)
    jobs = [
        Job(json.dumps(place_models(case.recipe, zoo)), zoo / f"reference-{i}") for i, case in enumerate(CASES.values())
    ]
    found: dict[str, Tensors] = {}
    for name, result in zip(CASES, run_mergekit_batch(jobs), strict=True):
        assert not isinstance(result, MergekitError), f"{name}: {result}"
        found[name] = as_arrays(result)
    return found


@pytest.fixture(scope="module")
def merged(zoo: Path) -> Any:
    """A case's name to what mergemill makes of it; each is merged once."""

    @cache
    def merge_case(name: str) -> Tensors:
        recipe = parse_recipe(json.dumps(place_models(CASES[name].recipe, zoo)))
        out = zoo / f"merged-{list(CASES).index(name)}"
        merge(recipe, out, workers=0)
        return as_arrays(read_tensors(out))

    return merge_case


@pytest.mark.parametrize("name", EXACT)
def test_deterministic_methods_are_what_mergekit_gives(name: str, zoo: Path, merged: Any, reference: Any) -> None:
    ours, theirs = merged(name), reference[name]
    assert sorted(ours) == sorted(theirs)
    for tensor, wanted in theirs.items():
        differs = np.abs(ours[tensor] - wanted) > TOLERANCE * np.abs(wanted).max()
        if CASES[name].recipe["merge_method"] == "ties":
            # Of several elements exactly at the threshold mergekit keeps any, we the first.
            assert differs.sum() == count_ties(name, zoo, tensor, differs), tensor
        else:
            assert not differs.any(), f"{tensor}: {np.abs(ours[tensor] - wanted).max()}"


@pytest.mark.parametrize("name", EXACT)
def test_deterministic_methods_are_what_the_oracle_says(name: str, zoo: Path, merged: Any) -> None:
    check_equal(merged(name), expected(CASES[name].recipe, load_from(zoo)))


@pytest.mark.parametrize("name", RANDOM)
def test_random_methods_are_what_the_oracle_says_of_the_same_masks(name: str, zoo: Path, merged: Any) -> None:
    recipe = CASES[name].recipe

    def mask(tensor: str, model: str, shape: tuple[int, ...], density: float) -> Bools:
        place = Place(tensor, shape, 0, ())
        kept = keep_with_probability(place, find_place(recipe, tensor, model), density, torch.empty(place.size))
        return kept.bool().reshape(shape).numpy()

    check_equal(merged(name), expected(recipe, load_from(zoo), mask=mask))


@pytest.mark.parametrize("name", [name for name in RANDOM if name.split(": ")[1] in ("dare_linear", "dare_ties")])
def test_dropping_keeps_the_same_share_mean_and_norm_as_mergekit(
    name: str, zoo: Path, merged: Any, reference: Any
) -> None:
    """One model, density 0.4, weight 0.8: what is added to the base is 0.8 · D[kept] · ‖D‖₁/‖D[kept]‖₁."""
    kind = name.split(": ")[0]
    base, model = (load_from(zoo)({"untied": "", "tied": "tied-"}[kind] + short) for short in ("base", "a"))
    for tensors in (merged(name), reference[name]):
        for tensor in base:
            delta = model[tensor] - base[tensor]
            added = tensors[tensor] - base[tensor]
            check_dropped(delta, added, density=0.4, weight=0.8)


@pytest.mark.parametrize("name", RANDOM)
def test_random_methods_have_the_distribution_of_mergekit(name: str, zoo: Path, merged: Any, reference: Any) -> None:
    """Of every large tensor: the share of changed elements, the mean, and the L1 norm of what is added."""
    ours, theirs = merged(name), reference[name]
    start = expected(start_from_base(CASES[name].recipe), load_from(zoo))
    assert sorted(ours) == sorted(theirs) == sorted(start)
    for tensor in (tensor for tensor, values in start.items() if values.size >= LEAST_ELEMENTS):
        added, wanted = ours[tensor] - start[tensor], theirs[tensor] - start[tensor]
        size = added.size
        share, wanted_share = (float(np.mean(is_changed(x, start[tensor]))) for x in (added, wanted))
        spread = sqrt(2 * max(wanted_share * (1 - wanted_share), 1 / size) / size)
        assert abs(share - wanted_share) <= SIGMAS * spread, f"{tensor}: {share} of {wanted_share} changed"
        spread = sqrt((added.var() + wanted.var()) / size)
        assert abs(added.mean() - wanted.mean()) <= SIGMAS * spread, tensor
        sizes, wanted_sizes = np.abs(added), np.abs(wanted)
        spread = sqrt((sizes.var() + wanted_sizes.var()) / size)
        assert abs(sizes.mean() - wanted_sizes.mean()) <= SIGMAS * spread, tensor


def check_equal(ours: Tensors, wanted: Tensors) -> None:
    """Compare two merges element by element."""
    assert sorted(ours) == sorted(wanted)
    for tensor, values in wanted.items():
        error = np.abs(ours[tensor] - values).max()
        assert error <= TOLERANCE * np.abs(values).max(), f"{tensor}: {error}"


def check_dropped(delta: Array, added: Array, *, density: float, weight: float) -> None:
    """Check one thinned task vector: how many were kept, and that one factor restores the L1 norm."""
    kept = np.abs(added) > 0.05 * weight * np.abs(delta)
    telling = np.abs(delta) > 1e-3  # float32 next to the base leaves these enough digits
    share = float(kept[telling].mean())
    if telling.sum() >= LEAST_ELEMENTS:
        assert abs(share - density) <= SIGMAS * sqrt(density * (1 - density) / telling.sum())
    ratios = added[kept & telling] / delta[kept & telling]
    factor = weight * np.abs(delta).sum() / np.abs(delta[kept]).sum()
    assert np.abs(ratios / factor - 1).max() <= 2e-3
    assert abs(np.abs(added).sum() / (weight * np.abs(delta).sum()) - 1) <= 1e-3


def is_changed(added: Array, start: Array) -> Bools:
    """Say which elements differ from the base by more than the rounding of float32."""
    return np.asarray(np.abs(added) > 2e-7 * np.abs(start).max())


def start_from_base(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe that gives the base's tensors under the output's names."""
    base = recipe["base_model"]
    if "models" in recipe:
        return {"merge_method": "passthrough", "models": [{"model": base}]}
    slices = [
        {"sources": [{**each, "parameters": {}} for each in part["sources"] if each["model"] == base]}
        for part in recipe["slices"]
    ]
    return {"merge_method": "passthrough", "slices": slices}


def count_ties(name: str, zoo: Path, tensor: str, differs: Bools) -> int:
    """Return how many of the elements that differ have exactly the least magnitude that some model keeps."""
    recipe, load = CASES[name].recipe, load_from(zoo)
    if not differs.any() or "models" not in recipe:
        return 0
    base = load(recipe["base_model"])[tensor].astype(np.float32)
    layer = next((int(word) for word in tensor.split(".") if word.isdigit()), 0)
    at_threshold = np.zeros(differs.shape, bool)
    for each in recipe["models"]:
        levels = (each.get("parameters", {}), recipe.get("parameters", {}))
        density = resolve(levels, "density", name=tensor, t=layer / (LAYERS - 1))
        sizes = np.abs(load(each["model"])[tensor].astype(np.float32) - base)
        if 0 < density < 1:
            at_threshold |= sizes == np.sort(sizes, axis=None)[-max(1, floor(density * sizes.size))]
    return int((differs & at_threshold).sum())


def find_place(recipe: Mapping[str, Any], tensor: str, model: str) -> int:
    """Return the model's place among the sources that make `tensor`: what random numbers are keyed by."""
    if "models" in recipe:
        return [each["model"] for each in recipe["models"]].index(model)
    first, last = recipe["slices"]
    layer = next((int(word) for word in tensor.split(".") if word.isdigit()), 0 if "embed" in tensor else LAYERS)
    lower = first["sources"][0]["layer_range"]
    part = first if layer < lower[1] - lower[0] else last
    return [each["model"] for each in part["sources"]].index(model)


def load_from(zoo: Path) -> Any:
    """Return a function from a model's short name to its tensors."""
    return cache(lambda model: read_arrays(zoo / model))


def as_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """Return tensors, which must be float32, as float64 arrays."""
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def place_models(value: Any, zoo: Path) -> Any:
    """Return a recipe with every model's short name as a path."""
    if isinstance(value, Mapping):
        return {
            key: str(zoo / item) if key in ("model", "base_model") else place_models(item, zoo)
            for key, item in value.items()
        }
    return [place_models(item, zoo) for item in value] if isinstance(value, list) else value
