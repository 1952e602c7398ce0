"""Search files: a recipe with variables, what is better, how the next candidates are chosen, and when it ends.

Paths in it are read as a recipe's models are: from the folder that the command runs in.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe.document import Form
from mergemill.engine.recipe.faults import Loc, describe, make_faults, make_predicate, make_sentence
from mergemill.engine.recipe.genomes import Genome
from mergemill.engine.recipe.harness import EvolveTasks, make_harness
from mergemill.engine.recipe.leaves import (
    Flag,
    OptionalCount,
    OptionalFlag,
    OptionalText,
    check_count,
    check_items,
)
from mergemill.engine.recipe.objectives import Finite, Objective, check_word
from mergemill.engine.recipe.parsing import parse_value, read_text
from mergemill.engine.recipe.settings import Scalar
from mergemill.engine.recipe.shapes import FrozenMap, Value
from mergemill.engine.storage.urls import parse_path

FORM = Form("a search file", "recipe, variables and objective")
StrategyName = Literal["grid", "random", "sobol", "cma", "tpe", "nsga2", "line"]

TAKES: Mapping[str, tuple[str, ...]] = {
    "grid": ("steps", "racing"),
    "random": ("seed", "racing"),
    "sobol": ("seed", "racing"),
    "cma": ("seed", "population", "sigma", "racing"),
    "tpe": ("seed",),
    "nsga2": ("seed", "population"),
    "line": (),
}
"""Which keys beside its name each strategy has."""
WITH_CHOICES = ("grid", "random", "sobol", "tpe", "nsga2")
ENDLESS = ("random", "sobol", "cma", "tpe", "nsga2")


def _check_choices(value: object) -> object:
    if value is None:
        return value
    items = check_items(value)
    assert isinstance(items, list | tuple)
    for place, item in enumerate(items):
        if not isinstance(item, bool | int | float | str):
            words = f"must be a number, a text or a boolean, not {describe(item)}"
            raise make_faults([((place,), make_predicate(words))])
    if len({repr(item) for item in items}) < len(items):
        raise make_predicate("has an item twice")
    return tuple(items)


class Variable(Value):
    """What may change from candidate to candidate: a number between two others, or one of several values."""

    called: ClassVar[str] = "a variable"
    one_of: ClassVar[tuple[str, ...]] = ("low", "choices")

    low: Finite = None
    """The least value."""
    high: Finite = None
    """The largest value."""
    start: Finite = None
    """Where a search begins; else the middle."""
    log: Flag = False
    """Whether the search goes by the value's logarithm."""
    integer: Flag = False
    """Whether the value is a whole number."""
    layers: Annotated[int | None, BeforeValidator(lambda value: check_count(value, least=1, most=10_000))] = None
    """So many numbers, put in as a list: a gradient over the layers."""
    choices: Annotated[tuple[Scalar, ...] | None, BeforeValidator(_check_choices)] = None
    """The values that there are."""

    @model_validator(mode="after")
    def _check_box(self) -> "Variable":
        if faults := list(self._find_faults()):
            raise make_faults(faults)
        return self

    def _find_faults(self) -> "list[tuple[Loc, PydanticCustomError]]":
        if self.choices is not None:
            given = [key for key in ("high", "start", "layers") if getattr(self, key) is not None]
            given += [key for key in ("log", "integer") if getattr(self, key)]
            return [((key,), make_predicate("has no place beside choices")) for key in given]
        if self.high is None:
            return [((), make_sentence("a variable with 'low' needs 'high'"))]
        assert self.low is not None
        if self.low >= self.high:
            return [(("low",), make_predicate(f"is {self.low:g} and must be less than high, {self.high:g}"))]
        if self.start is not None and not self.low <= self.start <= self.high:
            words = f"is {self.start:g}, outside of low {self.low:g} and high {self.high:g}"
            return [(("start",), make_predicate(words))]
        if self.log and self.low <= 0:
            return [(("low",), make_predicate(f"is {self.low:g}; with log it must be above 0"))]
        if self.integer and any(x is not None and x != int(x) for x in (self.low, self.high, self.start)):
            return [(("integer",), make_predicate("is true, so low, high and start must be whole numbers"))]
        return []


class Variables(FrozenMap[Variable]):
    """Variables by name, in the order written."""

    __slots__ = ()

    holds: ClassVar[Any] = Variable


LEAST_OF_CMA = 4  # of 3, the better half is one candidate, of which no covariance follows: cmaes divides by zero


class Strategy(Value):
    """How the next candidates are chosen."""

    called: ClassVar[str] = "a strategy"

    name: Annotated[StrategyName, BeforeValidator(lambda value: check_word(value, get_args(StrategyName)))] = "cma"
    """`cma` (CMA-ES), `tpe` (also choices), `nsga2` (the front of a sum's items), `grid`, `random`, `sobol`, `line`."""
    seed: Annotated[int, BeforeValidator(lambda value: _check_given(value))] = 0
    """Of what is drawn."""
    population: Annotated[int | None, BeforeValidator(lambda value: check_count(value, least=2, most=10_000))] = None
    """Candidates of a generation: of cma else 4 + 3 ln n of n numbers, of nsga2 else 16."""
    sigma: Finite = None
    """The first step of cma, as a share of each variable's range; else 0.3."""
    steps: Annotated[int | None, BeforeValidator(lambda value: check_count(value, least=2, most=10_000))] = None
    """Values of each variable of a grid that has no choices, both ends among them."""
    racing: Flag = False
    """Whether candidates that are behind on half of a text's windows are judged no further."""

    @model_validator(mode="after")
    def _check_own_keys(self) -> "Strategy":
        default = Strategy.model_fields
        for key in ("seed", "population", "sigma", "steps", "racing"):
            if getattr(self, key) != default[key].default and key not in TAKES[self.name]:
                words = f"has no place in strategy {self.name}; it has {', '.join(TAKES[self.name]) or 'no keys'}"
                raise make_faults([((key,), make_predicate(words))])
        if self.name == "cma" and self.population is not None and self.population < LEAST_OF_CMA:
            words = (
                f"is {self.population} and must be at least {LEAST_OF_CMA} for cma, which learns from the better half"
            )
            raise make_faults([(("population",), make_predicate(words))])
        if self.sigma is not None and not 0 < self.sigma <= 1:
            raise make_faults([(("sigma",), make_predicate(f"is {self.sigma:g} and must be above 0, at most 1"))])
        return self


def _check_given(value: object) -> object:
    if value is None:
        raise make_predicate("must be a whole number; nothing is written here")
    return check_count(value, least=0)


class Budget(Value):
    """When a search ends, whichever comes first."""

    called: ClassVar[str] = "a budget"

    evaluations: OptionalCount = None
    """So many candidates."""
    hours: Finite = None
    """So much time for judging, over all runs of the search."""
    stall: OptionalCount = None
    """So many candidates without a gain of more than one standard error."""

    @model_validator(mode="after")
    def _check_hours(self) -> "Budget":
        if self.hours is not None and self.hours <= 0:
            raise make_faults([(("hours",), make_predicate(f"is {self.hours:g} and must be above 0"))])
        return self


def _read_holdout(value: object) -> object:
    """A text alone means its perplexity."""
    return {"perplexity": value} if isinstance(value, Mapping) and "text" in value else value


def _check_recipe(value: object) -> object:
    if value is None or (isinstance(value, str) and value.strip()) or isinstance(value, Mapping):
        return value
    raise make_predicate(f"must be the path of a recipe, or the recipe itself, not {describe(value)}")


class SearchFile(Value):
    """A search for the best of a recipe's variables."""

    called: ClassVar[str] = "a search file"
    one_of: ClassVar[tuple[str, ...]] = ("recipe", "genome")

    recipe: Annotated[Any, BeforeValidator(_check_recipe)] = None
    """The path of a recipe, or the recipe itself; a value `${name}` in it is a variable."""
    variables: Variables = Variables()
    """The variables by name."""
    genome: Genome | None = None
    """A genome of mergekit-evolve, instead of recipe and variables."""
    tasks: EvolveTasks | None = None
    """Of mergekit-evolve, which lm_eval runs: instead of an objective."""
    limit: OptionalCount = None
    """Of tasks: so many samples of each."""
    num_fewshot: Annotated[int | None, BeforeValidator(lambda value: check_count(value, least=0))] = None
    """Of tasks: so many examples before each sample."""
    apply_chat_template: OptionalFlag = None
    """Of tasks: whether samples are written by the model's chat template, which they are where nothing is said."""
    fewshot_as_multiturn: OptionalFlag = None
    """Of tasks: whether examples are turns of a conversation, which they are where nothing is said."""
    shuffle: Flag = False
    """Of mergekit-evolve; each candidate would be judged on other samples."""
    include_path: OptionalText = None
    """Of tasks: a folder with tasks of your own."""
    random_init: Flag = False
    """Whether a genome's search begins at random."""
    objective: Objective | None = None
    """What is measured."""
    strategy: Strategy = Strategy()
    """How candidates are chosen."""
    budget: Budget = Budget()
    """When it ends."""
    holdout: Annotated[Objective | None, BeforeValidator(_read_holdout)] = None
    """What is told beside the score, and never searched on."""
    name: Annotated[SkipJsonSchema[str], Field(exclude=True, repr=False)] = "search.yml"
    """The name that messages give the file."""

    @model_validator(mode="after")
    def _check_whole(self) -> "SearchFile":
        faults = list(self._find_faults_of_tasks())
        if self.genome is None and not self.variables:
            faults.append(((), make_sentence("a search of a recipe needs the key 'variables'")))
        if self.genome is not None and self.variables:
            faults.append((("variables",), make_predicate("has no place beside a genome, whose genes are they")))
        if self.random_init and self.genome is None:
            faults.append((("random_init",), make_predicate("is for a genome; variables have 'start'")))
        if self.strategy.racing and (self.objective is None or self.objective.perplexity is None):
            words = "is for the objective perplexity, whose windows can be judged by halves"
            faults.append((("strategy", "racing"), make_predicate(words)))
        if self.strategy.name == "nsga2" and len((self.objective and self.objective.sum) or ()) < 2:
            words = "is nsga2, which searches several objectives; write them as the items of a sum"
            faults.append((("strategy",), make_predicate(words)))
        faults += self._find_unsuited()
        if self.strategy.name in ENDLESS and not (self.budget.evaluations or self.budget.hours):
            words = f"needs evaluations or hours: strategy {self.strategy.name} has no end of its own"
            faults.append((("budget",), make_predicate(words)))
        if faults:
            raise make_faults(faults)
        return self

    def _find_faults_of_tasks(self) -> "Iterator[tuple[Loc, PydanticCustomError]]":
        """Yield what is wrong with the tasks of mergekit-evolve and the objective that they stand for."""
        if (self.tasks is None) == (self.objective is None):
            words = "a search file needs the key 'objective'"
            yield (), make_sentence(words if self.tasks is None else "tasks stand for an objective; here are both")
        if self.tasks is None:
            keys = ("limit", "num_fewshot", "apply_chat_template", "fewshot_as_multiturn", "include_path")
            for key in keys:
                if getattr(self, key) is not None:
                    yield (key,), make_predicate("is for tasks; write it into the objective lm_eval")
        if self.shuffle:
            words = "is true: then each candidate would be judged on other samples, and luck chosen; leave it out"
            yield ("shuffle",), make_predicate(words)

    def _count_grid(self) -> float:
        """Return how many candidates a grid has; infinity where a float cannot say it."""
        digits = 0.0
        for variable in self.variables.values():
            values = len(variable.choices) if variable.choices is not None else self.strategy.steps or 1
            digits += (variable.layers or 1) * math.log10(max(1, values))
        return 10**digits if digits < 300 else math.inf

    def _find_unsuited(self) -> "list[tuple[Loc, PydanticCustomError]]":
        """Return the faults of variables that the strategy cannot search."""
        name, found = self.strategy.name, list[tuple[Loc, PydanticCustomError]]()
        for key, variable in self.variables.items():
            if variable.choices is not None and name not in WITH_CHOICES:
                words = f"has choices, which {', '.join(WITH_CHOICES)} can search and {name} cannot"
                found.append((("variables", key), make_predicate(words)))
            if name == "grid" and variable.choices is None and self.strategy.steps is None:
                words = "needs choices, or the strategy 'steps': a grid has so many values of it"
                found.append((("variables", key), make_predicate(words)))
        numbers = sum(variable.layers or 1 for variable in self.variables.values())
        if name == "grid" and (candidates := self._count_grid()) > MOST_OF_A_GRID:
            words = f"has {candidates:.3g} candidates as a grid; {MOST_OF_A_GRID:,} are the most, or take sobol"
            found.append((("strategy",), make_predicate(words)))
        if name == "line" and self.genome is None and numbers != 1:
            found.append((("strategy",), make_predicate(f"is line, which searches one number; here are {numbers}")))
        return found


MOST_OF_A_GRID = 1_000_000  # candidates, which are listed before the first is judged


def load_search(given: str | Path | Mapping[str, Any]) -> SearchFile:
    """Return the search of a file, or of what would stand in one; `RecipeError` where it is not valid."""
    if isinstance(given, Mapping):
        import json

        return parse_search(json.dumps(given, indent=1, default=str), name="search")
    path = parse_path(given, RecipeError, what="a search file")
    return parse_search(read_text(path), name=str(path))


def parse_search(text: str, *, name: str = "search.yml") -> SearchFile:
    """Return the search that the YAML `text` says; `name` is what messages call it."""
    file = parse_value(SearchFile, FORM, text, name=name).model_copy(update={"name": name})
    if file.tasks is None:
        return file
    said = {
        "limit": file.limit,
        "num_fewshot": file.num_fewshot,
        "apply_chat_template": file.apply_chat_template is not False,
        "fewshot_as_multiturn": file.fewshot_as_multiturn is not False,
        "include_path": file.include_path,
    }
    return file.model_copy(update={"objective": Objective(lm_eval=make_harness(file.tasks, said))})
