"""The steps around a merge method: coefficients before it and steps after it, for one tensor at a time."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergemill.engine.errors import MergeError, PlanError
from mergemill.engine.methods.catalogue import get_coefficients, get_step
from mergemill.engine.methods.coefficients import Coefficients
from mergemill.engine.methods.contract import Method, Parameter
from mergemill.engine.methods.steps import Step, Stepped
from mergemill.engine.plan.settings import Site, resolve_shared
from mergemill.engine.recipe import GivenStep, Parameters, Recipe
from mergemill.engine.tensors.kernels import Kernel


@dataclass(frozen=True, slots=True)
class Scaling:
    """A coefficient method that must know the norms of the whole model's task vectors, and its settings."""

    method: Coefficients
    settings: Mapping[str, Any]
    vectors: tuple[str, ...]  # the task vectors' models, as the recipe writes them

    def find_factors(self, squares: Sequence[float]) -> tuple[float, ...]:
        """Return the factor of each task vector from their squared norms; `MergeError` where one is no number."""
        wrong = [model for model, square in zip(self.vectors, squares, strict=True) if not math.isfinite(square)]
        if wrong:
            raise MergeError(
                f"coefficients: {self.method.name} needs the norms of all task vectors, and that of {wrong[0]} is not "
                f"finite; NaN or infinities in it or in what it is taken from must be mended first"
            )
        return self.method.find_factors(self.settings, len(self.vectors), squares=squares)


@dataclass(frozen=True, slots=True)
class Steps:
    """What a recipe says around its method."""

    coefficients: tuple[Coefficients, Parameters] | None
    steps: tuple[tuple[Step, Parameters], ...]

    @property
    def takes_squares(self) -> bool:
        """Whether factors follow from the norms of the whole model's task vectors."""
        return self.coefficients is not None and self.coefficients[0].takes_squares

    def find_kernel(self, method: Method, site: Site, *, where: str) -> Kernel:
        """Return the method with the steps after it, if there are any."""
        if not self.steps:
            return method
        return Stepped(
            method,
            tuple((step, _resolve(step.parameters, given, site, f"{where}: post")) for step, given in self.steps),
        )

    def find_factors(self, site: Site, count: int, *, where: str) -> tuple[float, ...]:
        """Return the factors of `count` task vectors as far as the plan can know them; none where they are all 1."""
        if self.coefficients is None or self.coefficients[0].takes_squares:
            return ()
        method, given = self.coefficients
        settings = _resolve(method.parameters, given, site, f"{where}: coefficients")
        return method.find_factors(settings, count, depth=site.depth)

    def make_scaling(self, vectors: Sequence[str], *, where: str) -> Scaling | None:
        """Return what can only be known from all weights; None where nothing must."""
        if self.coefficients is None or not self.takes_squares:
            return None
        method, given = self.coefficients
        settings = _resolve(method.parameters, given, Site("", 0.0, ()), f"{where}: coefficients")
        return Scaling(method, settings, tuple(vectors))


def sees_alone(method: Method, steps: Steps) -> bool:
    """Whether an element, or each matrix, is merged by itself, so that it does not matter what is stored as one."""
    if method.takes_matrices or steps.steps:
        return True
    return method.reads == "element" and "place" not in method.given


def make_steps(recipe: Recipe, method: Method, *, where: str) -> Steps:
    """Look the recipe's steps up; `PlanError` for unknown ones, and where the method has no task vectors."""
    if (recipe.coefficients or recipe.post) and not _has_vectors(recipe, method):
        step = "coefficients" if recipe.coefficients else "post"
        optional = method.takes_deltas and method.base == "optional"
        taken = f"which {method.name} does not take{' without a base model' if optional else ''}"
        choice = "name a base_model" if optional else "choose a method with a base model"
        raise PlanError(f"{where}: {step} need task vectors, {taken}; leave {step} out, or {choice}")
    coefficients = None
    if recipe.coefficients is not None:
        found = get_coefficients(recipe.coefficients.method)
        coefficients = (found, _check_known(found.name, found.parameters, recipe.coefficients, where, "coefficients"))
    steps = [(get_step(given.method), given) for given in recipe.post or ()]
    return Steps(
        coefficients,
        tuple((step, _check_known(step.name, step.parameters, given, where, "post")) for step, given in steps),
    )


def _has_vectors(recipe: Recipe, method: Method) -> bool:
    if not method.takes_deltas or method.base != "optional":
        return method.takes_deltas and method.base == "required"
    modules = [module.slices for module in (recipe.modules or {}).values()]
    slices = [part for parts in (recipe.slices, *modules) for part in parts or ()]
    return recipe.base_model is not None or (bool(slices) and all(part.base_model is not None for part in slices))


def _check_known(name: str, known: Sequence[Parameter], step: GivenStep, where: str, key: str) -> Parameters:
    names = [parameter.name for parameter in known]
    for given in step.parameters:
        if given not in names:
            near = difflib.get_close_matches(given, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(names) or 'none'}"
            raise PlanError(f"{where}: {key}: {name} takes no parameter {given!r}; {hint}")
    return step.parameters


def _resolve(parameters: Sequence[Parameter], given: Parameters, site: Site, where: str) -> dict[str, Any]:
    own = Site(site.tensor, site.t, (given,), site.depth)
    return resolve_shared(parameters, own, where=where, hint="set it beside its method")
