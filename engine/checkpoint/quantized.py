"""Which checkpoints hold values that mean nothing without their scales: never numbers by mistake.

Several words say so, and publishers leave out any of them: a key of the config, at any depth; a file beside the
weights; the tensors that stand beside a weight; a weight's dtype. One of them is enough.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mergemill.engine.checkpoint.checkpoint import Checkpoint, read_file
from mergemill.engine.checkpoint.weights import StoredTensor

_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
_MODELOPT_FILE = "hf_quant_config.json"
_FILES = ("quantize_config.json", "quant_config.json")
QUANTIZATION_FILES = (_MODELOPT_FILE, *_FILES)

# Endings of tensors that stand beside a weight, or for it, in one way of quantisation only.
_COMPANIONS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    "_scale_inv": "block FP8",
    ".weight_scale": "FP8 or INT8",
    ".weight_scale_2": "NVFP4",
    ".weight_global_scale": "NVFP4",
    ".weight_zero_point": "compressed-tensors",
    ".weight_packed": "compressed-tensors",
    ".weight_g_idx": "compressed-tensors",
    ".weight_scales": "EETQ",
    ".SCB": "bitsandbytes LLM.int8",
    ".weight.absmax": "bitsandbytes 4-bit",
    ".weight.quant_map": "bitsandbytes 4-bit",
    ".weight.nested_absmax": "bitsandbytes 4-bit",
    ".weight._data": "quanto",
    ".weight._scale": "quanto",
    ".W_q": "HQQ",
}
_PAIRS = (("_blocks", "_scales", "MXFP4"), (".codes", ".codebooks", "AQLM"), (".indices", ".centroids", "VPTQ"))
_ENDINGS = (*_COMPANIONS, *(first for first, _, _ in _PAIRS), "_scale", "scales")
_BITSANDBYTES = ".quant_state.bitsandbytes__"
_NARROW = (
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "F8_E8M0",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "I8",
    "U8",
    "U32",
    "I32",
)
_WHOLE = ("I8", "U8", "I16", "U16", "I32", "U32")


def find_quantization(checkpoint: Checkpoint) -> str:
    """Say how a checkpoint's weights are quantised and what tells it; empty where nothing does."""
    if checkpoint.gguf:
        from mergemill.engine.checkpoint.gguf.opening import find_kind

        kind = find_kind(checkpoint.gguf)
        return f"{kind} of llama.cpp; the types of its tensors" if kind else ""
    found = (_find_key(checkpoint.config), _find_file(checkpoint), _find_companion(checkpoint.tensors))
    return next((each for each in found if each), "") or _find_packed(checkpoint.tensors)


def find_unread(tensors: Mapping[str, StoredTensor]) -> str:
    """Say what is quantised of those tensors of a quantised model of which no format has made anything.

    What its config says is said of others: heads, norms and routers are left as they are.
    """
    narrow = (
        f"{each.dtype} without a scale; it stores {name}" for name, each in tensors.items() if each.dtype in _NARROW
    )
    return _find_companion(tensors) or _find_packed(tensors) or next(narrow, "")


def read_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return what a checkpoint says of its quantisation; empty where it says nothing, or what cannot be read."""
    for path in find_keys(checkpoint.config):
        found: Any = checkpoint.config
        for key in path:
            found = found[key]
        if isinstance(found, Mapping):
            return found
    for name in (_MODELOPT_FILE, *_FILES):
        if name in checkpoint.files:
            found = _read_json(checkpoint, name)
            return found.get("quantization", found) if isinstance(found, Mapping) else {}
    return {}


def find_keys(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the keys of a config that say how weights are quantised, at any depth."""
    if isinstance(config, Mapping):
        yield from ((*path, key) for key in _CONFIG_KEYS if config.get(key))
        for key, value in config.items():
            if key not in _CONFIG_KEYS:
                yield from find_keys(value, (*path, str(key)))


def _find_key(config: Mapping[str, Any]) -> str:
    """Look for a key at any depth."""
    for path in find_keys(config):
        value: Any = config
        for key in path:
            value = value[key]
        method = value.get("quant_method") if isinstance(value, Mapping) else value
        return f"{method or 'unknown method'}; config.json has {'.'.join(path)}"
    return ""


def _find_file(checkpoint: Checkpoint) -> str:
    if _MODELOPT_FILE in checkpoint.files and (method := _read_modelopt(checkpoint)):
        return f"{method}; {_MODELOPT_FILE} is beside them"
    return next((f"GPTQ or AWQ; {name} is beside them" for name in _FILES if name in checkpoint.files), "")


def _read_modelopt(checkpoint: Checkpoint) -> str:
    """Return the algorithm that ModelOpt names; empty where it names none, as for a quantised cache alone."""
    try:
        method = _read_json(checkpoint, _MODELOPT_FILE)["quantization"]["quant_algo"]
    except (KeyError, TypeError):
        return "unknown method"
    return str(method) if method else ""


def _read_json(checkpoint: Checkpoint, name: str) -> Any:
    """Return what a file says; None where it is no JSON."""
    try:
        return json.loads(read_file(checkpoint, name))
    except (ValueError, RecursionError):
        return None


def _find_companion(tensors: Mapping[str, StoredTensor]) -> str:
    return next(_iter_companions(tensors), "")


def _iter_companions(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    for name in tensors:
        if _BITSANDBYTES in name:
            yield f"bitsandbytes 4-bit; it stores {name}"
        if not name.endswith(_ENDINGS):
            continue
        if method := next((method for ending, method in _COMPANIONS.items() if name.endswith(ending)), ""):
            yield f"{method}; it stores {name}"
        for first, second, method in _PAIRS:
            if name.endswith(first) and (other := name.removesuffix(first) + second) in tensors:
                yield f"{method}; it stores {name} and {other}"
        if weight := _find_scaled(name, tensors):
            yield f"{weight.dtype} values; it stores {weight.name} and {name}"


def _find_scaled(name: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """Return the narrow tensor that `name` scales: ``x_scale`` beside ``x``, or ``x.scales`` beside ``x.weight``."""
    stem = name.removesuffix("s").removesuffix("scale")
    weight = tensors.get(f"{stem}weight" if stem.endswith(".") else stem[:-1])
    return weight if weight is not None and weight.dtype in _NARROW else None


def _find_packed(tensors: Mapping[str, StoredTensor]) -> str:
    """Return what a weight's own dtype tells: no layer calculates with whole numbers."""
    for name, stored in tensors.items():
        if stored.dtype in _WHOLE and len(stored.shape) > 1 and name.endswith(("weight", "_proj")):
            return f"packed; {name} is stored as {stored.dtype}"
    return ""
