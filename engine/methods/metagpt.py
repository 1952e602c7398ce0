"""MetaGPT: task vectors weighed by their share of the squared norm, over the whole model.

Source: Zhou et al., "MetaGPT: merging large language models using model exclusive task arithmetic",
arXiv:2406.11385, eq. 13.

For: before a method: no weight to tune, and task vectors of unlike lengths.

Evidence: LLMs of 7B (the source).
"""

from collections.abc import Sequence

from mergemill.engine.methods.coefficients import coefficients


@coefficients
def metagpt(squares: Sequence[float]) -> Sequence[float]:
    """Return ``λᵢ = ‖Dᵢ‖² / Σⱼ ‖Dⱼ‖²``; equal shares where all task vectors are zero."""
    total = sum(squares)
    return [square / total if total > 0 else 1 / len(squares) for square in squares]
