"""Calls of a function by workers, for what is no part of a plan."""

from collections.abc import Callable, Sequence
from typing import Any

from dask.delayed import Delayed, delayed


def make_calls(function: Callable[[bytes], Any], specs: Sequence[bytes], name: str, token: str) -> list[Delayed]:
    """Return a task for each argument. function: of a module that workers can import. token: that of the crew."""
    later = delayed(function, pure=False)
    return [later(spec, dask_key_name=f"{name}-{number:06d}-{token}") for number, spec in enumerate(specs)]
