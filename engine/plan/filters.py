"""Filters beside a model: where the name of its own tensor decides otherwise than the output's would."""

from collections.abc import Iterator, Sequence
from typing import Any

from mergemill.engine.checkpoint.family import join_layer, split_layer
from mergemill.engine.methods.contract import Method
from mergemill.engine.plan.stacks import Checkpoints, Stack
from mergemill.engine.recipe import Condition, Module, Parameters, Policy, Recipe, Setting, Source


def list_filters(recipe: Recipe) -> tuple[Condition | Policy, ...]:
    """Return the policies, and the conditions of all settings, whose filter does not match every name."""
    found: dict[str, Condition | Policy] = {
        str(rule.filter): rule for rule in recipe.policy or () if rule.filter not in (None, "*")
    }
    for parameters in iter_parameters(recipe):
        for setting in parameters.values():
            for item in setting if isinstance(setting, tuple) else ():
                if isinstance(item, Condition) and item.filter not in (None, "*"):
                    found.setdefault(str(item.filter), item)
    return tuple(found.values())


def divide(filters: Sequence[Condition | Policy], names: Sequence[str]) -> bool:
    """Return whether one of the filters matches some of the names and not all."""
    return any(len({each.matches(name) for name in names}) > 1 for each in filters)


def iter_parameters(recipe: Recipe) -> Iterator[Parameters]:
    """Yield all settings of a recipe, wherever they stand."""
    yield from (step.parameters for step in (recipe.coefficients, *(recipe.post or ())) if step is not None)
    parts: list[Recipe | Module] = [recipe, *(recipe.modules or {}).values()]
    for part in parts:
        yield part.parameters
        yield from (entry.parameters for entry in part.models or ())
        for piece in part.slices or ():
            yield piece.parameters
            yield from (source.parameters for source in piece.sources)


def warn_of_filters(method: Method, stacks: Sequence[Stack], checkpoints: Checkpoints, *, where: str) -> Iterator[str]:
    """Yield a warning for each model and parameter whose conditions hold for other layers than by the output's names.

    Slices move layers; a filter such as ``layers.2.`` beside a source then means the source's layer 2, as in mergekit.
    """
    named = [parameter.name for parameter in method.parameters if parameter.per_model]
    told: set[tuple[str, str]] = set()
    for stack in (stack for stack in stacks if not stack.whole):
        offset = 0
        for stretch in stack.stretches:
            for source in stretch.sources:
                numbered = [name for name in named if _has_number(source.parameters.get(name))]
                for name in numbered:
                    found = _find_difference(stack.name, source, offset, source.parameters[name], checkpoints)
                    if found is not None and (str(source.model), name) not in told:
                        told.add((str(source.model), name))
                        yield (
                            f"{where}: the filters of {name!r} beside {source.model} are matched with its own tensors: "
                            f"{found[0]}, in the output {found[1]}, would have another value by that name"
                        )
            offset += stretch.layers


def _has_number(setting: Setting | None) -> bool:
    """Whether a filter may tell one layer from another."""
    return isinstance(setting, tuple) and any(
        isinstance(item, Condition)
        and item.filter is not None
        and (item.filter.startswith("re:") or any(each.isdigit() for each in item.filter))
        for item in setting
    )


def _find_difference(
    stack: str, source: Source, offset: int, setting: Any, checkpoints: Checkpoints
) -> tuple[str, str] | None:
    """Return a tensor's name in the source and in the output, between which the conditions decide differently."""
    shift = offset - source.layer_range[0]
    for name in checkpoints[str(source.model)].tensors if shift else ():
        split = split_layer(name)
        if split is None or split[0] != stack or not source.layer_range[0] <= split[1] < source.layer_range[1]:
            continue
        made = join_layer(stack, split[1] + shift, split[2])
        if _choose(setting, name) != _choose(setting, made):
            return name, made
    return None


def _choose(setting: Sequence[Condition], name: str) -> Any:
    return next((item.value for item in setting if item.matches(name)), None)
