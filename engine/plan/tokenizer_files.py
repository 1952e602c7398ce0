"""The files of the output's tokenizer and chat template, and the ids of special tokens in its configs.

They are the source's of the vocabulary: byte for byte where nothing is added. Ids of special tokens (keys that end in
``_token_id``) are the source's too, since the donor's count another vocabulary; where the source has no such key, the
donor's token has its id here, and a token that is not in the vocabulary has none.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mergemill.engine.checkpoint.checkpoint import Checkpoint, read_file
from mergemill.engine.checkpoint.config import REMOVED, Changes, make_config, vocabulary_changes
from mergemill.engine.checkpoint.copied_files import TEMPLATE_FILES, TOKENIZER_FILES, copied_files, matches
from mergemill.engine.checkpoint.vocabulary import read_object
from mergemill.engine.plan.renumbering import Renumbering
from mergemill.engine.tokens.reading import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from mergemill.engine.tokens.writing import to_bytes, write_config, write_tokenizer

GENERATION_NAME = "generation_config.json"
TEMPLATE_NAME = "chat_template.jinja"
# Files that hold a vocabulary in another form than tokenizer.json.
_OTHER_FORMS = ("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What becomes of the files of tokenizers, and of the configs' ids."""

    source: Checkpoint  # whose files are copied
    made: Mapping[str, bytes] = field(default_factory=dict)  # written instead
    left_out: tuple[str, ...] = ()  # of the source's
    changes: Changes = field(default_factory=dict)  # of config.json

    def list_copied(self, donor: Checkpoint) -> list[tuple[str, Checkpoint]]:
        """Return which files are copied, and from which model: those of tokenizers from the source."""
        own = [(name, self.source) for name in copied_files(self.source.files) if _is_of_tokenizer(name)]
        others = [(name, donor) for name in copied_files(donor.files) if not _is_of_tokenizer(name)]
        gone = {*self.made, *self.left_out}
        return [(name, model) for name, model in (*own, *others) if name not in gone]

    def describe(self, donor: Checkpoint) -> Checkpoint:
        """Return the donor with the config that the output has, as far as it is of tokens."""
        return (
            replace(donor, config=json.loads(make_config(donor.config_text, self.changes))) if self.changes else donor
        )


def make_tokenizer_files(
    donor: Checkpoint, source: Checkpoint, renumbering: Renumbering | None, rows: int | None, template: str | None
) -> TokenizerFiles:
    """Return the files; rows: of the output's embedding; template: the chat template, None: the source's stays."""
    made: dict[str, bytes] = {}
    left_out: list[str] = []
    changes: Changes = {}
    changed = template is not None or (renumbering is not None and not renumbering.joined.is_source)
    config = read_object(source, TOKENIZER_CONFIG_NAME) if changed and TOKENIZER_CONFIG_NAME in source.files else {}
    written = dict(config)
    if renumbering is not None and not renumbering.joined.is_source:
        made[TOKENIZER_NAME] = write_tokenizer(renumbering.joined, renumbering.vocabularies)
        written = write_config(renumbering.joined, config)
        left_out += [name for name in copied_files(source.files) if matches(name, _OTHER_FORMS)]
    if template is not None:
        made[TEMPLATE_NAME] = template.encode()
        if config or TOKENIZER_NAME in source.files:
            written["chat_template"] = template
        left_out += [name for name in source.files if matches(name, TEMPLATE_FILES) and name != TEMPLATE_NAME]
    if written != config:
        made[TOKENIZER_CONFIG_NAME] = to_bytes(written)
    if renumbering is not None and source.ref != donor.ref:
        changes |= find_id_changes(donor.config, source.config, renumbering, donor.ref)
        made |= _make_generation(donor, source, renumbering)
    if renumbering is not None and rows is not None and donor.config:
        changes |= vocabulary_changes(donor.config, rows)
    return TokenizerFiles(source, made, tuple(left_out), changes)


def _is_of_tokenizer(name: str) -> bool:
    return matches(name, (*TOKENIZER_FILES, *TEMPLATE_FILES))


def find_id_changes(
    donor: Mapping[str, Any], source: Mapping[str, Any], renumbering: Renumbering, model: str
) -> Changes:
    """Return what changes in a config of the donor, so that ids of special tokens are the source's."""
    changes: Changes = {}
    for path, value in {**dict(_iter_ids(source)), **dict(_iter_ids(donor))}.items():
        inside = all(isinstance(_get(donor, path[:i]), Mapping) for i in range(len(path)))
        if not inside:
            continue
        found = _get(source, path)
        changes[path] = found if found is not None else _translate(value, renumbering, model)
    return changes


def warn_of_left_out(files: TokenizerFiles, *, where: str) -> Iterator[str]:
    """Yield a warning where files of the source are not in the output."""
    held = [name for name in files.left_out if matches(name, _OTHER_FORMS)]
    if held:
        yield (
            f"{where}: {', '.join(held)} of {files.source.ref} are left out: they hold its vocabulary without what is "
            f"added, which is in tokenizer.json alone"
        )


def _make_generation(donor: Checkpoint, source: Checkpoint, renumbering: Renumbering) -> dict[str, bytes]:
    if GENERATION_NAME not in donor.files:
        return {}
    own = read_object(source, GENERATION_NAME) if GENERATION_NAME in source.files else source.config
    changes = find_id_changes(read_object(donor, GENERATION_NAME), own, renumbering, donor.ref)
    return {GENERATION_NAME: make_config(read_file(donor, GENERATION_NAME), changes)}


def _iter_ids(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _iter_ids(value, (*path, key))
        elif key.endswith("_token_id"):
            yield (*path, key), value


def _get(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _translate(value: Any, renumbering: Renumbering, model: str) -> Any:
    """Return the output's id of the token to which a model gives the id `value`; none where it has none."""
    vocabulary = renumbering.vocabularies.get(model)
    tokens = {} if vocabulary is None else {number: token for token, number in vocabulary.ids.items()}
    given = value if isinstance(value, list) else [value]
    found = [renumbering.joined.ids[tokens[each]] for each in given if tokens.get(each) in renumbering.joined.ids]
    if not found:
        return REMOVED
    return found if isinstance(value, list) else found[0]
