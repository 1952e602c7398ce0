"""Names of tensors that differ by what a wrapper put before all of them: ``module.``, ``_orig_mod.``, ``model.``."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.offers.offer import Offers

PREFIXES = ("module.", "_orig_mod.", "model.")


def join_prefixes(
    checkpoints: Mapping[str, Checkpoint], offers: Mapping[str, Offers]
) -> tuple[Mapping[str, Checkpoint], Mapping[str, Offers], list[str]]:
    """Return the models without such prefixes where more of their names are then alike, and what was done in words.

    offers: of those models that are stages.
    """
    names = {model: frozenset(checkpoint.tensors) for model, checkpoint in checkpoints.items()}
    prefixes = {model: find_prefix(found) for model, found in names.items()}
    bare = {model: frozenset(name.removeprefix(prefixes[model]) for name in found) for model, found in names.items()}
    if not any(prefixes.values()) or _count_alike(bare) <= _count_alike(names):
        return checkpoints, offers, []
    told = [f"{model}: {prefix!r} before all names is taken off" for model, prefix in prefixes.items() if prefix]
    return (
        {model: _take_off(checkpoint, prefixes[model]) for model, checkpoint in checkpoints.items()},
        {model: _bare_offers(found, prefixes[model]) for model, found in offers.items()},
        told,
    )


def find_prefix(names: Collection[str]) -> str:
    """Return what known prefixes all names have, one after the other.

    >>> find_prefix(["module._orig_mod.a", "module._orig_mod.b"]), find_prefix(["model.a", "b"])
    ('module._orig_mod.', '')
    """
    found = ""
    while more := next((each for each in PREFIXES if names and all(n.startswith(found + each) for n in names)), ""):
        found += more
    return found


def _count_alike(names: Mapping[str, frozenset[str]]) -> int:
    return len(frozenset.intersection(*names.values()))


def _take_off(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    bare = {name.removeprefix(prefix): stored for name, stored in checkpoint.tensors.items()}
    return replace(checkpoint, tensors={name: stored._replace(name=name) for name, stored in sorted(bare.items())})


def _bare_offers(offers: Offers, prefix: str) -> Offers:
    return {
        name.removeprefix(prefix): offer._replace(uses=tuple(used.removeprefix(prefix) for used in offer.uses))
        for name, offer in offers.items()
    }
