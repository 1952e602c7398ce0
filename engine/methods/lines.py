"""LiNeS: task vectors scaled by depth, little in the first layers and more in the last.

Source: Wang et al., "LiNeS: post-training layer scaling prevents forgetting and enhances model merging",
arXiv:2410.17146, eq. 3.

For: before a method: what the base does in general is to be kept.

Evidence: CLIP ViTs, T5 and policies of LLMs (the source).
"""

from mergemill.engine.methods.coefficients import coefficients


@coefficients
def lines(depth: float, *, alpha: float, beta: float) -> float:
    """Return ``alpha + beta · l/(L-1)`` for layer l of L; `alpha` before the layers, ``alpha + beta`` after them."""
    return alpha + beta * depth
