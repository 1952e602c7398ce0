"""What a strategy is."""

from collections.abc import Generator, Sequence

from mergemill.engine.recipe.templates import Values

Asked = Sequence[Values]
"""The candidates of one generation."""
Ranks = Sequence[float]
"""Of each what is less for a better one; infinite where it failed."""
Asking = Generator[Asked, Ranks, str]
"""Yields generations, is sent their ranks, and returns why it ended."""
