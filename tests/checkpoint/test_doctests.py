"""The examples in the docstrings of this room are true."""

import doctest
import importlib
import pkgutil

import pytest

from mergemill.engine import checkpoint


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(checkpoint.__path__)])
def test_examples_are_true(name):
    assert doctest.testmod(importlib.import_module(f"{checkpoint.__name__}.{name}")).failed == 0
