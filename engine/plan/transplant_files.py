"""The small files of a model with another's tokenizer: its own config, the donor's ids, tokenizer and chat template."""

import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mergemill.engine.checkpoint.card import Card, make_card
from mergemill.engine.checkpoint.checkpoint import CONFIG_NAME, TEMPLATES_FOLDER, Checkpoint, read_file
from mergemill.engine.checkpoint.config import REMOVED, Changes, make_config, vocabulary_changes
from mergemill.engine.checkpoint.copied_files import TOKENIZER_FILES, copied_files
from mergemill.engine.checkpoint.terms import read_terms
from mergemill.engine.plan.small_files import (
    CARD_NAME,
    RECIPE_NAME,
    copy_file,
    find_library,
    find_loader,
    tell_commits,
)
from mergemill.engine.plan.values import OutputTensor, SmallFile
from mergemill.engine.transplants.methods import METHODS

GENERATION_NAME = "generation_config.json"
_OF_TOKENIZER = (*TOKENIZER_FILES, "chat_template.jinja", "chat_template.json", f"{TEMPLATES_FOLDER}/*.jinja")
_ID = "_token_id"
_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids", "sequence_bias")


def make_transplant_files(
    model: Checkpoint, donor: Checkpoint, rows: int, text: str, method: str, tensors: Sequence[OutputTensor]
) -> tuple[SmallFile, ...]:
    """Return the files; text: what was asked for, kept as the recipe. method: by which rows are made."""
    made = {
        RECIPE_NAME: text.encode(),
        CARD_NAME: _make_card(model, donor, text, method, tensors).encode(),
        CONFIG_NAME: make_config(
            model.config_text, vocabulary_changes(model.config, rows) | _follow(model.config, _list_ids(donor.config))
        ),
    }
    if (generation := _make_generation(model, donor)) is not None:
        made[GENERATION_NAME] = generation
    own = [name for name in copied_files(model.files) if not _is_of_tokenizer(name) and name != GENERATION_NAME]
    theirs = [name for name in copied_files(donor.files) if _is_of_tokenizer(name)]
    copied = [copy_file(name, each) for each, names in ((model, own), (donor, theirs)) for name in names]
    return (*copied, *(SmallFile(name, data, None) for name, data in sorted(made.items())))


def _is_of_tokenizer(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _OF_TOKENIZER)


def _make_generation(model: Checkpoint, donor: Checkpoint) -> bytes | None:
    """Return the model's generation config with the donor's ids; None where neither has one."""
    text = read_file(model, GENERATION_NAME) if GENERATION_NAME in model.files else b"{}\n"
    theirs = json.loads(read_file(donor, GENERATION_NAME)) if GENERATION_NAME in donor.files else {}
    ids = {**_list_ids(donor.config), **_list_ids(theirs)}
    if GENERATION_NAME not in (*model.files, *donor.files):
        return None
    own: Mapping[str, Any] = json.loads(text)
    return make_config(text, _follow(own, ids) | {(key,): REMOVED for key in _IDS if key in own})


def _list_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of special tokens that a config says; of two places the outer one holds."""
    nested = [part for part in config.values() if isinstance(part, Mapping)]
    return {
        key: value
        for part in (*nested, config)
        for key, value in part.items()
        if key.endswith(_ID) and value is not None
    }


def _follow(config: Mapping[str, Any], ids: Mapping[str, Any]) -> Changes:
    """Return what changes where a config's ids become those of another; what the other does not have is removed."""
    places = list(_find_places(config))
    changes: Changes = {path: ids.get(path[-1], REMOVED) for path in places}
    held = {path[-1] for path in places}
    return changes | {(key,): value for key, value in ids.items() if key not in held}


def _find_places(config: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        if key.endswith(_ID):
            yield (key,)
        elif isinstance(value, Mapping):
            yield from ((key, inner) for inner in value if inner.endswith(_ID))


def _make_card(model: Checkpoint, donor: Checkpoint, text: str, method: str, tensors: Sequence[OutputTensor]) -> str:
    stored = {each.ref: each for each in (model, donor)}
    names = [each.ref.rstrip("/").rpartition("/")[2] for each in (model, donor)]
    return make_card(
        Card(
            title=f"{names[0]} with the tokenizer of {names[1]}",
            about="A model with the tokenizer of another, made with mergemill.",
            method_title=METHODS[method].title,
            method_source=METHODS[method].source,
            models=list(stored),
            recipe_text=text,
            dtypes=sorted({tensor.dtype for tensor in tensors}),
            tensor_count=len(tensors),
            parameter_count=sum(tensor.expression.size for tensor in tensors),
            terms={ref: read_terms(each) for ref, each in stored.items()},
            commits=tell_commits(stored),
            loader=find_loader(model),
            library=find_library(model),
        )
    )
