"""A tool of the tests' own: what a ties merge, then a slerp, then an average make of three models, in one tree."""

from mergemill.engine.checkpoint.checkpoint import CONFIG_NAME, open_checkpoint
from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.offers.formats import offer_stored
from mergemill.engine.plan.draft import Draft, finish
from mergemill.engine.plan.values import Origin, OutputTensor, Plan, SmallFile, SourceUse
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.place import Place

STEPS = {
    "ties": {"weight": (0.6, 0.4), "density": (0.3, 0.5), "normalize": True, "lambda": 1.0, "rescale": False},
    "slerp": {"t": 0.3},
    "linear": {"weight": (0.75, 0.25), "normalize": True},
}


def merge(method: str, name: str, inputs: tuple[Expression, ...]) -> Expression:
    """Return one step over inputs, the base first where it has one."""
    kernel, settings, has_base = get_method(method), STEPS[method], method == "ties"
    models = tuple(range(has_base, len(inputs)))
    place = Place(name, inputs[0].shape, 0, models, block=kernel.block(inputs[0].shape, settings))
    return Merged(kernel, inputs, has_base, settings, place, "F32")


def plan_tower(origin: Origin, shard_size: str | int, storage: object = None) -> Plan:
    """Return the plan of a tower over the models ``base``, ``a`` and ``b`` of the origin."""
    models = {name: open_checkpoint(origin.value[name]) for name in ("base", "a", "b")}
    offers = {name: offer_stored(model) for name, model in models.items()}
    tensors = []
    for name in offers["base"]:
        base, a, b = (offers[model][name].expression for model in models)
        slerped = merge("slerp", name, (base, merge("ties", name, (base, a, b))))
        tensors.append(OutputTensor(name, "F32", merge("linear", name, (slerped, b))))
    used = [SourceUse(name, each.path, len(tensors), len(tensors), 0, {}, 0) for name, each in models.items()]
    files = [SmallFile(CONFIG_NAME, models["base"].config_text, None)]
    return finish(Draft(origin, tensors, files, used, donor="base"), shard_size)
