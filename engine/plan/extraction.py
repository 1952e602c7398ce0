"""What is asked of an extraction, as values: which models, how far, and of which modules."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from mergemill.engine.errors import PlanError
from mergemill.engine.tensors.cuts import Way
from mergemill.engine.tensors.dtypes import RECIPE_DTYPES

KIND = "extract-lora"  # of the planner


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """An adapter that is to be extracted; the defaults are those of mergekit-extract-lora."""

    model: Any  # a reference, as JSON, or ``{"recipe": …, "file": …}`` of a merge that is not written
    base_model: Any
    max_rank: int = 128
    energy: float | None = None  # the least rank that keeps this share of ‖D‖²
    sv_ratio: float | None = None  # singular values of at least this share of the largest
    sv_epsilon: float = 0.0  # singular values above this
    budget_bytes: int | None = None  # of the whole file: ranks are chosen so that the least is lost
    distribute_scale: bool = True  # the root of the singular values in each factor; else all of them in A
    include: tuple[str, ...] = ()  # regular expressions, searched in the paths of modules
    exclude: tuple[str, ...] = ()
    save_modules: tuple[str, ...] = ()  # ends of the paths of modules that are stored whole
    embed_lora: bool = False  # embeddings and heads are decomposed too
    skip_undecomposable: bool = False  # what is no matrix is left out, not stored whole
    rslora: bool = False
    dtype: str | None = None  # to write, by a recipe's word; None: that of the model
    way: Way = "gram"
    layout: str | None = None  # ``separate``: packed experts one by one; None: as the base stores them
    storage: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def measures(self) -> bool:
        """Whether ranks hang on singular values."""
        asked = (self.energy, self.sv_ratio, self.sv_epsilon or None, self.budget_bytes)
        return any(each is not None for each in asked)

    def takes(self, module: str) -> bool:
        """Whether a module is one of those that are asked for."""
        included = not self.include or any(re.search(each, module) for each in self.include)
        return included and not any(re.search(each, module) for each in self.exclude)

    def saves(self, module: str) -> bool:
        """Whether a module is to be stored whole."""
        return any(f".{module}".endswith(f".{each}") for each in self.save_modules)

    def to_json(self) -> dict[str, Any]:
        """Return what it holds beyond the defaults."""
        made = asdict(self)
        return {name: value for name, value in made.items() if value not in (None, (), {}) and value != _DEFAULTS[name]}


_DEFAULTS = asdict(Extraction(model=None, base_model=None))


def check_extraction(asked: Extraction) -> None:
    """Raise `PlanError` for a setting that means nothing."""
    for name, pattern in (("-i", each) for each in asked.include):
        _check_pattern(name, pattern)
    for name, pattern in (("-e", each) for each in asked.exclude):
        _check_pattern(name, pattern)
    if asked.max_rank < 1:
        raise PlanError(f"--max-rank is a whole number from 1 on, not {asked.max_rank}")
    for name, share in (("--energy", asked.energy), ("--sv-ratio", asked.sv_ratio)):
        if share is not None and not 0 < share <= 1:
            raise PlanError(f"{name} is a share, above 0 and up to 1, not {share:g}")
    if not asked.sv_epsilon >= 0:
        raise PlanError(f"--sv-epsilon is a number from 0 on, not {asked.sv_epsilon:g}")
    if asked.dtype is not None and asked.dtype not in RECIPE_DTYPES:
        raise PlanError(f"--dtype {asked.dtype!r} is unknown; known are {', '.join(RECIPE_DTYPES)}")
    if asked.way not in get_args(Way):
        raise PlanError(f"--way {asked.way!r} is unknown; known are {', '.join(get_args(Way))}")
    if asked.layout not in (None, "separate"):
        raise PlanError(
            f"--layout {asked.layout!r} is unknown; known is separate, and without it experts are as the base has them"
        )


def read_extraction(value: Mapping[str, Any]) -> Extraction:
    """Return what `to_json` gave."""
    lists = {name: tuple(value[name]) for name in ("include", "exclude", "save_modules") if name in value}
    return Extraction(**{**value, **lists})


def _check_pattern(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise PlanError(f"{option} {pattern!r} is no regular expression: {error}") from None
