"""A model of transformers without weights, and where each tensor of a checkpoint goes in it.

The family's own code computes; only its parameters are put in and taken out again, so nothing of a family is known
here. Buffers that no checkpoint holds (rotary frequencies) are made by its constructors, as always.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergemill.engine.errors import InputError, PlanError
from mergemill.engine.forward.skeleton import without_weights
from mergemill.engine.tensors.lazy import Tensor, torch

_NUMBERED = re.compile(r"\.(?=\d+\.)")


@dataclass(slots=True)
class Shell:
    """A causal language model whose parameters are on the device `meta`, and what puts tensors in."""

    model: Any
    where: str
    """What is evaluated, for messages."""
    _mapping: Any = field(init=False)
    _states: Any = field(init=False)

    def __post_init__(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._mapping = get_model_conversion_mapping(self.model)
        self._states = self.model.state_dict()

    def find_targets(self, names: Iterable[str]) -> dict[str, str]:
        """Return where each tensor of a checkpoint goes, by its name; those that the model does not take are left out.

        Raises `PlanError` where a parameter of the model comes from no tensor.
        """
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [each for each in self._mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in self._mapping if isinstance(each, WeightConverter)]
        prefix, found = self.model.base_model_prefix, dict[str, str]()
        for name in names:
            target, _ = rename_source_key(name, renamings, converters, prefix, self._states)
            if target not in self._states and name in self._states:
                target = name
            if target in self._states:
                found[name] = target
        return found

    def put(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Put tensors of a checkpoint, by their names there, into the modules; return what was filled."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(weight_mapping=self._mapping, dtype=torch.float32, device_map={"": "cpu"})
        info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), config)
        if info.mismatched_keys or info.conversion_errors:
            wrong = next(iter(info.mismatched_keys), None) or next(iter(info.conversion_errors))
            raise PlanError(f"{self.where}: transformers has another shape for {wrong}")
        return set(self._states) - set(info.missing_keys)

    def fill_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Put all tensors of a checkpoint in; `PlanError` names a parameter that no tensor is for."""
        self.put(tensors)
        self.model.tie_weights()
        self.check_filled(self.model, "")

    def check_filled(self, module: Any, path: str) -> None:
        """Raise `PlanError` where a parameter below a module is empty."""
        empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        if empty:
            name = f"{path}.{empty[0]}".removeprefix(".")
            raise PlanError(f"{self.where}: no tensor is for {name}, which transformers' model has")

    def find_layer(self, target: str) -> str:
        """Return the module that a parameter is filled with: the layer of a stack, or what holds it itself."""
        path = ""
        for piece in target.split(".")[:-1]:
            before, path = path, f"{path}.{piece}".removeprefix(".")
            if before and isinstance(self.model.get_submodule(before), torch.nn.ModuleList):
                return path
        return path

    def is_layer(self, path: str) -> bool:
        """Whether a module stands in a stack."""
        return isinstance(self.model.get_submodule(path.rpartition(".")[0]), torch.nn.ModuleList)


def load_transformers() -> Any:
    """Return transformers, silent; `InputError` where it is missing."""
    try:
        import transformers
    except ImportError:
        raise InputError("evaluating a model needs the package transformers: pip install mergemill[evaluate]") from None
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def open_shell(folder: Path, where: str) -> Shell:
    """Return the model that the config in a folder describes; `PlanError` where transformers has no such."""
    transformers = load_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        with without_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, OSError, ImportError) as error:
        first = str(error).strip().split("\n")[0]
        raise PlanError(f"{where}: transformers {transformers.__version__} cannot build this model: {first}") from None
    if model.get_output_embeddings() is None or model.base_model is model:
        raise PlanError(f"{where}: {type(model).__name__} has no head of its own, so no text can be judged with it")
    return Shell(model.eval(), where)
