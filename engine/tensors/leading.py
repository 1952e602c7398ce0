"""The leading eigenvectors of a Gram matrix: all by LAPACK where it is small, else a few by a block Krylov method.

Source: Musco and Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
Decomposition", arXiv:1504.05477; restarted with its best vectors where the basis would grow too large. What more steps
would still gain is 1e-5 of what is left out: then the product of what they span is within 1e-6 of the best one.
"""

from mergemill.engine.tensors.lazy import Tensor, torch

SMALL = 512  # rows up to which all eigenvectors are as quick
_BESIDE = 16  # vectors of a block beyond those that are wanted
_STEPS = 12  # before a restart
_FEWEST_STEPS = 6
_MOST_STEPS = 120  # then all eigenvectors are found
_GAIN = 1e-5  # of what is left out


def find_leading(gram: Tensor, count: int) -> Tensor:
    """Return the eigenvectors ``[n, count]`` of the largest eigenvalues of ``gram [n, n]``, float64, largest first."""
    width, steps = _choose_block(len(gram), count)
    found = _iterate(gram, count, width, steps) if steps else None
    return torch.linalg.eigh(gram)[1].flip(1)[:, :count] if found is None else found


def leading_bytes(size: int, count: int) -> int:
    """Return an upper bound of what `find_leading` allocates for a Gram matrix of so many rows."""
    width, steps = _choose_block(size, count)
    return 8 * (2 * size * width * (steps + 2) + 4 * (width * steps) ** 2) if steps else 8 * 3 * size * (size + 8)


def _choose_block(size: int, count: int) -> tuple[int, int]:
    """Return how wide a block is and how many make up the basis; none where all eigenvectors are found at once."""
    width = count + _BESIDE
    steps = min(_STEPS, size // 2 // width)
    return width, steps if size > SMALL and steps >= _FEWEST_STEPS else 0


def _iterate(gram: Tensor, count: int, width: int, steps: int) -> Tensor | None:
    size, trace, last = len(gram), float(gram.trace()), 0.0
    random = torch.Generator().manual_seed(0)
    block = torch.linalg.qr(torch.randn(size, width, generator=random, dtype=gram.dtype))[0]
    basis, small = gram.new_empty(size, width * steps), gram.new_empty(width * steps, width * steps)
    for number in range(_MOST_STEPS):
        start = number % steps * width
        stop = start + width
        basis[:, start:stop] = block
        product = gram @ block
        small[:stop, start:stop] = basis[:, :stop].T @ product
        small[start:stop, :start] = small[:start, start:stop].T
        values, vectors = torch.linalg.eigh(small[:stop, :stop], UPLO="U")
        found = float(values[-count:].sum())
        if start and found - last <= _GAIN * max(trace - found, 1e-12 * trace):  # a restart gains nothing by itself
            leading: Tensor = basis[:, :stop] @ vectors[:, -count:].flip(1)
            return leading
        last = found
        if stop == width * steps:
            block = torch.linalg.qr(basis @ vectors[:, -width:])[0]
        else:
            block = _make_orthogonal(product, basis[:, :stop])
    return None


def _make_orthogonal(block: Tensor, basis: Tensor) -> Tensor:
    """Return an orthonormal block of what `basis` does not span yet; twice, since rounding leaves some of it."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
    return block - basis @ (basis.T @ block)
