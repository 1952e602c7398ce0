"""torch, imported when it is first used: a second or two that plans and merges in native loops need not wait for.

Everywhere in the engine ``from mergemill.engine.tensors.lazy import Tensor, torch`` stands for ``import torch``.
"""

import importlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

_LOCK = threading.RLock()
_waiting: list[Callable[[], None]] = []


def on_first_use(act: Callable[[], None]) -> None:
    """Call `act` when torch is first used through this module, before the one who asked for it gets anything."""
    _waiting.append(act)


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
            with _LOCK:  # nobody computes before those who wait have acted
                found = getattr(importlib.import_module("torch"), name)
                while _waiting:
                    _waiting.pop()()
            setattr(self, name, found)
            return found

    torch = _Torch()
