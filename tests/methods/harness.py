"""Runs a method as a worker does: the engine's own `mill`, under the names that the tests know it by."""

from mergemill.engine.conformance.mill import (
    Mill,
    Roomy,
    Settings,
    Task,
    bits_of,
    cut_pieces,
    fill_settings,
    make_values,
    pickled,
)
from mergemill.engine.tensors.dtypes import NAMES

__all__ = [
    "NAMES",
    "Mill",
    "Roomy",
    "Settings",
    "Task",
    "bits_of",
    "cut_pieces",
    "fill_settings",
    "make_values",
    "pickled",
]
