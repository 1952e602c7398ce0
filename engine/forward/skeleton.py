"""A model's modules without its weights: parameters are shapes, buffers (such as rotary frequencies) are real.

The classes are those of transformers for the config's type; code that a checkpoint brings is never run.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mergemill.engine.errors import RunError
from mergemill.engine.forward.installed import EXTRA
from mergemill.engine.tensors.lazy import Tensor, torch

_NOT_OURS = ("model_type", "auto_map", "torch_dtype", "dtype", "quantization_config")  # keys of a config


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A decoder whose parameters are on torch's device ``meta``."""

    decoder: Any  # what is called with token ids
    embedding: Any
    embedding_name: str  # of its weight
    layers: Any  # a list of modules
    layers_name: str
    norm: Any  # after the last layer
    norm_name: str


def make_skeleton(config: Mapping[str, Any]) -> Skeleton:
    """Return the modules that a ``config.json`` describes; `RunError` for one that cannot be run layer by layer."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise RunError(f"a forward pass needs transformers, which is not installed; install {EXTRA}") from error
    kind = str(config.get("model_type"))
    rest = {key: value for key, value in config.items() if key not in _NOT_OURS}
    try:
        made = AutoConfig.for_model(kind, **rest)
        with without_weights():
            model: Any = AutoModelForCausalLM.from_config(made, dtype=torch.float32)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"transformers makes no model of type {kind!r} of this config: {error}") from error
    model.eval().requires_grad_(False)
    embedding, decoder = model.get_input_embeddings(), model.get_decoder()
    names = {id(module): name for name, module in model.named_modules()}
    layers = [each for each in decoder.children() if isinstance(each, torch.nn.ModuleList)]
    norms = [each for name, each in decoder.named_children() if "norm" in name]
    if len(layers) != 1 or len(layers[0]) != made.num_hidden_layers or len(norms) != 1:
        raise RunError(f"a model of type {kind!r} is not one list of layers and a norm, and is not run layer by layer")
    return Skeleton(
        decoder,
        embedding,
        f"{names[id(embedding)]}.weight",
        layers[0],
        names[id(layers[0])],
        norms[0],
        names[id(norms[0])],
    )


@contextmanager
def without_weights() -> Iterator[None]:
    """In the block, parameters of modules that are made have no memory; buffers, which follow from the config, have."""
    register = torch.nn.Module.register_parameter

    def register_meta(module: Any, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = _to_meta(parameter)

    torch.nn.Module.register_parameter = register_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def get_shape(module: Any, name: str) -> tuple[int, ...]:
    """Return the shape of one parameter or buffer."""
    parent, _, own = name.rpartition(".")
    return tuple(getattr(module.get_submodule(parent), own).shape)


def fill(module: Any, name: str, values: Tensor) -> None:
    """Put the values of one parameter or buffer into a module."""
    parent, _, own = name.rpartition(".")
    _put(module.get_submodule(parent), own, values)


def empty(module: Any) -> None:
    """Free what all parameters of a module hold."""
    for holder in module.modules():
        for own, parameter in holder._parameters.items():
            if parameter is not None and not parameter.is_meta:
                holder._parameters[own] = _to_meta(parameter)


def _to_meta(parameter: Any) -> Any:
    return torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _put(holder: Any, own: str, values: Tensor) -> None:
    if own in holder._parameters:
        holder._parameters[own] = torch.nn.Parameter(values, requires_grad=False)
    else:
        holder._buffers[own] = values
