"""A GPU that is not there: tensors that NumPy cannot see, on which only operations run that CUDA does to the bit.

A tensor of it says that it lies on torch's device "meta" and computes on one of the CPU. Whatever is not on the lists
below fails: what CUDA does in another order, with fused or approximate arithmetic, or from a tensor of the host that
nobody has copied.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mergemill.engine.runs.worker.workplace import DevicePlace
from mergemill.engine.tensors.device import InOrder, Streams
from mergemill.engine.tensors.workspace import Arena

SHAPES = {
    "_reshape_alias _unsafe_view alias as_strided cat clone contiguous copy_ detach diagonal empty_like expand",
    "fill_ flip masked_fill_ movedim new_empty new_full new_zeros permute select slice split squeeze stack t unbind",
    "split_with_sizes",
    "transpose unfold unsqueeze view zero_ zeros_like ones_like _to_copy new_empty_strided",
}
"""They move elements, or set them; `_to_copy` and `copy_` round once, to nearest even."""
ROUNDED_ONCE = {"abs abs_ add add_ mul mul_ neg neg_ reciprocal_ round_ rsub sqrt_ sub sub_ div div_"}
"""IEEE 754 says what they are."""
CHOICES = {
    "amax aminmax clamp clamp_ eq ge gt isfinite isinf isnan le lt lt_ eq_ ne ne_ nan_to_num_ gt_ ge_ logical_not",
    "kthvalue logical_and logical_and_ logical_or logical_or_ maximum",
}
"""One of the operands, or a truth; of `maximum` no sign of a zero is kept, and of `kthvalue` the value alone."""
INTEGERS = {"bitwise_and bitwise_and_ bitwise_left_shift bitwise_left_shift_ bitwise_not bitwise_or_ bitwise_xor"}
INTEGERS |= {"bitwise_right_shift bitwise_right_shift_ bitwise_xor_ bincount scatter_ __rshift__ bitwise_or"}
INTEGERS |= {"index cumsum count_nonzero _local_scalar_dense"}
"""On integers and truths, which wrap and add up in any order; and an index by truths."""
WHOLE = {"sum sort"}
"""On integers and truths alone: see `_check`."""
MATRICES = {"mm addmm_ linalg_eigh _linalg_eigh linalg_svd _linalg_svd linalg_cholesky_ex linalg_solve_triangular"}
MATRICES |= {"pow pow_ sum any max where minimum flip all sign _linalg_solve_ex linalg_qr linalg_vector_norm"}
MATRICES |= {"_linalg_check_errors"}
"""For whole matrices, whose bytes nobody promises."""


def _names(lists: set[str]) -> frozenset[str]:
    return frozenset(name for each in lists for name in each.split())


EXACT = _names(SHAPES | ROUNDED_ONCE | CHOICES | INTEGERS | WHOLE)
MATRIX = EXACT | _names(MATRICES)


class There(Tensor):
    """A tensor on the device."""

    inner: Tensor
    allowed = EXACT

    @staticmethod
    def __new__(cls, inner: Tensor) -> "There":
        assert not isinstance(inner, There)
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        _check(name, func, args, given)
        to_host = name == "_to_copy" and str(given.get("device")) == "cpu"
        plain = {key: tree_map(_unwrap, value) for key, value in given.items() if key != "device"}
        result = func(*tree_map(_unwrap, args), **plain)
        if to_host:
            return result.clone()
        outs = [each for each in (*args, *given.values()) if isinstance(each, Tensor)]
        return tree_map(lambda value: _wrap(value, outs), result)


def _unwrap(value: Any) -> Any:
    return (
        tuple(map(_unwrap, value)) if isinstance(value, tuple) else value.inner if isinstance(value, There) else value
    )


def _wrap(value: Any, given: Sequence[Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    for each in given:  # what was changed in place is what is returned
        if each is value or (isinstance(each, There) and each.inner is value):
            return each
    return There(value)


def _check(name: str, func: Any, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    tensors = [each for each in tree_leaves((args, dict(given))) if isinstance(each, Tensor)]
    assert name in There.allowed, f"{func}: is not known to give the same bits on a GPU"
    matrix = There.allowed is not EXACT
    if name not in ("copy_", "_to_copy"):
        strange = [each for each in tensors if not isinstance(each, There)]
        assert not strange, f"{func}: {strange} lies on the host"
    if name in ("add", "add_", "sub", "sub_", "rsub") and not matrix:
        assert given.get("alpha", 1) == 1, f"{func}: is fused with alpha"
        assert len(args) < 3, f"{func}: is fused with alpha"
    if name in ("div", "div_") and not matrix:
        assert isinstance(args[1], Tensor), f"{func}: CUDA multiplies by the reciprocal of a number"
        assert "rounding_mode" not in given
    if name == "sum" and not matrix:
        assert not args[0].is_floating_point(), f"{func}: adds floats in an order of its own"
    if name == "cumsum" and not matrix:
        assert not args[0].is_floating_point(), f"{func}: adds floats in an order of its own"
    if name == "sort":
        stable = given.get("stable") or not args[0].is_floating_point()
        assert stable, f"{func}: leaves the order of equal ones open"


class Late(InOrder):
    """What is copied to the host comes there no earlier than it is waited for."""

    def __init__(self) -> None:
        self._left: list[tuple[Tensor, Tensor]] = []
        self._passed = 0

    def get(self, into: Tensor, value: Tensor) -> int:
        self._left.append((into, value))
        return self._passed + len(self._left)

    def wait(self, mark: int | None) -> None:
        while self._left and (mark is None or self._passed < mark):
            into, value = self._left.pop(0)
            into.copy_(value)
            self._passed += 1

    def mark(self) -> int:
        return 0  # of the work, which is done at once: what is copied out may still be on its way


class SimulatedPlace(DevicePlace):
    """Lends the memory of such a device."""

    def __init__(self, memory_bytes: int, threads: int, kind: str = "cuda") -> None:
        super().__init__(memory_bytes, threads)
        self.kind = kind
        self.pinned_bytes = 0

    def streams(self) -> Streams:
        return Late()

    def pin(self, arena: Arena) -> None:
        self.pinned_bytes += len(arena)

    def _map(self, size_bytes: int) -> Any:
        return There(torch.full((size_bytes,), 0xFF, dtype=torch.uint8))  # what is used unwritten shows


@contextmanager
def whole_matrices_too() -> Iterator[None]:
    """Allow what matrix methods need, in the block."""
    There.allowed = MATRIX
    try:
        yield
    finally:
        There.allowed = EXACT
