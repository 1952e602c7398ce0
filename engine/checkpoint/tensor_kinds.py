"""What a tensor is for, told by its name: attention, experts, a norm. For people, and for what formats quantise.

Names of the field's checkpoints agree on little words, so these are looked for, the most telling first. What none of
them finds is `other`: nothing that is calculated hangs on it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from mergemill.engine.checkpoint.family import Family, is_vocabulary, split_layer

KINDS = (
    "embedding", "attention", "mixer", "mlp", "experts", "router", "norm", "vision", "audio", "projector", "head",
    "other",
)  # fmt: skip
"""All kinds, in the order in which they are shown."""

_NAMED = (
    ("audio", r"(^|\.)(audio|speech)\w*\."),
    ("projector", r"(^|[._])(merger|\w*projector|connector|aligner)\."),
    ("vision", r"(^|\.)(vision|visual|image)\w*\."),
    ("norm", r"(norm\w*|(^|\.)ln_\w+|layernorm\w*|layer_norm\w*|(^|\.)ln\d?)(\.(weight|bias|scale|gamma|beta))?$"),
    ("router", r"(^|\.)(router|gate|shared_expert_gate|gate_wg)(\.|$)|\.e_score_correction_bias$"),
    ("experts", r"(^|[._])experts?([._]|$)"),
    ("mixer", r"(^|\.)(mixer|mamba\w*|ssm|linear_attn|conv|short_conv|\w*conv1d|rwkv|A_log|dt_bias)(\.|$)"),
    ("attention", r"attn|attention|(^|\.)(q|k|v|o|qkv|kv|out)_proj\.|(^|\.)sinks$"),
    ("mlp", r"(^|[._])(mlp|ffn|feed_forward|fc\d?|fc_in|fc_out|dense\w*|wi(_\d)?|wo)([._]|$)|(gate|up|down)_proj"),
    ("embedding", r"embed|(^|\.)(wte|wpe|shared)\."),
    ("head", r"(^|\.)(lm_head|head|score|classifier|embed_out)\."),
)
_COMPILED = tuple((kind, re.compile(pattern)) for kind, pattern in _NAMED)
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|head|decoder)\b|predictions|final_logits_bias")
_IN_LAYERS = ("attention", "mixer", "mlp", "experts")  # what tells layers apart


def find_tensor_kind(name: str, family: Family) -> str:
    """Return one of `KINDS` for a tensor's name.

    >>> from mergemill.engine.checkpoint.family import choose_family
    >>> llama = choose_family({})
    >>> [find_tensor_kind(f"model.layers.0.{each}", llama) for each in ("mlp.gate.weight", "mlp.experts.3.w1.weight")]
    ['router', 'experts']
    >>> find_tensor_kind("model.embed_tokens.weight", llama), find_tensor_kind("lm_head.weight", llama)
    ('embedding', 'head')
    """
    if is_vocabulary(name, family):
        return "head" if _HEADS.search(name) else "embedding"
    return next((kind for kind, pattern in _COMPILED if pattern.search(name)), "other")


def find_layer_kinds(names: Iterable[str], family: Family) -> Mapping[tuple[str, int], str]:
    """Return for each layer, by stack and number, what it is made of: ``attention + experts``."""
    found: dict[tuple[str, int], set[str]] = {}
    for name in names:
        if split := split_layer(name):
            stack, layer, rest = split
            found.setdefault((stack, layer), set()).add(find_tensor_kind(rest, family))
    return {place: _join_kinds(kinds) for place, kinds in found.items()}


def _join_kinds(kinds: set[str]) -> str:
    telling = [kind for kind in _IN_LAYERS if kind in kinds]
    return " + ".join(telling) or " + ".join(kind for kind in KINDS if kind in kinds)


def say_numbers(numbers: Sequence[int]) -> str:
    """Return ascending numbers in few words.

    >>> say_numbers([0, 1, 2, 5, 7, 9, 11]), say_numbers([4]), say_numbers([0, 1, 4, 5])
    ('0-2, 5-11 by 2', '4', '0-1, 4-5')
    """
    said, at = [], 0
    while at < len(numbers):
        step = numbers[at + 1] - numbers[at] if at + 1 < len(numbers) else 1
        end = at
        while end + 1 < len(numbers) and numbers[end + 1] - numbers[end] == step:
            end += 1
        if end - at < 2 and step != 1:
            end = at
        first, last = numbers[at], numbers[end]
        said.append(str(first) if first == last else f"{first}-{last}" + (f" by {step}" if step > 1 else ""))
        at = end + 1
    return ", ".join(said)
