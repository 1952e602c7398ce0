"""Normal random numbers keyed by position, with the same bits on every machine.

A uniform number u of `random.py` becomes the normal quantile of u. Source: Wichura, "Algorithm AS 241: The Percentage
Points of the Normal Distribution", Applied Statistics 37 (1988), PPND16: an error of about 1e-16. Of 32 random bits no
quantile lies beyond ±6.4, so its third region, the far tail, is never asked for.
"""

from mergemill.engine.tensors.elementary import log_
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.random import draw_uniform

PIECE = 1 << 15  # elements that are worked on at once
NORMAL_BYTES = 8 * 8 * PIECE  # beside the slab: some float64 for each of them

# Coefficients of the two quotients of polynomials, the highest power first.
_MIDDLE = (
    (
        2.5090809287301226727e3,
        3.3430575583588128105e4,
        6.7265770927008700853e4,
        4.5921953931549871457e4,
        1.3731693765509461125e4,
        1.9715909503065514427e3,
        1.3314166789178437745e2,
        3.3871328727963666080e0,
    ),
    (
        5.2264952788528545610e3,
        2.8729085735721942674e4,
        3.9307895800092710610e4,
        2.1213794301586595867e4,
        5.3941960214247511077e3,
        6.8718700749205790830e2,
        4.2313330701600911252e1,
        1.0,
    ),
)
_TAIL = (
    (
        7.74545014278341407640e-4,
        2.27238449892691845833e-2,
        2.41780725177450611770e-1,
        1.27045825245236838258e0,
        3.64784832476320460504e0,
        5.76949722146069140550e0,
        4.63033784615654529590e0,
        1.42343711074968357734e0,
    ),
    (
        1.05075007164441684324e-9,
        5.47593808499534494600e-4,
        1.51986665636164571966e-2,
        1.48103976427480074590e-1,
        6.89767334985100004550e-1,
        1.67638483018380384940e0,
        2.05319162663775882187e0,
        1.0,
    ),
)
_MIDDLE_HALF = 0.425  # how far from 1/2 the middle goes


def draw_normal(place: Place, model: int, out: Tensor) -> Tensor:
    """Fill the flat float64 slab `out`, which begins at ``place.start``, with numbers of N(0, 1)."""
    for piece in torch.split(draw_uniform(place, model, out), PIECE):
        _to_quantiles(piece)
    return out


def _to_quantiles(u: Tensor) -> None:
    """Replace flat float64 `u`, between 0 and 1, by the normal quantiles."""
    centred = u - 0.5
    outside = (centred.abs() > _MIDDLE_HALF).nonzero().view(-1)
    tails = u[outside]
    torch.mul(centred, centred, out=u)
    u.neg_().add_(0.180625)
    u.copy_(_divide(u, _MIDDLE)).mul_(centred)
    r = log_(torch.minimum(tails, 1.0 - tails)).neg_().sqrt_().sub_(1.6)
    quantiles = _divide(r, _TAIL)
    u[outside] = torch.where(centred[outside] < 0, -quantiles, quantiles)


def _divide(r: Tensor, quotient: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    above, below = (_sum_powers(r, coefficients) for coefficients in quotient)
    return above.div_(below)


def _sum_powers(r: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Return the polynomial in `r` by Horner's rule, each product rounded before it is added."""
    total = torch.full_like(r, coefficients[0])
    for coefficient in coefficients[1:]:
        total.mul_(r).add_(coefficient)
    return total
