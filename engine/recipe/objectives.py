"""Objectives: what is measured of a candidate of a search."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from mergemill.engine.recipe.faults import describe, make_faults, make_predicate, suggest
from mergemill.engine.recipe.harness import HarnessObjective
from mergemill.engine.recipe.leaves import OptionalCount, OptionalText, Text, check_count, check_items, check_number
from mergemill.engine.recipe.shapes import Value

COMMAND_S = 3600.0  # the longest that a command may take where nothing is said


def check_finite(value: object) -> object:
    """Return a number that is finite."""
    check_number(value)
    if isinstance(value, int | float) and not math.isfinite(value):
        raise make_predicate(f"must be a finite number, not {value}")
    return value


Finite = Annotated[float | None, BeforeValidator(check_finite)]

Direction = Annotated[
    Literal["min", "max"],
    BeforeValidator(lambda value: check_word(value, ("min", "max"))),
]


def check_word(value: object, known: tuple[str, ...]) -> object:
    """Return a word that is known; the fault names the nearest."""
    if not isinstance(value, str) or value not in known:
        hint = suggest(value, known) if isinstance(value, str) else f"known here: {', '.join(known)}"
        raise make_predicate(f"is {describe(value)}; {hint}")
    return value


class TextObjective(Value):
    """What models are judged on: windows of a text."""

    called: ClassVar[str] = "a text to judge on"

    text: Text
    """The path of a UTF-8 file."""
    window: Annotated[int, BeforeValidator(lambda value: check_count(value or 512, least=2))] = 512
    """Ids of a window."""
    stride: OptionalCount = None
    """Ids from one window to the next; else a window."""
    windows: OptionalCount = None
    """So many windows at equal distances; else all."""

    @model_validator(mode="after")
    def _check_stride(self) -> "TextObjective":
        if self.stride is not None and self.stride > self.window:
            words = f"is {self.stride}, more than a window of {self.window}"
            raise make_faults([(("stride",), make_predicate(words))])
        return self


class ExamplesObjective(Value):
    """What models are judged on: outputs of examples, given their inputs."""

    called: ClassVar[str] = "examples to judge on"

    examples: Text
    """The path of a file with an object `{"input": …, "output": …}` a line."""


class Objective(Value):
    """What is measured of a candidate; a smaller number is better, unless `direction` says `max`."""

    called: ClassVar[str] = "an objective"
    one_of: ClassVar[tuple[str, ...]] = ("perplexity", "entropy", "few_shot", "command", "lm_eval", "sum")

    perplexity: TextObjective | None = None
    """Of a text: `{text: held.txt, windows: 64}`."""
    entropy: TextObjective | None = None
    """Of the predictions on a text; it also prefers models that are sure and wrong."""
    few_shot: ExamplesObjective | None = None
    """The loss of examples' outputs: `{examples: few.jsonl}`."""
    command: OptionalText = None
    """A command whose last number on stdout counts: `python score.py {model}`, or `{recipe}`, `{values}`."""
    lm_eval: HarnessObjective | None = None
    """Of tasks of lm-evaluation-harness, where more is better: `{tasks: [{task: mine, metric: "acc,none"}]}`."""
    seconds: Annotated[float | None, BeforeValidator(check_finite)] = None
    """The longest that a command, or lm_eval, may take for a candidate; else an hour."""
    sum: Annotated[tuple["Objective", ...] | None, BeforeValidator(check_items)] = None
    """Objectives that are added, each times its `weight`; of one with `direction: max` less is added."""
    weight: Annotated[float, BeforeValidator(check_finite)] = 1.0
    """Of an item of a sum."""
    direction: Direction = "min"
    """Whether less is better, `min`, or more, `max`."""

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of texts and examples that it reads."""
        texts = [each.text for each in (self.perplexity, self.entropy) if each]
        examples = [self.few_shot.examples] if self.few_shot else []
        return (*texts, *examples, *(path for each in self.sum or () for path in each.files))

    @property
    def by_text(self) -> bool:
        """Whether candidates are judged without being written."""
        return self.command is None and self.lm_eval is None and all(each.by_text for each in self.sum or ())

    @property
    def sign(self) -> int:
        """What a score is multiplied by so that less is better."""
        return -1 if self.direction == "max" or self.lm_eval is not None else 1

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """The tasks of it that are test sets of public benchmarks."""
        own = self.lm_eval.benchmarks if self.lm_eval else ()
        return (*own, *(name for each in self.sum or () for name in each.benchmarks))

    @model_validator(mode="after")
    def _check_place(self) -> "Objective":
        if self.seconds is not None and self.command is None and self.lm_eval is None:
            raise make_faults([(("seconds",), make_predicate("is for a command or lm_eval"))])
        if self.seconds is not None and self.seconds <= 0:
            raise make_faults([(("seconds",), make_predicate(f"is {self.seconds:g} and must be above 0"))])
        if any(each.sum for each in self.sum or ()):
            raise make_faults([(("sum",), make_predicate("holds a sum; write its items here"))])
        return self
