"""An extraction's measurements, by the threads of the process that plans it: what changed, and singular values.

Of a tensor that changed nearly always the first slab tells; one that did not is read whole, twice: here only.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.extract import plan_prepared
from mergemill.engine.plan.extraction import Extraction
from mergemill.engine.plan.lora_pairs import ModelPair, TensorPair, prepare
from mergemill.engine.plan.lora_ranks import Measured
from mergemill.engine.plan.sizes import format_size, parse_size, say_enough
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import load_recipe, recipe_to_json
from mergemill.engine.runs.worker.modes import own_modes
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.tensors.cuts import find_values, make_gram, spectrum_bytes
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.slabs import SLAB, Span, iter_slabs
from mergemill.engine.tensors.thin import read_rows, rows_bytes, settle_whole
from mergemill.engine.tensors.workspace import Workspace

MEMORY = "1GiB"


def make_lora_plan(
    model: Any, base_model: Any, *, memory: str | int | None = None, budget: str | int | None = None, **settings: Any
) -> Plan:
    """Plan the adapter by which `model` differs from `base_model`; what changed is read, nothing is written.

    model: a reference as a recipe has it, or the path of a recipe, whose result is then written nowhere;
    ``recipe.yml#name`` is one of its documents. memory: what measuring may take. budget: the size of the file, of which
    ranks are made. settings: those of `Extraction`.
    Raises `InputError`.
    """
    budget_bytes = None if budget is None else parse_size(budget, what="--budget")
    asked = Extraction(model=_read_recipe(model), base_model=base_model, budget_bytes=budget_bytes, **settings)
    ready = prepare(asked)
    threads = os.cpu_count() or 1
    workplace = Workplace(parse_size(memory or MEMORY, what="--memory"), threads, storage=ready.storage)
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(partial(_measure, ready, workplace), ready.pairs.values())
        measured = dict(zip(ready.pairs, found, strict=True))
    return plan_prepared(ready, measured)


def _read_recipe(model: Any) -> Any:
    """Return a reference as it is, and a recipe's path as what stands there."""
    if not isinstance(model, str):
        return model
    path, _, stage = model.partition("#")
    if not path.endswith((".yml", ".yaml")):
        return model
    recipe = load_recipe(path)
    if stage:
        named = {str(each.name): each for each in (*(recipe.stages or ()), recipe)}
        if stage not in named:
            raise PlanError(f"{path}: has no document named {stage!r}; named are {', '.join(sorted(named))}")
        others = tuple(each for each in recipe.stages or () if each.name != stage)
        recipe = named[stage].model_copy(update={"stages": others or None, "text": "", "name": None})
    return {"recipe": recipe_to_json(recipe), "file": model}


@own_modes()
def _measure(ready: ModelPair, workplace: Workplace, pair: TensorPair) -> Measured:
    if pair.grown:
        return Measured(changed=True)
    matrix, weight = pair.difference, pair.weight
    wanted = ready.asked.measures and ready.cuts(weight, grown=False)
    step = matrix.slab_bytes(min(max(SLAB, matrix.block), matrix.size), "F32")
    need_bytes = sum(read.size_bytes + 64 for read in matrix.holds(Span(0, matrix.size)))
    need_bytes += max(step, rows_bytes(matrix, weight.shape, "gram") + spectrum_bytes(weight.shape)) if wanted else step
    if need_bytes > workplace.memory_bytes:
        raise PlanError(
            f"--memory {format_size(workplace.memory_bytes)} is too little to measure tensor {weight.name}: it needs "
            f"{need_bytes} bytes: --memory {say_enough(need_bytes)}"
        )
    with workplace.lend(need_bytes) as arena, Workspace(arena, storage=workplace.storage) as work:
        for read in matrix.holds(Span(0, matrix.size)):
            work.hold(read.pin, read.offset_bytes, read.size_bytes)
        if not wanted:
            return Measured(_differs(matrix, work))
        settled = settle_whole(matrix, work)
        shape = weight.shape
        grams = (make_gram(read_rows(settled, matrix, shape, i, work), shape) for i in range(weight.count))
        values = [find_values(gram).tolist() for gram in grams]
        return Measured(any(each and each[0] > 0 for each in values), values)


def _differs(matrix: Expression, work: Workspace) -> bool:
    ready = settle_whole(matrix, work)
    for span in iter_slabs(Span(0, matrix.size), SLAB, matrix.block):
        work.next_slab()
        if bool(ready.slab(span, work, "F32").any()):
            return True
    return False
