"""What an adapter's folder holds, from its config and headers alone; also of one that cannot be merged, and why not."""

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergemill.engine.checkpoint.adapter import WEIGHTS_NAMES, Adapter, open_adapter
from mergemill.engine.checkpoint.adapter_config import CONFIG_NAME
from mergemill.engine.checkpoint.checkpoint import TEMPLATES_FOLDER, read_small, resolve
from mergemill.engine.checkpoint.config import parse_config
from mergemill.engine.checkpoint.weights import StoredTensor, open_pinned
from mergemill.engine.errors import CheckpointError
from mergemill.engine.storage.pin import Pin
from mergemill.engine.storage.ranges import join, list_files
from mergemill.engine.storage.store import Storage

# What comes after a module's path in the names of an adapter's tensors, by any method of peft's.
_FACTOR = re.compile(r"\.(?:(?:lora|hada|lokr|oft|ia3|vera|boft|fourierft|token_adapter)[_.].*)$")
_PREFIX = "base_model.model."
_BEGUN = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA", "eva": "EVA"}


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What an adapter changes, and by how much."""

    base: str  # that it was trained on
    rank: int
    alpha: float
    method: str  # "LoRA", "rsLoRA", "DoRA", "PiSSA with rsLoRA", "LOHA"
    modules: Mapping[str, int]  # how many of each name it changes
    whole: tuple[str, ...]  # tensors that it replaces
    targets: tuple[str, ...] = ()  # as its config names them: modules and packed parameters
    ranks: tuple[int, ...] = ()  # all that there are, where not one alone
    embeddings: tuple[str, ...] = ()  # modules of tokens that it changes
    refused: str = ""  # why it is not taken as an input; empty where it is, on a base that fits


@dataclass(frozen=True, slots=True)
class InspectedAdapter:
    """An adapter's facts, its tensors, and the files beside them."""

    facts: AdapterFacts
    tensors: tuple[StoredTensor, ...]
    modules: tuple[str, ...]
    files: Mapping[str, Pin]


def inspect_adapter(path: str, storage: Storage) -> InspectedAdapter:
    """Look at the adapter in a folder; `CheckpointError` for one whose config or weights cannot be read at all."""
    files = list_files(place := resolve(path, None, storage), TEMPLATES_FOLDER, storage) or {}
    config = parse_config(read_small(files[CONFIG_NAME], CONFIG_NAME, storage), where=join(path, CONFIG_NAME))
    try:
        adapter = open_adapter(path, None, storage)
    except CheckpointError as error:
        name = next((name for name in WEIGHTS_NAMES if name in files), None)
        if name is None:
            raise
        tensors = open_pinned(files[name], join(place, name), storage).tensors
        modules = {_FACTOR.sub("", key).removeprefix(_PREFIX): None for key in tensors if _FACTOR.search(key)}
        whole = tuple(key for key in tensors if not _FACTOR.search(key))
        made = _describe(config, tuple(modules), whole, str(error), ())
        return InspectedAdapter(made, tuple(tensors.values()), tuple(modules), files)
    stored = [each for parts in adapter.parts.values() for each in parts.values()] + list(adapter.whole.values())
    ranks = sorted({adapter.config.find_rank(module) for module, parts in adapter.parts.items() if "A" in parts})
    tokens = [module for module, of in adapter.parts.items() if of.keys() & {"embedding_A", "tokens"}]
    said = {**config, "r": adapter.config.rank, "lora_alpha": adapter.config.alpha}  # also those that it leaves out
    made = _describe(said, tuple(adapter.parts), tuple(adapter.whole), _find_fault(adapter), tokens, ranks)
    return InspectedAdapter(made, tuple(stored), tuple(adapter.parts), files)


def _find_fault(adapter: Adapter) -> str:
    """Say what the adapter's own files have that no base would fit; empty where there is no such thing."""
    config = adapter.config
    for module, parts in adapter.parts.items():
        for kind in ("", "embedding_"):
            a, b = parts.get(f"{kind}A"), parts.get(f"{kind}B")
            if (a is None) != (b is None):
                return f"module {module} has half of a pair; the other factor is not there"
            if a is not None and ("magnitude" in parts) != config.has_magnitudes:
                has = "has a magnitude" if "magnitude" in parts else "has no magnitude"
                return f"module {module} {has}, and use_dora is {str(config.has_magnitudes).lower()} in its config"
            if a is not None and not config.parameters and a.shape[0] != config.find_rank(module):
                return f"module {module} is of rank {a.shape[0]}, and by its config of {config.find_rank(module)}"
    return ""


def _describe(
    config: Mapping[str, Any],
    modules: Sequence[str],
    whole: tuple[str, ...],
    refused: str,
    embeddings: Sequence[str],
    ranks: Sequence[int] = (),
) -> AdapterFacts:
    return AdapterFacts(
        base=_take(config, "base_model_name_or_path", str, ""),
        rank=_take(config, "r", int, 0),
        alpha=_take_alpha(config),
        method=_name_method(config),
        modules=dict(sorted(Counter(module.rpartition(".")[2] for module in modules).items())),
        whole=whole,
        targets=(*_list(config.get("target_modules")), *_list(config.get("target_parameters"))),
        ranks=tuple(ranks) if len(ranks) > 1 else (),
        embeddings=tuple(embeddings),
        refused=refused,
    )


def _name_method(config: Mapping[str, Any]) -> str:
    kind: str = _take(config, "peft_type", str, "of no type")
    if kind != "LORA":
        return kind
    begun = config.get("init_lora_weights")
    known = {"use_dora": "DoRA", "use_rslora": "rsLoRA"}
    said = [name for key, name in known.items() if config.get(key) is True]
    text = begun.lower() if isinstance(begun, str) else ""
    first = next((name for start, name in _BEGUN.items() if text.startswith(start)), "")
    return " with ".join([*([first] if first else []), *said]) or "LoRA"


def _take_alpha(config: Mapping[str, Any]) -> float:
    """Return the number; 0 where there is none, or one that JSON has no word for."""
    found = _take(config, "lora_alpha", (int, float), _take(config, "alpha", (int, float), 0))
    return float(found) if abs(found) < sys.float_info.max else 0.0


def _take(config: Mapping[str, Any], key: str, kind: Any, default: Any) -> Any:
    value = config.get(key)
    return value if isinstance(value, kind) and not isinstance(value, bool) else default


def _list(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(each for each in given if isinstance(each, str))
