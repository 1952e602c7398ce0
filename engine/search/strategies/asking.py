"""What a strategy is."""

from collections.abc import Generator, Sequence
from typing import Any

from mergemill.engine.recipe.templates import Values

Asked = Sequence[Values]
"""The candidates of one generation."""
Asking = Generator[Asked, Any, str]
"""Yields generations, is sent a rank of each candidate, and returns why it ended.

A rank is less for a better one, and infinite where it failed; where several objectives are searched, it is that of
each.
"""
