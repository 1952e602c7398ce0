"""Settings of Gemma 2 and 3 in a GGUF file and in a config: windows, caps, and by what attention is scaled.

Its converter stores neither which layers have a window nor by what queries are divided: that is the head's size, but in
the models of 27B, which llama.cpp tells by their number of layers, the hidden size over the heads. What a config says
otherwise is not written. transformers' own reading of such a file takes caps and that number from its defaults.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mergemill.engine.errors import CheckpointError

USUAL_BASES = {"gemma2": 1e4, "gemma3": 1e6}  # of rotary embeddings, where none is stored
_PERIODS = {"gemma2": 2, "gemma3": 6}  # every so manieth layer has no window
_LARGE = {"gemma2": 46, "gemma3": 62}  # layers of the models that divide by another number
_USUAL_CAPS = {"gemma2": (50.0, 30.0), "gemma3": (None, None)}  # of attention and of logits
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_LOCAL_BASE = 1e4
_WINDOW = 4096  # of a Gemma 2 that says none
_SLIDING, _FULL = "sliding_attention", "full_attention"
Number = Callable[[str, float], float]


def make_gemma(
    settings: Mapping[str, Any], arch: str, config: Mapping[str, Any], number: Number, *, where: str
) -> dict[str, Any]:
    """Return what a config has besides those of `config`; number: gives a setting that is one."""
    window = settings.get(f"{arch}.attention.sliding_window", _WINDOW if arch == "gemma2" else 0)
    period = settings.get(f"{arch}.attention.sliding_window_pattern", _PERIODS[arch])
    if type(window) is not int or not 0 <= window < 1 << 31 or type(period) is not int or not 0 < period < 1 << 31:
        said = f"windows of {window!r} in all but every layer of {period!r}"
        raise CheckpointError(f"{where}: its attention has {said}, which is not known")
    layers = config["num_hidden_layers"]
    made: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": find_scalar(config, arch),
        "sliding_window": window or None,
        "layer_types": list_kinds(layers, period if window else 1),
    }
    for key, usual in zip(_CAPS, _USUAL_CAPS[arch], strict=True):
        is_capped = f"{arch}.{key}" in settings or usual is not None
        made[key] = number(key, usual or 0.0) if is_capped else None
    return made


def make_local_rope(number: Number) -> dict[str, Any]:
    """Return the rotary embedding of a Gemma 3's layers with a window."""
    return {"rope_type": "default", "rope_theta": number("rope.freq_base_swa", _LOCAL_BASE)}


def list_kinds(layers: int, period: int) -> list[str]:
    """Return the kind of each layer's attention.

    >>> list_kinds(3, 2)
    ['sliding_attention', 'full_attention', 'sliding_attention']
    """
    return [_SLIDING if (place + 1) % period else _FULL for place in range(layers)]


def find_scalar(config: Mapping[str, Any], arch: str) -> int:
    """Return the number whose root queries are divided by."""
    layers, hidden, heads = (config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    head: int = config.get("head_dim") or 256
    return hidden // heads if layers == _LARGE[arch] else head


def list_gemma(config: Mapping[str, Any], arch: str, *, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a GGUF file; `CheckpointError` for what llama.cpp would calculate otherwise."""
    has_windows = _has_windows(config, arch)
    expected = {
        "query_pre_attn_scalar": (256, find_scalar(config, arch)),
        "hidden_activation": ("gelu_pytorch_tanh",) * 2,
        "use_bidirectional_attention": (None, None),
    }
    if isinstance(config.get("layer_types"), list) and has_windows:
        expected["layer_types"] = (None, list_kinds(config["num_hidden_layers"], _PERIODS[arch]))
    for key, (usual, value) in expected.items():
        if (said := config.get(key, usual) or None) != value:
            raise CheckpointError(f"{where}: config.json: {key} is {said!r}; llama.cpp calculates as if {value!r}")
    if has_windows:
        window = config.get("sliding_window", _WINDOW)
        if type(window) is not int or not 0 < window < 1 << 31:
            raise CheckpointError(f"{where}: config.json: sliding_window is {window!r}, no whole number")
        yield f"{arch}.attention.sliding_window", window
    for key, usual in zip(_CAPS, _USUAL_CAPS[arch], strict=True):
        cap = config.get(key, usual)
        if cap is None and usual is None:
            continue
        if type(cap) not in (int, float) or not cap > 0 or (arch == "gemma3" and key == _CAPS[0]):
            raise CheckpointError(f"{where}: config.json: {key} is {cap!r}, which GGUF cannot say of {arch}")
        yield f"{arch}.{key}", float(cap)
    local = _find_local_base(config)
    if arch == "gemma3" and local != _LOCAL_BASE:
        yield f"{arch}.rope.freq_base_swa", local


def _has_windows(config: Mapping[str, Any], arch: str) -> bool:
    """Return whether layers have windows; a Gemma 2 that has none cannot be told, and is compared with one that has."""
    kinds = config.get("layer_types")
    if arch == "gemma2":
        return True
    return _SLIDING in kinds if isinstance(kinds, list) else config.get("sliding_window_pattern") != 1


def _find_local_base(config: Mapping[str, Any]) -> float:
    rope = config.get("rope_parameters")
    local = rope.get(_SLIDING) if isinstance(rope, Mapping) else None
    base = local.get("rope_theta") if isinstance(local, Mapping) else config.get("rope_local_base_freq")
    return float(base or _LOCAL_BASE)
