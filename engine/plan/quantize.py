"""What of a model is written quantised, and what its config then says: the rules of each format.

* ``fp8_block``: matrices of linear layers inside layers, of attention, MLPs, experts and mixers, also packed experts,
  whose sides are multiples of 128 (transformers refuses other blocks); not norms, routers, convolutions, embeddings,
  heads, or what sees and hears. Each of these that is a matrix is named
  in ``modules_to_not_convert``, as Qwen's and DeepSeek's own FP8 models have it.
* ``mxfp4``: the packed experts of gpt-oss, turned round to ``[expert, out, in]``; nothing else, as in gpt-oss. No
  other family is loaded in this form.

A quantised weight is rounded once, from the float32 that it is merged or read in (decided 2026-11-29): the recipe's
dtype is that of all others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from mergemill.engine.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from mergemill.engine.checkpoint.config import REMOVED, Changes, make_config
from mergemill.engine.checkpoint.family import Family, is_packed_otherwise, split_layer
from mergemill.engine.checkpoint.layout import TensorInfo
from mergemill.engine.checkpoint.quantized import find_keys
from mergemill.engine.checkpoint.tensor_kinds import find_tensor_kind
from mergemill.engine.errors import PlanError
from mergemill.engine.plan.values import OutputTensor, SmallFile
from mergemill.engine.tensors.codes_made import CODINGS
from mergemill.engine.tensors.dtypes import is_mergeable
from mergemill.engine.tensors.permuted import Permuted
from mergemill.engine.tensors.quantizing import Quantized

_LINEAR_KINDS = ("attention", "mlp", "experts", "mixer")
_NO_LINEAR = ("*embed*", "*relative_attention_bias*", "*conv*")
_PACKED = ("*experts.gate_up_proj", "*experts.down_proj", "*experts.up_proj")
_FP8_BLOCK = 128
_MX_BLOCK = 32
_OF_GPT_OSS = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


@dataclass(frozen=True, slots=True)
class QuantizedOutput:
    """A model's tensors as they are written, and what of it is said."""

    tensors: Sequence[OutputTensor]
    changes: Changes  # of the config

    def mark(self, files: tuple[SmallFile, ...]) -> tuple[SmallFile, ...]:
        """Return the files of an output with a config that says how it is quantised."""
        return tuple(self._mark(file) for file in files)

    def _mark(self, file: SmallFile) -> SmallFile:
        if file.name != CONFIG_NAME or file.data is None:
            return file
        return replace(file, data=make_config(file.data, self.changes))


def quantize(
    tensors: Sequence[OutputTensor], scheme: str | None, donor: Checkpoint, family: Family, *, where: str
) -> QuantizedOutput:
    """Return the output with what `scheme` quantises; as it is where there is none. Raises `PlanError`."""
    if scheme is None:
        return QuantizedOutput(tensors, {})
    if donor.is_pipeline or any(tensor.stem for tensor in tensors):
        raise PlanError(f"{where}: quantize: a pipeline of diffusers cannot be quantized; convert its components")
    return _SCHEMES[scheme](tensors, donor, family, where)


def _quantize_fp8(tensors: Sequence[OutputTensor], donor: Checkpoint, family: Family, where: str) -> QuantizedOutput:
    turned = next((each.name for each in tensors if is_packed_otherwise(each.name, family)), None)
    if turned is not None:
        raise PlanError(
            f"{where}: quantize: tensor {turned} holds experts the other way round, [expert, in, out], for which block "
            f"FP8 has no form; {'mxfp4 has one' if donor.config.get('model_type') == 'gpt_oss' else 'leave it out'}"
        )
    made, left = [], []
    for tensor in tensors:
        if (shape := _find_linear(tensor, family)) is None:
            made.append(tensor)
            left += [info.name.removesuffix(".weight") for info in tensor.infos if _is_matrix(info)]
        else:
            made += [_write_fp8(tensor, shape)]
    if made == [*tensors]:
        raise PlanError(
            f"{where}: quantize: no tensor is a matrix of a linear layer whose sides are multiples of "
            f"{_FP8_BLOCK}, which block FP8 is for"
        )
    if not any(tensor.name.endswith("lm_head.weight") for tensor in tensors):
        left.append("lm_head")  # a module that is there all the same: it is the embedding
    said = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": sorted(left),
        "quant_method": "fp8",
        "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK],
    }
    return QuantizedOutput(made, _say(said, donor))


def _is_matrix(info: TensorInfo) -> bool:
    return info.name.endswith(".weight") and len(info.shape) == 2


def _find_linear(tensor: OutputTensor, family: Family) -> tuple[int, ...] | None:
    """Return the shape of a tensor that is quantised; None for one that is not."""
    name, shape = tensor.name, tensor.expression.shape
    if split_layer(name) is None or not is_mergeable(tensor.dtype):
        return None
    if len(shape) not in (2, 3) or prod(shape) == 0 or any(size % _FP8_BLOCK for size in shape[-2:]):
        return None
    packed = len(shape) == 3 and any(fnmatchcase(name, pattern) for pattern in _PACKED) and not tensor.stored_as
    linear = len(shape) == 2 and name.endswith(".weight") and find_tensor_kind(name, family) in _LINEAR_KINDS
    out = any(fnmatchcase(name, pattern) for pattern in (*_NO_LINEAR, *family.transposed))
    return shape if (packed or linear) and not out else None


def _write_fp8(tensor: OutputTensor, shape: tuple[int, ...]) -> OutputTensor:
    name, (rows, columns) = tensor.name, shape[-2:]
    scales = (*shape[:-2], -(-rows // _FP8_BLOCK), -(-columns // _FP8_BLOCK))
    infos = (TensorInfo(name, "F8_E4M3", shape), TensorInfo(f"{name}_scale_inv", "F32", scales))
    return _write(tensor, Quantized(tensor.expression, "fp8_block"), infos)


def _quantize_mxfp4(tensors: Sequence[OutputTensor], donor: Checkpoint, family: Family, where: str) -> QuantizedOutput:
    if (kind := donor.config.get("model_type")) != "gpt_oss":
        raise PlanError(
            f"{where}: quantize: mxfp4 is the form of gpt-oss, and {donor.ref} is of {kind or 'no family'}, of which "
            f"no loader would take it; fp8_block is for all families"
        )
    made = [_write_mxfp4(each, where) if is_packed_otherwise(each.name, family) else each for each in tensors]
    if made == [*tensors]:
        raise PlanError(f"{where}: quantize: no tensor is a stack of experts, which mxfp4 is for")
    return QuantizedOutput(made, _say({"modules_to_not_convert": _OF_GPT_OSS, "quant_method": "mxfp4"}, donor))


def _write_mxfp4(tensor: OutputTensor, where: str) -> OutputTensor:
    count, columns, rows = tensor.expression.shape
    if columns % _MX_BLOCK:
        raise PlanError(
            f"{where}: quantize: tensor {tensor.name} has {columns} inputs, no multiple of {_MX_BLOCK}, as mxfp4 needs"
        )
    infos = (
        TensorInfo(f"{tensor.name}_blocks", "U8", (count, rows, columns // _MX_BLOCK, _MX_BLOCK // 2)),
        TensorInfo(f"{tensor.name}_scales", "U8", (count, rows, columns // _MX_BLOCK)),
    )
    return _write(tensor, Quantized(Permuted(tensor.expression, (0, 2, 1)), "mxfp4"), infos)


def _write(tensor: OutputTensor, expression: Quantized, infos: tuple[TensorInfo, ...]) -> OutputTensor:
    return tensor._replace(dtype="U8", expression=expression, stored_as=infos)


def _say(settings: Mapping[str, Any], donor: Checkpoint) -> Changes:
    """Return the changes of a config that is to say so, and nothing of how the donor was quantised."""
    removed: Changes = dict.fromkeys(find_keys(donor.config), REMOVED)
    return {**removed, ("quantization_config",): settings}


_SCHEMES: Mapping[str, Callable[[Sequence[OutputTensor], Checkpoint, Family, str], QuantizedOutput]] = {
    "fp8_block": _quantize_fp8,
    "mxfp4": _quantize_mxfp4,
}
SCHEMES = tuple(_SCHEMES)
assert set(SCHEMES) <= CODINGS.keys()
