"""What tensors that no setting tells apart have in common: settings, blocks and what is not read, found once for all.

A mixture of experts has tens of thousands of tensors, and of few kinds. Settings depend on a tensor's name by filters
alone, so it is enough to know which of these match it.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from mergemill.engine.methods.contract import Method
from mergemill.engine.plan.settings import Site, resolve_settings
from mergemill.engine.plan.steps import Steps
from mergemill.engine.plan.weightless import find_weightless, leave_out_settings
from mergemill.engine.recipe import Condition, Guard, Parameters
from mergemill.engine.tensors.kernels import Kernel

Inputs = Sequence[tuple[str, str, Parameters]]  # models, the names of their tensors, and their own parameters


class Alike(NamedTuple):
    """What a method is given for each of them."""

    settings: Mapping[str, Any]
    copied: bool  # whether the method gives its one input unchanged; then nothing else is known
    kernel: Kernel  # the method with the steps after it
    block: int
    factors: tuple[float, ...]
    unread: tuple[int, ...]  # numbers of the inputs that change nothing
    read_settings: Mapping[str, Any]  # of the other ones


class AlikeTensors:
    """What was found so far, for one method with its steps and its guard."""

    __slots__ = ("_conditions", "_found", "_guard", "_method", "_steps", "_where")

    def __init__(self, method: Method, steps: Steps, guard: Guard, where: str) -> None:
        self._method, self._steps, self._guard, self._where = method, steps, guard, where
        self._conditions: dict[Hashable, tuple[tuple[Condition, ...], object]] = {}  # and whose, so that these stay
        self._found: dict[Hashable, Alike] = {}

    def find(self, site: Site, inputs: Inputs, shape: tuple[int, ...]) -> Alike:
        """Return what holds for a tensor of this shape; `PlanError` as `resolve_settings`."""
        scopes = (id(site.scopes), *[id(own) for _, _, own in inputs])
        if scopes not in self._conditions:
            given = [own for _, _, own in inputs]
            self._conditions[scopes] = self._list_conditions(site, given), (site.scopes, given)
        conditions, _ = self._conditions[scopes]
        names = (site.tensor, *[name for _, name, _ in inputs]) if conditions else ()
        key = scopes, site.t, site.depth, shape, tuple([each.matches(name) for name in names for each in conditions])
        if key not in self._found:
            self._found[key] = self._make(site, inputs, shape)
        return self._found[key]

    def _list_conditions(self, site: Site, own: Sequence[Parameters]) -> tuple[Condition, ...]:
        """Return all conditions by which a tensor's name could change what is found."""
        before = () if self._steps.coefficients is None else (self._steps.coefficients[1],)
        scopes = (*site.scopes, *own, *before, *(given for _, given in self._steps.steps))
        items = [
            item
            for scope in scopes
            for setting in scope.values()
            if isinstance(setting, tuple)
            for item in setting
            if isinstance(item, Condition)
        ]
        return tuple({str(item.filter): item for item in items}.values())

    def _make(self, site: Site, inputs: Inputs, shape: tuple[int, ...]) -> Alike:
        method, steps, where = self._method, self._steps, self._where
        settings = resolve_settings(method, site, inputs, where=where)
        if copies_input(method, settings):
            return Alike(settings, True, method, 0, (), (), settings)
        kernel = steps.find_kernel(method, site, where=where)
        unread = find_weightless(kernel, settings, steps, self._guard)
        return Alike(
            settings,
            False,
            kernel,
            kernel.block(shape, settings),
            steps.find_factors(site, len(inputs), where=where),
            tuple(unread),
            leave_out_settings(kernel, settings, len(inputs), unread),
        )


def copies_input(method: Method, settings: Mapping[str, object]) -> bool:
    """Whether the method gives its one input unchanged, so that offer bytes can be copied."""
    return method.name == "passthrough" and settings["scale"] == (None,)
