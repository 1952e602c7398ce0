"""torch, imported when it is first used: a second or two that plans and merges in native loops need not wait for.

Everywhere in the engine ``from mergemill.engine.tensors.lazy import Tensor, torch`` stands for ``import torch``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor

    Dtype = torch.dtype
else:

    class Tensor:
        """Stands for `torch.Tensor` in annotations, and nowhere else."""

    class Dtype:
        """Stands for `torch.dtype` in annotations, and nowhere else."""

    class _Torch:
        """Has the attributes of torch, each fetched once."""

        def __getattr__(self, name: str) -> Any:
            found = getattr(importlib.import_module("torch"), name)
            setattr(self, name, found)
            return found

    torch = _Torch()
