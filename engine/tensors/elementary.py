"""exp, log and tanh of float64 tensors that give the same bits on every machine.

A library's own follow the processor: MKL's, which torch calls, differ between SSE, AVX2 and AVX-512. These are made
of single additions, multiplications and divisions, which IEEE 754 rounds one by one, and of whole powers of two, which
are bits. An error is at most about three units in the last place of float64.
"""

import math
from collections.abc import Iterator

from mergemill.engine.tensors.device import is_on_host
from mergemill.engine.tensors.lazy import Tensor, torch

PIECE = 1 << 15  # elements that are worked on at once: with the scratch they stay in the L2 cache

# ln 2 in two parts: the first has so few bits that its product with an exponent is exact.
_LN2_HIGH, _LN2_LOW = float.fromhex("0x1.62e42fee00000p-1"), float.fromhex("0x1.a39ef35793c76p-33")
_LEAST, _MOST = -708.0, 709.0
# r·coth(r/2) in r², for |r| <= ln(2)/2: 2·B/(2i)! with Bernoulli's numbers B, the highest power first.
_BERNOULLI = (-691 / 2730, 5 / 66, -1 / 30, 1 / 42, -1 / 30, 1 / 6, 1.0)
_COTH = tuple(2 * b / math.factorial(2 * (6 - i)) for i, b in enumerate(_BERNOULLI))
_ATANH = tuple(1.0 / i for i in range(23, 0, -2))  # atanh(s)/s in s², for |s| <= 0.172, the highest power first
_MANTISSA_BITS, _BIAS = 52, 1023
_ROOT_HALF_BITS = 0x3FE6A09E667F3BCD


def exp_(x: Tensor) -> Tensor:
    """Replace flat float64 `x` by e to its power; -708 stands for anything below, 709 for anything above."""
    for piece, scratch in _iterate_pieces(x):
        power = _reduce(piece.clamp_(_LEAST, _MOST), scratch)
        _expm1_near_zero(piece, scratch).add_(1.0).mul_(_power_of_two(power, scratch))
    return x


def tanh_(x: Tensor) -> Tensor:
    """Replace flat float64 `x` by its hyperbolic tangent, ``expm1(2x) / (expm1(2x) + 2)``."""
    for piece, scratch in _iterate_pieces(x):
        power = _reduce(piece.clamp_(-20.0, 20.0).mul_(2.0), scratch)
        _expm1_near_zero(piece, scratch)
        scale = _power_of_two(power, scratch)
        piece.mul_(scale).add_(scale.sub_(1.0))
        piece.div_(torch.add(piece, 2.0, out=scratch[0]))
    return x


def log_(x: Tensor) -> Tensor:
    """Replace flat float64 `x`, positive, finite and not denormal, by its natural logarithm."""
    for piece, scratch in _iterate_pieces(x):
        exponent, other, series = scratch[0].view(torch.int64), scratch[1], scratch[2]
        bits = piece.view(torch.int64)
        torch.sub(bits, _ROOT_HALF_BITS, out=exponent).bitwise_right_shift_(_MANTISSA_BITS)
        bits.sub_(torch.bitwise_left_shift(exponent, _MANTISSA_BITS, out=other.view(torch.int64)))
        # The piece is from √½ to √2 now, and log m = 2·atanh((m-1)/(m+1)).
        torch.add(piece, 1.0, out=other)
        piece.sub_(1.0).div_(other)
        _sum_powers(_ATANH, torch.mul(piece, piece, out=other), series)
        piece.mul_(2.0).mul_(series)
        power = series.copy_(exponent)
        piece.add_(torch.mul(power, _LN2_LOW, out=other)).add_(power.mul_(_LN2_HIGH))
    return x


def _iterate_pieces(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = min(PIECE, len(x)) if is_on_host(x) else len(x)
    scratch = x.new_empty(3, size)
    for piece in torch.split(x, max(1, size)):
        yield piece, scratch[:, : len(piece)]


def _reduce(x: Tensor, scratch: Tensor) -> Tensor:
    """Replace `x` by r with ``e^x = 2^power · e^r`` and |r| <= ln(2)/2; returns the power, in ``scratch[0]``."""
    power = torch.mul(x, math.log2(math.e), out=scratch[0]).round_()
    x.sub_(torch.mul(power, _LN2_HIGH, out=scratch[1]))
    x.sub_(torch.mul(power, _LN2_LOW, out=scratch[1]))
    return power


def _expm1_near_zero(x: Tensor, scratch: Tensor) -> Tensor:
    """Replace `x` by ``e^x - 1 = 2x / (x·coth(x/2) - x)``; ``scratch[1:]`` is overwritten."""
    coth = _sum_powers(_COTH, torch.mul(x, x, out=scratch[1]), scratch[2]).sub_(x)
    return x.mul_(2.0).div_(coth)


def _power_of_two(power: Tensor, scratch: Tensor) -> Tensor:
    bits = scratch[1].view(torch.int64).copy_(power)
    return bits.add_(_BIAS).bitwise_left_shift_(_MANTISSA_BITS).view(torch.float64)


def _sum_powers(coefficients: tuple[float, ...], x: Tensor, out: Tensor) -> Tensor:
    """Return the polynomial in `x`, by Horner's rule; the highest power's coefficient comes first."""
    torch.mul(x, coefficients[0], out=out).add_(coefficients[1])
    for coefficient in coefficients[2:]:
        out.mul_(x).add_(coefficient)
    return out
