"""Forward passes layer by layer: each is filled, sees all texts of all models, and is emptied again.

The family's own forward function runs once, over the texts of all models one after the other in its batch. Where it
comes to a layer, the rows of one model after another go through it, each with its own weights, a few at a time. So of
each layer of each model one is in memory, whatever the number of texts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from mergemill.engine.errors import PlanError
from mergemill.engine.evaluation.making import LayerRoom, MadeTensors
from mergemill.engine.evaluation.shell import Shell
from mergemill.engine.forward.skeleton import empty
from mergemill.engine.tensors.heap import return_freed_pages
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.workspace import Workspace

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class ShellLayout:
    """Which tensors fill which module, of all models alike."""

    modules: Mapping[str, tuple[str, ...]]
    """The tensors that each module is filled with, in the order of the first model's names; layers, and the rest."""
    embedding: str
    """The tensor of the input embedding."""
    head: tuple[str, ...]
    """The tensors of the head; of a tied one that of the embedding."""

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.embedding in self.head


def find_layout(shell: Shell, names: Sequence[str]) -> ShellLayout:
    """Return which tensors fill which module; `PlanError` where a parameter would stay empty."""
    targets = shell.find_targets(names)
    paths = {id(module): path for path, module in shell.model.named_modules()}
    embedding_path = paths[id(shell.model.get_input_embeddings())]
    head_path = paths[id(shell.model.get_output_embeddings())]
    modules: dict[str, list[str]] = {}
    for name, target in targets.items():
        modules.setdefault(shell.find_layer(target), []).append(name)
    embedding, head = modules.pop(embedding_path, []), modules.pop(head_path, [])
    tied = getattr(shell.model, "all_tied_weights_keys", None) or {}
    if f"{head_path}.weight" in tied:
        head = [*embedding, *(name for name in head if not name.endswith(".weight"))]
    if len(embedding) != 1 or not head:
        raise PlanError(f"{shell.where}: has no tensor for the {'head' if embedding else 'embedding'}; see --whole")
    return ShellLayout({path: tuple(found) for path, found in modules.items()}, embedding[0], tuple(head))


def run_layers(
    shell: Shell,
    layout: ShellLayout,
    models: Sequence[MadeTensors],
    ids: Tensor,
    rows: int,
    kept: Workspace | None = None,
) -> Tensor:
    """Return the last hidden states of each model, [models * texts, length, width], float32.

    ids: of all texts, [texts, length]. rows: texts that go through a layer at a time. kept: keeps what of the
    embedding was read.
    """
    base, room = shell.model.base_model, LayerRoom()
    with ExitStack() as stack, torch.no_grad():
        for path, names in layout.modules.items():
            stack.enter_context(_filled(shell, path, names, models, rows, room))
        stack.enter_context(_embedded(shell, layout, models, ids, kept))
        try:
            found = base(input_ids=ids.repeat(len(models), 1), use_cache=False)
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:  # of a family's own code
            kind, first = type(shell.model).__name__, str(error).strip().split("\n")[0]
            raise PlanError(f"{shell.where}: {kind} does not go layer by layer: {first}; see --whole") from error
    hidden: Tensor = found[0] if isinstance(found, tuple) else found.last_hidden_state
    return hidden


@contextmanager
def _filled(
    shell: Shell, path: str, names: Sequence[str], models: Sequence[MadeTensors], rows: int, room: LayerRoom
) -> Iterator[None]:
    """In the block, a module is filled with a model's tensors whenever that model's texts come to it."""
    module = shell.model.get_submodule(path)
    forward: Forward = module.forward
    is_layer = shell.is_layer(path)
    rows = rows if is_layer else 1 << 30

    def run(*args: Any, **kwargs: Any) -> Any:
        batch = _find_batch(args, kwargs)
        outputs: list[Any] = []
        first, *others = models
        with first.share(others, names) as work:
            for number, made in enumerate(models):
                shell.put(made.make_layer(names, room if is_layer else LayerRoom(), work))
                shell.check_filled(module, path)
                for start, stop in _iter_rows(batch, number, len(models), rows):
                    given = _take(args, kwargs, batch, start, stop)
                    outputs.append(forward(*given[0], **given[1]))
                empty(module)
                return_freed_pages()
        return _join(outputs)

    module.forward = run
    try:
        yield
    finally:
        del module.forward
        empty(module)


def _find_batch(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the length of the batch that a module is given: that of its first argument."""
    first = next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
    return int(first.shape[0])


def _iter_rows(batch: int, number: int, models: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield the rows of one model's texts, a few at a time; of what is alike for all texts, there is one row."""
    if batch < models or batch % models:
        yield 0, batch
        return
    each = batch // models
    for start in range(number * each, (number + 1) * each, rows):
        yield start, min(start + rows, (number + 1) * each)


def _take(args: Sequence[Any], kwargs: Mapping[str, Any], batch: int, start: int, stop: int) -> tuple[Any, Any]:
    """Return the arguments with some rows of each tensor that has the batch's length."""

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[start:stop] if value.dim() and value.shape[0] == batch else value
        if isinstance(value, tuple | list):
            return type(value)(map(cut, value))
        return {key: cut(item) for key, item in value.items()} if type(value) is dict else value

    return [cut(each) for each in args], {key: cut(each) for key, each in kwargs.items()}


def _join(outputs: Sequence[Any]) -> Any:
    """Return the outputs of all rows as one."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, tuple):
        return tuple(_join([each[place] for each in outputs]) for place in range(len(first)))
    return first


@contextmanager
def _embedded(
    shell: Shell, layout: ShellLayout, models: Sequence[MadeTensors], ids: Tensor, kept: Workspace | None
) -> Iterator[None]:
    """In the block, the embedding has the rows of those tokens alone that the texts hold."""
    module = shell.model.get_input_embeddings()
    forward, parameter = module.forward, module.weight
    tokens, places = torch.unique(ids, return_inverse=True)

    def run(input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = []
        first, *others = models
        with first.share(others, [layout.embedding]) if kept is None else nullcontext(kept) as work:
            for made in models:
                rows = made.make([layout.embedding], work)[layout.embedding][tokens].float()
                module._parameters["weight"] = torch.nn.Parameter(rows, requires_grad=False)
                found.append(forward(places, *args, **kwargs))
        module._parameters["weight"] = parameter
        return torch.cat(found)

    if int(tokens.max()) >= parameter.shape[0]:
        raise PlanError(
            f"{shell.where}: the tokenizer has token {int(tokens.max())}, and the embedding {parameter.shape[0]} rows"
        )
    module.forward = run
    try:
        yield
    finally:
        del module.forward
        module._parameters["weight"] = parameter
