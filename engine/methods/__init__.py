"""Merge methods, one file each: pure functions of tensors that know no file, no model and no Dask.

The names here are what a method of your own is written with, and how methods are found.
"""

from mergemill.engine.methods.catalogue import find_coefficients, find_methods, find_steps
from mergemill.engine.methods.coefficients import Coefficients
from mergemill.engine.methods.contract import Density, Method, Parameter, PerModel, Within, merge_method
from mergemill.engine.methods.own import find_all_methods, open_methods
from mergemill.engine.methods.steps import Step

__all__ = [
    "Coefficients",
    "Density",
    "Method",
    "Parameter",
    "PerModel",
    "Step",
    "Within",
    "find_all_methods",
    "find_coefficients",
    "find_methods",
    "find_steps",
    "merge_method",
    "open_methods",
]
