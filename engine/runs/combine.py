"""Combined adapters whose ranks hang on what comes out: these are measured by the process that plans.

As of an extraction, what was measured goes with the document as plain numbers, a rank for each module, so that nobody
measures again to resume or to verify.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.combine import make_adapter_plan as plan_adapters
from mergemill.engine.plan.sizes import format_size, parse_size, say_enough
from mergemill.engine.plan.values import Piece, Plan
from mergemill.engine.recipe.adapters import GivenAdapters, load_adapters
from mergemill.engine.runs.tasks.rounds import hold_inputs
from mergemill.engine.runs.worker.modes import own_modes
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.store import make_storage
from mergemill.engine.tensors.thin import Thin
from mergemill.engine.tensors.workspace import Workspace

MEMORY = "1GiB"


def make_adapter_plan(
    given: GivenAdapters,
    *,
    seed: int = 0,
    storage: Mapping[str, Mapping[str, Any]] | None = None,
    memory: str | int | None = None,
) -> Plan:
    """Plan the adapter that a document with ``adapters`` describes: a value, a path, a mapping or YAML text.

    seed: of what is dropped at random. storage: options of storage by scheme. memory: what measuring may take, where
    ranks hang on energy. Raises `InputError`.
    """
    recipe = load_adapters(given)
    if recipe.energy is None or not isinstance(recipe.rank, Mapping):
        return plan_adapters(recipe, seed=seed, storage=storage)
    threads, most = os.cpu_count() or 1, recipe.rank.get("max_rank")
    full = plan_adapters(recipe.model_copy(update={"rank": "full"}), seed=seed, storage=storage)
    workplace = Workplace(parse_size(memory or MEMORY, what="--memory"), threads, storage=make_storage(storage or {}))
    pieces = [piece for part in full.parts for piece in part.pieces if _is_first(piece)]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(partial(_measure, workplace, recipe.energy), pieces))
    ranks = {module: rank if most is None else min(rank, int(most)) for module, rank in found}
    return plan_adapters(recipe.model_copy(update={"rank": ranks, "text": ""}), seed=seed, storage=storage)


def _is_first(piece: Piece) -> bool:
    """Whether a piece is of the first of two factors."""
    return isinstance(piece.tensor.expression, Thin) and piece.tensor.expression.side == "A"


@own_modes()
def _measure(workplace: Workplace, energy: float, piece: Piece) -> tuple[str, int]:
    """Return a module, and the least rank that keeps this share of its change."""
    expression, need_bytes = piece.tensor.expression, piece.projected.slab_bytes
    assert isinstance(expression, Thin)
    module = piece.tensor.name.removeprefix("base_model.model.").partition(".lora_")[0]
    if need_bytes > workplace.memory_bytes:
        raise PlanError(
            f"--memory {format_size(workplace.memory_bytes)} is too little to measure module {module}: it needs "
            f"{need_bytes} bytes: --memory {say_enough(need_bytes)}"
        )
    with workplace.lend(need_bytes) as arena, Workspace(arena, storage=workplace.storage) as work:
        hold_inputs(piece, work)
        a, b, _ = expression.of.compute(work)
    squares = (a.double().square().sum(1) * b.double().square().sum(0)).sort(descending=True).values  # of A and B alike
    kept = squares.cumsum(0)
    return module, min(len(squares), int((kept < energy * kept[-1]).sum()) + 1)
