"""What a task gathers of tensors that are measured and not written: the next round of each of a part's pieces."""

from collections.abc import Mapping, Sequence

from mergemill.engine.plan.memory import gather_bytes
from mergemill.engine.plan.values import Part
from mergemill.engine.runs.tasks.rounds import gather_round, hold_inputs
from mergemill.engine.runs.worker.modes import own_modes
from mergemill.engine.runs.worker.workplace import Counts, Workplace
from mergemill.engine.storage.ranges import check_pin
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.rounds import find_round
from mergemill.engine.tensors.slabs import SLAB
from mergemill.engine.tensors.workspace import Workspace

Totals = Mapping[str, Sequence[Partial]]  # of the rounds so far, by tensor


@own_modes()
def measure_part(part: Part, totals: Totals, workplace: Workplace, slab: int = SLAB) -> list[tuple[str, Partial]]:
    """Return what the round after `totals` gathers from each piece of the part that has one left."""
    found: list[tuple[str, Partial]] = []
    with workplace.lend(gather_bytes(part, workplace.share_bytes)) as arena:
        for piece in part.pieces:
            asked = find_round(piece.tensor.expression.rounds(), totals.get(piece.tensor.name, ()))
            if asked is None:
                continue
            with Workspace(arena, storage=workplace.storage, cache=workplace.cache) as work:
                hold_inputs(piece, work)
                found.append((piece.tensor.name, gather_round(asked, piece, work, workplace, slab)))
            workplace.count(Counts(work.read_bytes))
    for pin in {read.pin for piece in part.pieces for read in piece.tensor.expression.reads(piece.span)}:
        check_pin(pin, workplace.storage)
    return found
