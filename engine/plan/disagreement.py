"""Where the configs of a merge's inputs disagree on what the weights mean: both values, and whose is written.

Models with tensors of equal shapes may still calculate differently with them: other angles of the rotary embedding,
other heads, another activation. Their weights can be averaged, and the average serves neither.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mergemill.engine.checkpoint.checkpoint import Checkpoint

Config = Mapping[str, Any]

_ABSENT = object()

# Names of one thing; a config has one of them.
_MEANINGS: Mapping[str, tuple[str, ...]] = {
    "attention heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "key and value heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "head_dim": ("head_dim",),
    "epsilon of the norms": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "activation": ("hidden_act", "hidden_activation", "activation_function"),
    "rotary share": ("partial_rotary_factor", "rotary_pct"),
    "experts a token": ("num_experts_per_tok",),
    "softcap of attention": ("attn_logit_softcapping",),
    "softcap of logits": ("final_logit_softcapping",),
    "query_pre_attn_scalar": ("query_pre_attn_scalar",),
    "embedding_multiplier": ("embedding_multiplier",),
    "residual_multiplier": ("residual_multiplier",),
    "attention_multiplier": ("attention_multiplier",),
    "logits_scaling": ("logits_scaling",),
    "routed_scaling_factor": ("routed_scaling_factor",),
    "norm_topk_prob": ("norm_topk_prob",),
    "scoring_func": ("scoring_func",),
}


def warn_of_disagreement(donor: Checkpoint, checkpoints: Mapping[str, Checkpoint], *, where: str) -> list[str]:
    """Return a warning for each thing on which a model's config disagrees with that of the donor, which is written."""
    warnings = []
    for what, find in _list_meanings().items():
        own = find(_inner(donor.config))
        others = {name: find(_inner(each.config)) for name, each in checkpoints.items() if each.config}
        differing = [f"{name} {_say(value)}" for name, value in others.items() if _differ(value, own)]
        if differing:
            warnings.append(
                f"{where}: the models disagree on {what}, so their weights do not mean the same: {donor.ref} has "
                f"{_say(own)}, which is written; {', '.join(differing)}"
            )
    return warnings


def _list_meanings() -> Mapping[str, Callable[[Config], Any]]:
    found: dict[str, Callable[[Config], Any]] = {
        "rope_theta": _find_theta,
        "the scaling of rope": _find_scaling,
        "sliding_window": _find_window,
    }
    return found | {what: partial(_find_named, names) for what, names in _MEANINGS.items()}


def _find_named(names: Sequence[str], config: Config) -> Any:
    return next((config[name] for name in names if name in config), _ABSENT)


def _inner(config: Config) -> Config:
    """Return the part of a config that is about the language model."""
    found = config.get("text_config")
    return {**config, **found} if isinstance(found, Mapping) else config


def _find_theta(config: Config) -> Any:
    parameters = config.get("rope_parameters")
    named = parameters if isinstance(parameters, Mapping) and "rope_theta" in parameters else config
    return next((named[name] for name in ("rope_theta", "rotary_emb_base") if name in named), _ABSENT)


def _find_scaling(config: Config) -> Any:
    """Return what scales the angles; None where nothing does, which is also what an absent key says."""
    found = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(found, Mapping):
        return None
    kind = found.get("rope_type", found.get("type", "default"))
    rest = {key: value for key, value in found.items() if key not in ("rope_theta", "rope_type", "type")}
    return None if kind == "default" else {"rope_type": kind, **rest}


def _find_window(config: Config) -> Any:
    return None if config.get("use_sliding_window") is False else config.get("sliding_window", _ABSENT)


def _differ(value: Any, other: Any) -> bool:
    return _ABSENT not in (value, other) and bool(value != other)


def _say(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
