"""What a merge method is: one decorated function whose signature is the whole contract.

Its positional parameters come from a closed set and say what it is given for each slab, flat and in the dtype of
the accumulation (float32; float64 where an input is):

==============  =====================================================================================
`models`        the inputs, a list of tensors ``[n]`` in the recipe's order
`deltas`        instead of `models`: their differences to the base, without the base itself. Where an optional base
                is not there: the models as they are
`importances`   what says how much each model's elements matter, a list as long as `models`; None where the recipe
                gives none
`base`          the base model's tensor ``[n]``; None where an optional base is not there
`statistics`    what the function given to the decorator as `statistics` returned for the whole tensor
`place`         where the slab lies (`Place`): the whole tensor's name and shape, the slab's first element
==============  =====================================================================================

Its keyword-only parameters are the recipe's parameters; a trailing underscore keeps Python's words free (`lambda_`).
`PerModel[float]` is one value for each tensor of `models` or `deltas`; its default, a tuple of one, is every model's.

The slabs are copies made for this call: a method overwrites them freely, and returns one of them or a new tensor.
The models themselves are never touched.
"""

import functools
import inspect
import keyword
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mergemill.engine.methods.docstrings import Documented, read_paragraph
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.kernels import Rounds
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.slabs import BLOCK, row_block

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Tensor])

PER_MODEL = "per model"
PerModel = Annotated[Sequence[T], PER_MODEL]

Reads = Literal["element", "gram", "rank", "sums", "row", "matrix"]
BaseRole = Literal["none", "optional", "required", "first of two"]
Grain = Literal["block", "row", "tensor"]
GIVEN = ("models", "deltas", "importances", "base", "statistics", "place")


def say_number(value: float) -> str:
    """Return a number with all its digits: of 1.0000001 nobody is told that it is 1.

    >>> say_number(1.0), say_number(1.0000001), say_number(0.1)
    ('1', '1.0000001', '0.1')
    """
    return repr(value).removesuffix(".0")


@dataclass(frozen=True, slots=True)
class Within:
    """The closed range of a number; either end may be open."""

    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        if self.least is not None and self.most is None:
            return f"at least {say_number(self.least)}"
        least, most = (None if end is None else say_number(end) for end in (self.least, self.most))
        return f"at most {most}" if least is None else f"from {least} to {most}"

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


Density = Annotated[float, Within(0, 1)]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, as the signature declares it."""

    name: str  # in a recipe
    argument: str  # in Python
    kind: type  # float, int or bool
    per_model: bool
    required: bool
    default: Any
    within: Within | None


@dataclass(frozen=True, slots=True)
class Method(Documented):
    """A merge method and what its signature and decorator say about it."""

    name: str
    function: Callable[..., Tensor]
    reads: Reads
    base: BaseRole
    parameters: tuple[Parameter, ...]
    given: tuple[str, ...]  # which of the closed set it takes, in its order
    least_inputs: int  # models beside the base; with "first of two", the base counts
    most_inputs: int | None
    statistics: Callable[..., Rounds] | None
    usual_rounds: int
    most_rounds: int
    grain: Grain | Callable[..., Grain | int]
    extra_slabs: int
    extra_slabs_each: int
    extra_bytes: int
    check: Callable[..., str | None] | None  # given the settings, what is wrong with them
    fused: Callable[..., Fusion | None] | None  # the method as native loops do it
    at_once: Callable[..., Any] | None  # the statistics, where these find ranks in a whole tensor themselves
    unread_at_zero: str  # the parameter per model with which, at 0, an input changes nothing; empty: there is none

    @property
    def takes_deltas(self) -> bool:
        """Whether the method is given task vectors."""
        return "deltas" in self.given

    @property
    def takes_importances(self) -> bool:
        """Whether the method is given what says how much each element matters, where a recipe has that."""
        return "importances" in self.given

    @property
    def on_device(self) -> bool:
        """Whether it works on tensors that lie on a device: all that are built in do."""
        return True

    @property
    def takes_matrices(self) -> bool:
        """Whether it decomposes or multiplies whole matrices."""
        return self.reads == "matrix"

    @property
    def needs_double(self) -> bool:
        """Whether it makes float64 of float32: all that look beyond an element do."""
        return self.reads != "element"

    @property
    def fuses(self) -> bool:
        """Whether native loops know the method."""
        return self.fused is not None

    @property
    def source(self) -> str:
        """Paper and equation, from the method's file."""
        return read_paragraph(self.function, "Source")

    def block(self, shape: tuple[int, ...], settings: Mapping[str, Any]) -> int:
        """Return the elements at whose multiples a tensor of `shape` may be cut into slabs."""
        return find_block(self.grain, shape, self._arguments(settings))

    def start(self, place: Place, settings: Mapping[str, Any], dtype: str) -> Rounds | None:
        """Begin the statistics with what they name of `place`, `dtype` and the settings; None where there are none."""
        if self.statistics is None:
            return None
        known = {"place": place, "dtype": dtype, **self._arguments(settings)}
        return call_with(self.statistics, known)

    def fuse(self, statistics: Any, place: Place, settings: Mapping[str, Any]) -> Fusion | None:
        """Return how native loops merge a slab; None where they cannot."""
        if self.fused is None:
            return None
        known = {"statistics": statistics, "place": place, **self._arguments(settings)}
        return call_with(self.fused, known)

    def fuse_whole(self, size: int, settings: Mapping[str, Any]) -> Fusion | None:
        """Return how native loops merge any whole tensor of so many elements without a round; None: they cannot."""
        if self.fused is None or "place" in names_of(self.fused):
            return None
        known = {"size": size, "statistics": None, **self._arguments(settings)}
        if self.at_once is not None:
            known["statistics"] = call_with(self.at_once, known)
        if self.statistics is not None and known["statistics"] is None:
            return None
        return call_with(self.fused, known)

    def combine(
        self,
        tensors: list[Tensor],
        base: Tensor | None,
        statistics: Any,
        place: Place,
        settings: Mapping[str, Any],
        importances: list[Tensor] | None = None,
    ) -> Tensor:
        """Call the method on one slab."""
        known = {
            "models": tensors,
            "deltas": tensors,
            "importances": importances,
            "base": base,
            "statistics": statistics,
            "place": place,
        }
        return self.function(*(known[name] for name in self.given), **self._arguments(settings))

    def _arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {parameter.argument: settings[parameter.name] for parameter in self.parameters}


def merge_method(
    *,
    reads: Reads,
    base: BaseRole = "none",
    inputs: tuple[int, int | None] = (1, None),
    statistics: Callable[..., Rounds] | None = None,
    rounds: int | tuple[int, int] = 0,
    grain: Grain | Callable[..., Grain | int] = "block",
    extra_slabs: int = 4,
    extra_slabs_each: int = 0,
    extra_bytes: int = 0,
    check: Callable[..., str | None] | None = None,
    fused: Callable[..., Fusion | None] | None = None,
    at_once: Callable[..., Any] | None = None,
    unread_at_zero: str = "",
) -> Callable[[F], F]:
    """Declare a function to be a merge method; the function itself stays as it is.

    `reads` says what must be seen before the first element can be merged; `statistics` is the generator function that
    gathers it (see `mergemill.engine.tensors.kernels`) in at most `rounds` rounds; of two numbers, the first is how
    many do for nearly every tensor. `grain` says what a slab must hold
    whole: any ``"block"`` of elements, each ``"row"`` (of the last axis), or the ``"tensor"``; it may be a function of
    what it names of `shape` and the settings, which may also return how many elements stay together. `extra_slabs` is
    the number of slabs that method and statistics allocate at most at once, counted as float64, and `extra_slabs_each`
    how many more for each input; `extra_bytes` what the statistics hold for each input. `check` is given the settings
    and returns what is wrong with them.
    `fused` is given what it names of `statistics`, `place` and the settings, and says how native loops do the same.
    `at_once` is given what it names of `size`, the tensor's elements, and the settings, and returns what `statistics`
    would but for ranks in place of cuts (`Keep.ranks`), which native loops find themselves in a slab that is the whole
    tensor; None where more must be known.
    `unread_at_zero` names a parameter per model: an input for which it is 0 changes no bit of the result, and is not
    read.
    """

    usual_rounds, most_rounds = rounds if isinstance(rounds, tuple) else (rounds, rounds)

    def declare(function: F) -> F:
        given, parameters = read_signature(function, GIVEN)
        if unread_at_zero and unread_at_zero not in {each.name for each in parameters if each.per_model}:
            raise TypeError(
                f"{function.__name__}: unread_at_zero names {unread_at_zero!r}, which no model has its own of"
            )
        function.method = Method(  # type: ignore[attr-defined]
            name=function.__name__,
            function=function,
            reads=reads,
            base=base,
            parameters=parameters,
            given=given,
            least_inputs=inputs[0],
            most_inputs=inputs[1],
            statistics=statistics,
            usual_rounds=usual_rounds,
            most_rounds=most_rounds,
            grain=grain,
            extra_slabs=extra_slabs,
            extra_slabs_each=extra_slabs_each,
            extra_bytes=extra_bytes,
            check=check,
            fused=fused,
            at_once=at_once,
            unread_at_zero=unread_at_zero,
        )
        return function

    return declare


@functools.cache
def names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's parameters: what it wants to be given."""
    return tuple(inspect.signature(function).parameters)


def call_with(function: Callable[..., T], known: Mapping[str, Any]) -> T:
    """Return what a function gives for what it names of all that is known."""
    return function(**{name: known[name] for name in names_of(function)})


def find_block(grain: Grain | Callable[..., Grain | int], shape: tuple[int, ...], arguments: Mapping[str, Any]) -> int:
    """Return the elements at whose multiples a tensor of `shape` may be cut, so that slabs hold whole grains."""
    if callable(grain):
        known = {"shape": shape, **arguments}
        found = call_with(grain, known)
        if isinstance(found, int):
            return row_block((math.prod(shape) // found + 1, found))
        grain = found
    if grain == "tensor":
        return max(1, math.prod(shape))
    return row_block(shape) if grain == "row" else BLOCK


def read_signature(
    function: Callable[..., Any], allowed: Sequence[str]
) -> tuple[tuple[str, ...], tuple[Parameter, ...]]:
    """Return which inputs of the closed set `allowed` a function takes, and its keyword-only parameters."""
    hints = get_type_hints(function, include_extras=True)
    given: list[str] = []
    parameters: list[Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            parameters.append(_read_parameter(name, hints[name], parameter.default))
        elif name in allowed:
            given.append(name)
        else:
            raise TypeError(f"{function.__name__}: unknown input {name!r}; a method takes {', '.join(allowed)}")
    return tuple(given), tuple(parameters)


def _read_parameter(argument: str, hint: Any, default: Any) -> Parameter:
    per_model = get_origin(hint) is Annotated and PER_MODEL in hint.__metadata__
    if per_model:
        (hint,) = get_args(get_args(hint)[0])
    within = None
    if get_origin(hint) is Annotated:
        within = next((mark for mark in hint.__metadata__ if isinstance(mark, Within)), None)
        hint = get_args(hint)[0]
    stripped = argument.removesuffix("_")
    name = stripped if keyword.iskeyword(stripped) else argument
    required = default is inspect.Parameter.empty
    if per_model and not required:
        (default,) = default
    optional = [kind for kind in get_args(hint) if kind is not type(None)]
    kind = optional[0] if optional else hint
    return Parameter(name, argument, kind, per_model, required, None if required else default, within)
