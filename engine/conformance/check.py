"""The whole suite, for one method."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

from mergemill.engine.conformance import bits, masks, values
from mergemill.engine.conformance.claim import Claim, iter_claims
from mergemill.engine.conformance.mill import Mill, Settings
from mergemill.engine.conformance.subject import ClaimKeywords, Oracle, Subject
from mergemill.engine.methods.contract import Method


def list_claims(subject: Subject) -> list[Claim]:
    """Return all that is claimed of a method, each to be run with a `Mill`; for pytest to parametrise over."""
    return list(iter_claims(subject, [*values.CHECKS, *bits.CHECKS, *masks.CHECKS]))


def check_method(
    method: Method | Callable[..., Any],
    *,
    settings: Settings | Sequence[Settings] = MappingProxyType({}),
    models: int | None = None,
    oracle: Oracle | None = None,
    **claims: Unpack[ClaimKeywords],
) -> None:
    """Put a method through the suite that mergemill's own go through; an `AssertionError` names the claim that fails.

    method: a decorated function. settings: the recipe's parameters by name, for `models` models beside the base (a
    parameter per model as a tuple); several are tried each. oracle: what must come out, given a `Task` (its inputs as
    float64 by ``task.arrays()``, the base first, and its `settings`), written in NumPy from the formula; without one
    the values are only looked at for being finite. symmetric: the models' order does not matter. random: seed, tensor
    and places do. even: with these settings, a random method keeps every element with the density itself. equal:
    settings with which equal models give that model. rounding: how far from the oracle float32 may be, as a share of
    the largest value; wide_rounding: the same of float64, or None for 5e-9 of `rounding`.
    """
    found = method if isinstance(method, Method) else getattr(method, "method", None)
    if not isinstance(found, Method):
        raise TypeError(f"{method!r} is no merge method; decorate it with @merge_method")
    variants = (settings,) if isinstance(settings, Mapping) else tuple(settings)
    count = models if models is not None else found.most_inputs or max(3, found.least_inputs)
    subject = Subject(found, count, variants, oracle, **claims)
    with tempfile.TemporaryDirectory() as folder:
        mill = Mill(Path(folder))
        for claim in list_claims(subject):
            try:
                claim.run(mill)
            except AssertionError as error:
                raise AssertionError(f"{found.name}: {claim}: {error}") from error
