"""Where in the output a slab lies: what position-keyed random numbers and ties are decided by."""

import math
from typing import NamedTuple

from mergemill.engine.tensors.slabs import BLOCK


class Place(NamedTuple):
    """The output tensor that is being made, and the slab's first element in it."""

    tensor: str  # name in the output
    shape: tuple[int, ...]  # of the whole tensor
    seed: int  # of the recipe's random numbers
    models: tuple[int, ...]  # each input's place in the recipe, in the order of the inputs
    start: int = 0  # element; a multiple of the block
    block: int = BLOCK  # elements at whose multiples the tensor is cut

    @property
    def size(self) -> int:
        """The number of elements of the whole tensor."""
        return math.prod(self.shape)

    def at(self, start: int) -> "Place":
        """Return the place of the slab that begins at element `start`."""
        return Place(self.tensor, self.shape, self.seed, self.models, start, self.block)
