"""What every merge method keeps to; methods that are added to the folder are covered by themselves.

The claims are the engine's own (`mergemill.engine.conformance`), which users put their methods through as well.
"""

import numpy as np
import pytest
import torch
from methods.entry import make_deltas, make_masks
from methods.harness import Mill, Task, fill_settings, make_values
from methods.suite import ENTRIES, find_entry, find_subject

from mergemill.engine.conformance import Claim, list_claims
from mergemill.engine.conformance.masks import SIGMAS
from mergemill.engine.methods.catalogue import find_methods, get_method
from mergemill.engine.tensors.slabs import BLOCK

METHODS = tuple(find_methods())
RANDOM = [name for name in METHODS if name in ENTRIES and ENTRIES[name].random]
CLAIMS = [
    pytest.param(claim, id=f"{name}: {claim}")
    for name in METHODS
    if name in ENTRIES
    for claim in list_claims(find_subject(name))
]


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Mill:
    return Mill(tmp_path_factory.mktemp("mill"))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_an_entry_in_the_suite(name: str) -> None:
    find_entry(name)


def test_a_method_without_an_entry_is_asked_for_one() -> None:
    with pytest.raises(AssertionError, match=r"'newest' is not in ENTRIES of tests/methods/entries; add an entry"):
        find_entry("newest")


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_method_keeps_to_the_suite(mill: Mill, claim: Claim) -> None:
    claim.run(mill)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", RANDOM)
def test_what_is_kept_is_scaled_by_the_ratio_of_l1_norms(mill: Mill, name: str, density: float) -> None:
    size = 2 * BLOCK + 5
    base, model = torch.zeros(size), make_values((size,), count=2)[1]
    given = {
        "weight": (1.0,),
        "density": (density,),
        "rescale": True,
        "normalize": False,
        **(find_entry(name).even or {}),
    }
    task = Task(name, (base, model), fill_settings(get_method(name), given, 1))
    result, (delta,), (mask,) = mill.merge(task).double().numpy(), make_deltas(task), make_masks(task)
    factor = np.abs(delta).sum() / np.abs(delta[mask]).sum()
    assert factor == pytest.approx(1 / density, rel=0.05)
    assert np.array_equal(result != 0, mask & (delta != 0))
    assert np.allclose(result[mask], factor * delta[mask], rtol=3e-7, atol=0)
    assert np.abs(result).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-6)
    error = SIGMAS * np.sqrt((1 / density - 1) * np.mean(delta**2) / size)
    assert abs(result.mean() - delta.mean()) < error, "the mean is preserved"


# ---------------------------------------------------------------------------------------------- sign election
@pytest.mark.parametrize("name", [name for name in ("ties", "dare_ties") if name in METHODS])
def test_an_elected_sign_of_zero_counts_as_plus(mill: Mill, name: str) -> None:
    inputs = (torch.tensor([10.0, 10.0]), torch.tensor([12.0, 8.0]), torch.tensor([8.0, 12.0]))
    given = {"weight": (1.0, 1.0), "density": (1.0, 1.0), "normalize": True}
    result = mill.merge(Task(name, inputs, fill_settings(get_method(name), given, 2)))
    assert result.tolist() == [12.0, 12.0]


def test_ties_keeps_exactly_as_many_as_asked_where_all_are_equal(mill: Mill) -> None:
    size = 2 * BLOCK + 100
    given = {"weight": (1.0,), "density": (0.7,), "normalize": False}
    task = Task("ties", (torch.zeros(size), torch.ones(size)), fill_settings(get_method("ties"), given, 1))
    kept = int(0.7 * size)
    for slab in (BLOCK, 3 * BLOCK):
        result = mill.merge(task, slab=slab)
        assert (result[:kept] == 1).all()
        assert (result[kept:] == 0).all()
