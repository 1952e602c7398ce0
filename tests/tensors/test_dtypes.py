"""The dtypes of safetensors, and what they become together."""

from itertools import permutations, product

import pytest
import torch
from safetensors.torch import _TYPES as SAFETENSORS_TYPES

from mergemill.engine.tensors.dtypes import (
    RECIPE_DTYPES,
    TORCH_DTYPES,
    compute_dtype,
    is_mergeable,
    item_bytes,
    promote,
)

FLOATS = [name for name in TORCH_DTYPES if is_mergeable(name)]


def test_names_are_those_of_safetensors() -> None:
    unknown = {"F8_E8M0": torch.float8_e8m0fnu}  # to its module for torch; a file may have it
    assert {name: {**unknown, **SAFETENSORS_TYPES}[name] for name in TORCH_DTYPES} == TORCH_DTYPES


def test_recipe_names_are_those_of_torch() -> None:
    assert all(getattr(torch, recipe) is TORCH_DTYPES[name] for recipe, name in RECIPE_DTYPES.items())


def test_floats_are_mergeable_and_nothing_else() -> None:
    assert FLOATS == ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]
    assert not any(map(is_mergeable, ("I64", "U8", "BOOL", "F4", "unheard of")))


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_item_bytes_are_those_of_torch(name: str) -> None:
    assert item_bytes(name) == torch.empty(1, dtype=TORCH_DTYPES[name]).element_size()


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_one_dtype_stays(name: str) -> None:
    assert promote([name]) == promote([name, name, name]) == name


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("BF16", "F16"), "F32"),
        (("BF16", "F32"), "F32"),
        (("F16", "F32", "BF16"), "F32"),
        (("F64", "BF16"), "F64"),
        (("F8_E4M3", "F8_E5M2"), "BF16"),
        (("F8_E4M3", "BF16"), "BF16"),
        (("F8_E4M3", "F16"), "F32"),
    ],
)
def test_the_narrowest_that_holds_all(dtypes: tuple[str, ...], expected: str) -> None:
    assert {promote(order) for order in permutations(dtypes)} == {expected}


@pytest.mark.parametrize("dtypes", [pytest.param(pair, id="-".join(pair)) for pair in product(FLOATS, FLOATS)])
def test_a_promoted_dtype_holds_every_value(dtypes: tuple[str, str]) -> None:
    wide = torch.finfo(TORCH_DTYPES[promote(dtypes)])
    for name in dtypes:
        narrow = torch.finfo(TORCH_DTYPES[name])
        assert wide.max >= narrow.max
        assert wide.eps <= narrow.eps


def test_float64_is_accumulated_where_an_input_is() -> None:
    assert compute_dtype(["BF16", "F64", "F32"]) == "F64"
    assert {compute_dtype([name]) for name in FLOATS if name != "F64"} == {"F32"}
    assert compute_dtype(iter(["F16", "F64"])) == "F64"
