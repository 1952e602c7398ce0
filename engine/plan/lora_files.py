"""The files beside an adapter's weights: its config, as peft reads it, a card, and what it was extracted with."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from mergemill.engine.checkpoint.adapter_config import CONFIG_NAME
from mergemill.engine.checkpoint.card import make_adapter_card
from mergemill.engine.checkpoint.copied_files import TOKENIZER_FILES, matches
from mergemill.engine.checkpoint.family import spell
from mergemill.engine.plan.lora_modules import (
    Weight,
    find_patterns,
    list_modules,
    matches_saved,
    matches_target,
    name_exactly,
)
from mergemill.engine.plan.small_files import CARD_NAME, RECIPE_NAME, copy_file
from mergemill.engine.plan.values import SmallFile
from mergemill.engine.recipe import ModelRef

if TYPE_CHECKING:
    from mergemill.engine.plan.lora_pairs import ModelPair

_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)


@dataclass(frozen=True, slots=True)
class Written:
    """What an adapter holds."""

    cut: Mapping[str, Weight]  # tensors that are decomposed, by name
    ranks: Mapping[str, int]  # of these
    whole: Mapping[str, str]  # tensors that are stored whole, and their keys
    saved: tuple[str, ...]  # modules that are stored whole
    biases: bool  # whether there are biases of other modules
    grown: int | None  # rows of another vocabulary than the base's
    tied: bool  # whether the base's head is its embedding


def make_config(ready: "ModelPair", written: Written) -> dict[str, Any]:
    """Return ``adapter_config.json``: only what it names is in the file, and all of that."""
    names = dict.fromkeys((*ready.names, *(spell(name, ready.family) for name in ready.names)))
    known = (*list_modules(names), *(["lm_head"] if written.tied else []))
    modules = [each.module for each in written.cut.values() if not each.is_packed]
    parameters = [each.name for each in written.cut.values() if each.is_packed]
    linear = [each for each in written.cut.values() if each.kind == "linear"]
    ranks = {each.name if each.is_packed else each.module: written.ranks[n] for n, each in written.cut.items()}
    usual = max(ranks.values(), default=1)
    pattern = find_patterns(ranks, usual)
    base = ModelRef.model_validate(ready.asked.base_model)
    vocabulary = {each.module for each in written.cut.values() if each.kind == "embedding"} | set(written.saved)
    return {
        "alpha_pattern": {key: _find_alpha(ready, rank) for key, rank in pattern.items()},
        "base_model_name_or_path": base.path,
        "bias": "all" if written.biases else "none",
        "ensure_weight_tying": written.tied and any(each.endswith("embed_tokens") for each in vocabulary),
        "fan_in_fan_out": bool(linear) and all(each.turned for each in linear),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _find_alpha(ready, usual),
        "lora_dropout": 0.0,
        "modules_to_save": name_exactly(written.saved, known, matches_saved, "modules_to_save") or None,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": pattern,
        "revision": base.revision,
        "target_modules": name_exactly(modules, known, matches_target, "target_modules"),
        "target_parameters": name_exactly(parameters, ready.names, matches_target, "target_parameters") or None,
        "task_type": _find_task(ready.base.config),
        "use_dora": False,
        "use_rslora": ready.asked.rslora,
    }


def seal_with_config(ready: "ModelPair", written: Written) -> SmallFile:
    """Return the config: without it nobody takes a folder for an adapter."""
    return SmallFile(CONFIG_NAME, (json.dumps(make_config(ready, written), indent=2) + "\n").encode(), None)


def make_adapter_files(ready: "ModelPair", written: Written, recipe: str) -> Sequence[SmallFile]:
    """Return card and recipe, and of a model with another vocabulary its tokenizer's files."""
    names = [name for name in ready.model.files if matches(name, TOKENIZER_FILES)] if written.grown else []
    copied = [copy_file(name, ready.model) for name in sorted(names)]
    card = make_adapter_card(ready.model.ref, ready.base.ref, _describe(written), recipe)
    return (*copied, SmallFile(CARD_NAME, card.encode(), None), SmallFile(RECIPE_NAME, recipe.encode(), None))


def _find_alpha(ready: "ModelPair", rank: int) -> float | int:
    """Return the alpha by which a product of this rank is multiplied by 1."""
    return sqrt(rank) if ready.asked.rslora else rank


def _find_task(config: Mapping[str, Any]) -> str | None:
    found = config.get("architectures")
    architecture = str(found[0]) if isinstance(found, list) and found else ""
    if config.get("is_encoder_decoder") is True and "Conditional" in architecture:
        return "SEQ_2_SEQ_LM"
    return next((task for ending, task in _TASKS if architecture.endswith(ending)), None)


def _describe(written: Written) -> Sequence[str]:
    """Return what the adapter holds, a line for each kind of module."""
    ranks: dict[str, Counter[int]] = defaultdict(Counter)
    for name, weight in written.cut.items():
        ranks[(weight.name if weight.is_packed else weight.module).rpartition(".")[2]][written.ranks[name]] += 1
    lines = [f"`{kind}`: {_say_ranks(found)}" for kind, found in sorted(ranks.items())]
    kinds = Counter(module.rpartition(".")[2] for module in written.saved)
    lines += [f"`{kind}`: {count} stored whole" for kind, count in sorted(kinds.items())]
    if written.biases:
        lines.append("biases that changed")
    if written.grown is not None:
        lines.append(f"another vocabulary: call `model.resize_token_embeddings({written.grown})` on the base first")
    return lines


def _say_ranks(found: Counter[int]) -> str:
    return ", ".join(f"{count} of rank {rank}" for rank, count in sorted(found.items()))
