"""Each deterministic method against mergekit 0.1.5: on whole models in float32, and in bfloat16 by the oracle.

To add a method, add a line to `CASES`. In float32 both agree element by element, to the case's tolerance of each
tensor's largest value. In bfloat16 mergekit's arithmetic rounds at every step: there our error against the float64
oracle of the suite's entry must be no larger than its own.
mergekit runs once, for all cases and both dtypes (see `reference.mergekit`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from methods.entry import Expected
from methods.harness import Task, fill_settings
from methods.suite import find_entry
from models import read_tensors, write_llama
from reference.mergekit import Job, MergekitError, find_skip_reason, run_mergekit_batch

from mergemill.engine import merge
from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.recipe import parse_recipe

Array = npt.NDArray[np.float64]
Tensors = Mapping[str, torch.Tensor]

DTYPES = ("float32", "bfloat16")
FLOAT32 = 2e-6  # of the largest value: what float32's rounding is granted where errors are compared


@dataclass(frozen=True, slots=True)
class Case:
    """One merge of whole models; a tuple among the parameters holds one value for each model."""

    method: str
    models: tuple[str, ...]
    base: str | None
    parameters: Mapping[str, Any]
    tolerance: float  # of a tensor's largest value, in float32
    either: int  # elements of a tensor that may differ: equal magnitudes at a threshold, of which either may stay

    def recipe(self, folder: Path) -> str:
        """Return the recipe over the models in `folder`."""
        models = [
            {
                "model": str(folder / model),
                "parameters": {k: v[i] for k, v in self.parameters.items() if type(v) is tuple},
            }
            for i, model in enumerate(self.models)
        ]
        shared = {key: value for key, value in self.parameters.items() if type(value) is not tuple}
        base = {"base_model": str(folder / self.base)} if self.base else {}
        recipe = {"merge_method": self.method, "models": models, "parameters": shared, "dtype": folder.name, **base}
        return json.dumps(recipe)

    def expect(self, name: str, load: Callable[[str], Tensors]) -> Expected:
        """Return what the oracle says of the tensor `name`."""
        method, sources = get_method(self.method), ([self.base] if self.base else []) + list(self.models)
        settings = fill_settings(method, self.parameters, len(self.models))
        inputs = tuple(load(model)[name] for model in sources)
        based = method.base == "optional" and self.base is not None
        return find_entry(self.method).oracle(Task(self.method, inputs, settings, name, 0, optional_base=based))


def case(
    method: str, *models: str, base: str | None = "base", tolerance: float = 5e-6, either: int = 0, **parameters: Any
) -> Case:
    """Return a case; a parameter named like one of Python's words ends in an underscore here."""
    named = {key.removesuffix("_"): value for key, value in parameters.items()}
    return Case(method, models, base, named, tolerance, either)


CASES: dict[str, Case] = {
    "linear": case("linear", "a", "b", base=None, weight=(0.7, 0.4)),
    "slerp": case("slerp", "a", t=0.3),
    "passthrough": case("passthrough", "a", base=None, scale=(0.7,)),
    "ties": case("ties", "a", "b", weight=(0.7, 0.4), density=(0.5, 0.8), lambda_=0.8),
    "dare_linear whole": case("dare_linear", "a", "b", weight=(0.7, 0.4), density=(1.0, 1.0)),
    "dare_ties whole": case("dare_ties", "a", "b", weight=(0.7, 0.4), density=(1.0, 1.0), lambda_=0.8),
    "task_arithmetic": case("task_arithmetic", "a", "b", weight=(0.7, 0.4), lambda_=0.8),
    "ram": case("ram", "a", "b", "c"),
    "ram far": case("ram", "a", "b", "c", epsilon=0.02),
    "ramplus_tl": case("ramplus_tl", "a", "b", "c", epsilon=0.02, r=0.5, alpha=3.0),
    "ramplus_tl clipped": case("ramplus_tl", "a", "b", "c", epsilon=0.01),
    "nearswap": case("nearswap", "a", t=0.01),
    "nearswap all": case("nearswap", "a", t=10.0),
    "nuslerp": case("nuslerp", "a", "b", base=None, weight=(0.7, 0.4)),
    "nuslerp based": case("nuslerp", "a", "b", weight=(0.7, 0.4)),
    "nuslerp rows": case("nuslerp", "a", "b", base=None, weight=(0.7, 0.4), nuslerp_flatten=False),
    "nuslerp rows based": case("nuslerp", "a", "b", weight=(0.7, 0.4), nuslerp_flatten=False),
    "nuslerp columns": case(
        "nuslerp", "a", "b", base=None, weight=(0.7, 0.4), nuslerp_flatten=False, nuslerp_row_wise=True
    ),
    "nuslerp columns based": case("nuslerp", "a", "b", weight=(0.7, 0.4), nuslerp_flatten=False, nuslerp_row_wise=True),
    "multislerp": case("multislerp", "a", "b", "c", base=None, weight=(0.7, 0.4, 0.2)),
    "multislerp based": case("multislerp", "a", "b", "c", weight=(0.7, 0.4, 0.2), eps=1e-3),
    "multislerp sums": case("multislerp", "a", "b", weight=(0.7, -0.4), normalize_weights=False),
    "karcher": case("karcher", "a", "b", "c", base=None, tolerance=2e-5),
    "karcher fine": case("karcher", "a", "b", "c", base=None, tolerance=2e-5, max_iter=50, tol=1e-7),
    "model_stock": case("model_stock", "a", "b", "c"),
    "model_stock rows": case("model_stock", "a", "b", "c", filter_wise=True),
    "breadcrumbs": case("breadcrumbs", "a", "b", weight=(0.7, 0.4), density=(0.5, 0.8), gamma=(0.01, 0.1)),
    "breadcrumbs scaled": case(
        "breadcrumbs", "a", "b", weight=(0.7, 0.4), density=(0.9, 0.3), gamma=(0.3, 0.1), rescale=True, normalize=True
    ),
    "breadcrumbs_ties": case(
        "breadcrumbs_ties", "a", "b", weight=(0.7, -0.4), density=(0.5, 0.5), gamma=(0.05, 0.01), lambda_=0.8
    ),
    "sce": case("sce", "a", "b", "c"),
    "sce selected": case("sce", "a", "b", "c", select_topk=0.3),
    "della whole": case("della", "a", "b", weight=(0.7, 0.4), density=(1.0, 1.0), lambda_=0.8),
    "della_linear whole": case("della_linear", "a", "b", weight=(0.7, 0.4), density=(1.0, 1.0), normalize=True),
    "arcee_fusion": case(
        "arcee_fusion", "a", either=2
    ),  # its divergences are float32's, which decide one, on some CPUs two
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each dtype, with the models that the cases name."""
    folder = tmp_path_factory.mktemp("mergekit")
    for dtype in DTYPES:
        sizes: dict[str, Any] = {"layers": 2, "vocab": 128, "dtype": dtype}
        base = write_llama(folder / dtype / "base", seed=10, **sizes)
        for i, model in enumerate(("a", "b", "c")):
            write_llama(folder / dtype / model, seed=11 + i, near=base, scale=0.02, **sizes)
    return folder


@pytest.fixture(scope="module")
def reference(zoo: Path) -> Mapping[tuple[str, str], Tensors]:
    """What mergekit makes of every case in each dtype."""
    if reason := find_skip_reason():
        pytest.skip(reason)
    jobs = {
        (dtype, name): Job(each.recipe(zoo / dtype), zoo / f"reference-{dtype}-{i}")
        for dtype in DTYPES
        for i, (name, each) in enumerate(CASES.items())
    }
    found: dict[tuple[str, str], Tensors] = {}
    for (dtype, name), result in zip(jobs, run_mergekit_batch(list(jobs.values())), strict=True):
        assert not isinstance(result, MergekitError), f"{name}: {result}"
        # Where masks make it float32 mergekit writes that, whatever the dtype asked for.
        found[dtype, name] = {tensor: values.to(getattr(torch, dtype)) for tensor, values in result.items()}
    return found


@pytest.fixture(scope="module")
def load(zoo: Path) -> Callable[[str, str], Tensors]:
    """A dtype and a model's name to its tensors."""
    return cache(lambda dtype, model: read_tensors(zoo / dtype / model))


def merge_case(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Return what mergemill makes of the case."""
    out = folder.with_name(f"merged-{folder.name}-{list(CASES).index(name)}")
    merge(parse_recipe(CASES[name].recipe(folder)), out, workers=0)
    return read_tensors(out)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_what_mergekit_gives(name: str, zoo: Path, reference: Any, load: Any) -> None:
    ours, theirs, each = merge_case(name, zoo / "float32"), reference["float32", name], CASES[name]
    assert sorted(ours) == sorted(theirs)
    for tensor, wanted in theirs.items():
        doubtful = each.expect(tensor, lambda model: load("float32", model)).doubtful
        wrong = np.abs(as_array(ours[tensor]) - as_array(wanted)) / np.abs(as_array(wanted)).max()
        wrong = wrong[~doubtful]
        assert np.sum(wrong > each.tolerance) <= each.either, f"{tensor}: {wrong.max():g}"


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_errs_no_more_than_mergekit(name: str, zoo: Path, reference: Any, load: Any) -> None:
    ours, theirs = merge_case(name, zoo / "bfloat16"), reference["bfloat16", name]
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    for tensor in theirs:
        expected = CASES[name].expect(tensor, lambda model: load("bfloat16", model))
        granted = FLOAT32 * np.abs(expected.values).max()
        our, their = (np.abs(as_array(x[tensor]) - expected.values)[~expected.doubtful] for x in (ours, theirs))
        assert our.max() <= their.max() + granted, f"{tensor}: largest error"
        assert np.sqrt(np.mean(our**2)) <= np.sqrt(np.mean(their**2)) + granted, f"{tensor}: mean error"


def as_array(tensor: torch.Tensor) -> Array:
    """Return a tensor as float64."""
    return np.asarray(tensor.double().numpy())
