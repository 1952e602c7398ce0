"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

import mergemill.cli
import mergemill.engine

MODULES = [
    found.name
    for package in (mergemill.engine, mergemill.cli)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not found.name.endswith("._native")  # a plain library that looks like a module of Python
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [case for name in MODULES for case in finder.find(importlib.import_module(name)) if case.examples]
    assert len(found) > 20
