"""How a vocabulary is transplanted, as it is asked for; the words are mergekit-tokensurgeon's, which moved here."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from mergemill.engine.errors import PlanError
from mergemill.engine.tokens.matching import By
from mergemill.engine.tokens.placing import MOST_MULTIPLE
from mergemill.engine.transplants.methods import METHODS
from mergemill.engine.transplants.nearest import Metric, Weights
from mergemill.engine.transplants.subword import Subword

Taken = Literal["no", "embed", "lm_head", "yes"]
NumberOfRows = Literal["donor", "tokens"]

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "metric": get_args(Metric),
    "weights": get_args(Weights),
    "subword": get_args(Subword),
    "match": get_args(By),
    "byte_match": get_args(Taken),
    "prefix_match": get_args(Taken),
    "rows": get_args(NumberOfRows),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransplantOptions:
    """How a vocabulary is transplanted."""

    method: str = "omp"
    k: int = 64  # rows that a new one is made of
    metric: Metric = "euclidean"  # of common_interpolation
    weights: Weights = "distance_proportional"  # of common_interpolation
    subword: Subword = "mean"  # of subword
    match: By = "bytes"  # when two tokens are the same
    byte_match: Taken = "no"  # where a token of one byte gets the row of the byte's own token
    prefix_match: Taken = "no"  # where a token gets the row of its longest beginning
    noise: float = 0.0  # standard deviation of what is added to new rows
    scale: float = 1.0  # of new rows
    pad_to_multiple_of: int = 1  # rows
    rows: NumberOfRows = "donor"  # as many as the donor has, or as its tokens need
    skip_under_trained: bool = False  # tokens that were hardly trained are not what new rows are made of


def parse_options(given: Mapping[str, Any], *, where: str = "transplant") -> TransplantOptions:
    """Return the options; `PlanError` says which is none, or out of range, and what would be right."""
    known = [field.name for field in fields(TransplantOptions)]
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise PlanError(f"{where}: unknown option {name!r}; {_suggest(near) or f'known are {known}'}")
        if name in _CHOICES and value not in _CHOICES[name]:
            near = difflib.get_close_matches(str(value), _CHOICES[name], n=1)
            raise PlanError(
                f"{where}: {name} is {value!r}; {_suggest(near) or 'it'} must be one of {', '.join(_CHOICES[name])}"
            )
    options = TransplantOptions(**given)
    for name in ("k", "pad_to_multiple_of"):
        if type(getattr(options, name)) is not int or getattr(options, name) < 1:
            raise PlanError(f"{where}: {name} is {getattr(options, name)!r}; it must be a whole number from 1 on")
    if options.pad_to_multiple_of > MOST_MULTIPLE:
        raise PlanError(
            f"{where}: pad_to_multiple_of is {options.pad_to_multiple_of}; it may be {MOST_MULTIPLE} at most"
        )
    if not (math.isfinite(options.noise) and options.noise >= 0 and math.isfinite(options.scale)):
        raise PlanError(f"{where}: noise {options.noise}, scale {options.scale}: must be finite, noise not under 0")
    return options


def _suggest(near: list[str]) -> str:
    return f"did you mean {near[0]!r}? It" if near else ""
