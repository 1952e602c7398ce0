"""``adapter_config.json`` of peft: the scales of an adapter's changes, and whether it is of a kind that is known here.

Facts from peft 0.21. The names of the adapter's tensors say what it changes; the config says only by how much. Keys
that nobody here knows are let be, but for those that make another method of it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from mergemill.engine.checkpoint.config import parse_config
from mergemill.engine.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
PLAIN_LORA = (  # the way out for an adapter that belongs to a base which peft changes on loading
    "save it with peft's save_pretrained(…, path_initial_model_for_weight_conversion=…), which makes it plain LoRA"
)

T = TypeVar("T")

_OTHER_METHODS = {
    "alora_invocation_tokens": "activated LoRA (its weights hold for some tokens alone)",
    "arrow_config": "Arrow (a router chooses among adapters)",
    "kasa_config": "KaSA",
    "layer_replication": "layer_replication (it copies layers of the model)",
    "megatron_config": "a LoRA of Megatron's layers",
    "monteclora_config": "Monte-CLoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
_REPEATED_GROUP, _REPEAT, _MOST_REPEATS = re.compile(r"\)[*+{]"), re.compile(r"(?<!\\)[*+{]"), 4
# Ways to begin that change the base's weight, at random or by what is in no file.
# In any spelling: of one that peft would not load nobody knows whether the base was changed.
_CHANGES_BASE = re.compile(r"(?!pissa$)(?i:pissa.*|corda.*|lora[-_]?ga.*|loftq.*)")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What an adapter's config says of its scales."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    by_root: bool  # rsLoRA: the scale is alpha over the root of the rank
    transposed: bool  # fan_in_fan_out
    has_magnitudes: bool  # DoRA
    tokens: Mapping[str, tuple[int, ...]]  # by the ending of a module's name; "" is the embedding
    base: str  # the model that it was trained on, as its trainer called it
    parameters: tuple[str, ...]  # target_parameters
    ties: bool  # ensure_weight_tying: what is tied to an embedding is stored as well
    beginning: Literal["pissa", "olora"] | None  # what loading it takes out of the base's weights

    def find_rank(self, module: str) -> int:
        """Return the rank of the module of this name."""
        return _find(self.rank_pattern, module, self.rank)

    def find_scale(self, module: str) -> float:
        """Return what the product of the module's factors is multiplied by."""
        rank = self.find_rank(module)
        return _find(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.by_root else rank)

    def find_tokens(self, module: str) -> tuple[int, ...] | None:
        """Return the tokens whose rows of the module of this name were trained; None where it names none."""
        named = (tokens for key, tokens in self.tokens.items() if key and f".{module}".endswith(f".{key}"))
        return next(named, self.tokens.get(""))


def parse_adapter_config(text: bytes, *, where: str) -> AdapterConfig:
    """Return the config; `CheckpointError` for what is none, or is one of another method."""
    found = parse_config(text, where=where)
    _check_method(found, where)
    fields = _Fields(found, where)
    return AdapterConfig(
        rank=fields.take_count("r", 8),
        alpha=fields.take_number("lora_alpha", 8.0),
        rank_pattern={
            key: _count(value, f"rank_pattern: {key}", where) for key, value in fields.take_map("rank_pattern")
        },
        alpha_pattern={
            key: _number(value, f"alpha_pattern: {key}", where) for key, value in fields.take_map("alpha_pattern")
        },
        by_root=fields.take_flag("use_rslora"),
        transposed=fields.take_flag("fan_in_fan_out"),
        has_magnitudes=fields.take_flag("use_dora"),
        tokens=fields.take_tokens(),
        base=fields.take_text("base_model_name_or_path"),
        parameters=fields.take_texts("target_parameters"),
        ties=fields.take_flag("ensure_weight_tying"),
        beginning=_find_beginning(found.get("init_lora_weights")),
    )


def _check_method(found: Mapping[str, Any], where: str) -> None:
    kind = found.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type is {kind!r}; only adapters of the type LORA can be merged")
    for key, name in _OTHER_METHODS.items():
        if found.get(key):
            raise CheckpointError(
                f"{where}: {key} makes it {name}, which cannot be merged; only plain LoRA and DoRA can"
            )
    begun = found.get("init_lora_weights")
    if begun is not None and not isinstance(begun, bool | str):
        raise _wrong(where, "init_lora_weights", "true, false or a text", begun)
    if isinstance(begun, str) and _CHANGES_BASE.fullmatch(begun):
        raise CheckpointError(
            f"{where}: init_lora_weights is {begun!r}: it belongs to a base that peft changes on loading, which is not "
            f"the same twice or needs what is in no file; {PLAIN_LORA}"
        )


def _find_beginning(said: Any) -> Literal["pissa", "olora"] | None:
    """Return what peft makes anew of the base on loading; it knows OLoRA in any case of its letters."""
    if said == "pissa":
        return "pissa"
    return "olora" if isinstance(said, str) and said.lower() == "olora" else None


@dataclass(frozen=True, slots=True)
class _Fields:
    """The config's values, each of the kind that it must have; null stands for an absent key."""

    found: Mapping[str, Any]
    where: str

    def take_count(self, key: str, default: int) -> int:
        return _count(self._take(key, default), key, self.where)

    def take_number(self, key: str, default: float) -> float:
        return _number(self._take(key, default), key, self.where)

    def take_flag(self, key: str) -> bool:
        value = self._take(key, False)
        if not isinstance(value, bool):
            raise _wrong(self.where, key, "true or false", value)
        return value

    def take_text(self, key: str) -> str:
        value = self._take(key, "")
        if not isinstance(value, str):
            raise _wrong(self.where, key, "text", value)
        return value

    def take_texts(self, key: str) -> tuple[str, ...]:
        value = self._take(key, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise _wrong(self.where, key, "a list of texts", value)
        return tuple(value)

    def take_map(self, key: str) -> list[tuple[str, Any]]:
        value = self._take(key, {})
        if not isinstance(value, dict):
            raise _wrong(self.where, key, "a mapping from names of modules", value)
        for pattern in value:
            _check_pattern(pattern, f"{self.where}: {key}")
        return list(value.items())

    def take_tokens(self) -> Mapping[str, tuple[int, ...]]:
        key = "trainable_token_indices"
        value = self._take(key, {})
        listed = {"": value} if isinstance(value, list) else value
        if not isinstance(listed, dict) or not all(map(_is_tokens, listed.values())):
            raise _wrong(self.where, key, "a list of token ids, or such lists by module", value)
        return {module: tuple(tokens) for module, tokens in listed.items()}

    def _take(self, key: str, default: Any) -> Any:
        value = self.found.get(key)
        return default if value is None else value


def _check_pattern(pattern: str, where: str) -> None:
    """Refuse what is no regular expression, and what could be tried for ever: a config may be anybody's."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where}: {pattern!r} is no regular expression: {error}") from error
    if _REPEATED_GROUP.search(pattern) or len(_REPEAT.findall(pattern)) > _MOST_REPEATS:
        raise CheckpointError(f"{where}: {pattern!r} repeats too much to be looked for; name the modules")


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _find(pattern: Mapping[str, T], module: str, default: T) -> T:
    """Return the value of the first key that matches the end of the module's name, as peft looks for it."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _count(value: Any, key: str, where: str) -> int:
    if type(value) is not int or value < 1:
        raise _wrong(where, key, "a whole number from 1 on", value)
    return value


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(where, key, "a number", value)
    return float(value)


def _wrong(where: str, key: str, wanted: str, value: Any) -> CheckpointError:
    text = json.dumps(value)
    return CheckpointError(f"{where}: {key} must be {wanted}, not {text if len(text) < 60 else text[:60] + '…'}")
