"""The examples in the docstrings of the rooms of tensors and methods are true."""

import doctest
import importlib
import pkgutil

import pytest

from mergemill.engine import methods, tensors

MODULES = [
    f"{room.__name__}.{found.name}" for room in (tensors, methods) for found in pkgutil.iter_modules(room.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
