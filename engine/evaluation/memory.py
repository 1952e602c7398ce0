"""What judging takes of memory: how many texts go through the layers together, and what is kept meanwhile."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mergemill.engine.errors import PlanError
from mergemill.engine.evaluation.making import MadeTensors, count_shared
from mergemill.engine.evaluation.passing import ShellLayout
from mergemill.engine.evaluation.scoring import BLOCK
from mergemill.engine.evaluation.shell import Shell
from mergemill.engine.evaluation.texts import ScoredTokens
from mergemill.engine.plan.sizes import format_size, say_enough
from mergemill.engine.plan.values import OutputTensor
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.workspace import Workspace

INSIDE_BYTES = 16 << 20  # that libraries take for a layer, at least
ROUNDED_BYTES = 4 << 20  # by which two arenas may be larger than was asked for


@contextmanager
def keep_tied(layout: ShellLayout, models: Sequence[MadeTensors]) -> Iterator[Workspace | None]:
    """Yield what keeps a tied embedding's sources up to the head; None where no layer of all models fits beside."""
    layer_bytes = max(count_shared(models, names) for names in layout.modules.values()) if layout.is_tied else 0
    need_bytes = count_shared(models, layout.head) + layer_bytes + ROUNDED_BYTES
    if not layout.is_tied or need_bytes > models[0].workplace.share_bytes:
        yield None
        return
    with models[0].share(models[1:], layout.head) as work:
        yield work


def find_texts(
    shell: Shell,
    layout: ShellLayout,
    models: Sequence[MadeTensors],
    tokens: ScoredTokens,
    rows: int,
    memory_bytes: int,
) -> int:
    """Return how many texts go through the layers together; `PlanError` where not those of one step would fit.

    They are whole steps of `rows` texts, so that the same texts are computed together whatever the memory.
    """
    width = int(shell.model.get_input_embeddings().weight.shape[1])
    texts, length = tokens.ids.shape
    step = min(rows, texts)
    step_bytes = 3 * 4 * width * length * len(models) * step
    fixed_bytes = max(_count_modules(layout, models[0], step * length)) + _count_inside(shell, step * length)
    if fixed_bytes + step_bytes > memory_bytes:
        need = 2 * (fixed_bytes + step_bytes)
        raise PlanError(
            f"{shell.where}: --memory {format_size(2 * memory_bytes)} is too little: a layer of this model and a text "
            f"take {need} bytes: --memory {say_enough(need)}"
        )
    return int(min(texts, (memory_bytes - fixed_bytes) // step_bytes * step))


def _count_modules(layout: ShellLayout, made: MadeTensors, tokens: int) -> Iterator[int]:
    """Yield what each layer, the embedding and the head take, as stored and as computed with."""
    for names in layout.modules.values():
        yield sum(_count_both(made.tensors[name]) for name in names)
    yield _count_both(made.tensors[layout.embedding])
    width = made.tensors[layout.embedding].expression.shape[-1]
    size = made.tensors[layout.head[0]].expression.shape[0]  # of its bias, where that comes first
    yield sum(_count_stored(made.tensors[name]) for name in layout.head) + 4 * min(BLOCK, size) * (width + 3 * tokens)


def _count_stored(tensor: OutputTensor) -> int:
    return tensor.expression.size * item_bytes(tensor.dtype)


def _count_both(tensor: OutputTensor) -> int:
    return _count_stored(tensor) + 4 * tensor.expression.size


def _count_inside(shell: Shell, tokens: int) -> int:
    """Return what a layer takes of its own for so many tokens: attention, and the MLP's channels."""
    config = shell.model.config.get_text_config()
    width = int(shell.model.get_input_embeddings().weight.shape[1])
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    return max(INSIDE_BYTES, 4 * tokens * (8 * width + 4 * inner))
