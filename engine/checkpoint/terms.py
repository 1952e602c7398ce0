"""What the cards of models say of their use: licence, gating, languages, data sets. Only what lies beside them is read.

Format: https://huggingface.co/docs/hub/model-cards (YAML between two lines of ``---``); gating:
https://huggingface.co/docs/hub/models-gated.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from mergemill.engine.checkpoint.checkpoint import Checkpoint, read_beginning_of
from mergemill.engine.storage.bounds import CARD_BYTES
from mergemill.engine.storage.shallow import ShallowLoader

CARD_NAME = "README.md"
_LICENSE_KEYS = ("license", "license_name", "license_link")
HUB = "hf://"
_GATED = "extra_gated_"  # what keys of a card begin with that asks something of who downloads
_LISTS = ("language", "datasets")
_MOST = 1000  # characters of a value
_MOST_LISTED = 100
_TEXT = "tag:yaml.org,2002:str"
_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a model's card says of its use."""

    license_fields: Mapping[str, str] = field(default_factory=dict)  # empty where it names no licence
    gated: bool = False  # whether who downloads it must agree to something
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # languages and data sets, by their keys
    published: bool = False  # whether the model is on the Hub

    @property
    def license(self) -> str:
        """The licence, in a word: of another than the Hub knows, its name."""
        found = self.license_fields.get("license", "")
        return self.license_fields.get("license_name", found) if found == "other" else found


def read_terms(checkpoint: Checkpoint) -> Terms:
    """Return what the card beside a model says; nothing where there is none."""
    published = checkpoint.path.startswith(HUB)
    if CARD_NAME not in checkpoint.files:
        return Terms(published=published)
    pairs = _read_pairs(read_card(checkpoint))
    texts = _take_texts(pairs)
    fields = {key: texts[key] for key in _LICENSE_KEYS if _is_plain(texts.get(key, ""))}
    return Terms(
        fields if "license" in fields else {},
        any(key.startswith(_GATED) for key in pairs),
        {key: found for key in _LISTS if (found := _take_list(pairs.get(key)))},
        published,
    )


def read_card(checkpoint: Checkpoint) -> str:
    """Return the beginning of a checkpoint's own card, with all of its front matter; empty where it has none."""
    if CARD_NAME not in checkpoint.files:
        return ""
    return read_beginning_of(checkpoint, CARD_NAME, CARD_BYTES).decode(errors="replace")


def read_front(text: str) -> Mapping[str, tuple[str, ...]]:
    """Return the texts of each key of a card's front matter, of lists as of single ones; those that can be shown."""
    return {key: _take_list(node) for key, node in _read_pairs(text).items()}


def common_license(terms: Iterable[Terms]) -> Mapping[str, str]:
    """Return the licence fields of the inputs' own cards where all agree; else nothing."""
    found = [each.license_fields for each in terms]
    return found[0] if found and all(fields == found[0] for fields in found) else {}


def common_lists(terms: Iterable[Terms]) -> Mapping[str, tuple[str, ...]]:
    """Return the languages and data sets that all inputs say, each where they say the same ones."""
    found = [each.lists for each in terms]
    return {
        key: values
        for key, values in (found[0] if found else {}).items()
        if all(set(lists.get(key, ())) == set(values) for lists in found)
    }


def warn_of_terms(terms: Mapping[str, Terms], *, where: str) -> list[str]:
    """Return warnings of licences in conflict, of models that say none, and of gated ones.

    Models in folders, none of which has a card that says a licence, are somebody's own: of them nothing is told
    (decided 2026-11-29).
    """
    named = {model: each.license for model, each in terms.items() if each.license_fields}
    unnamed = [model for model, each in terms.items() if not each.license_fields]
    told = []
    if not common_license(each for each in terms.values() if each.license_fields) and named:
        said = ", ".join(f"{model}: {license}" for model, license in named.items())
        told.append(
            f"{where}: licences differ ({said}); the model card names none: write there what all allow before you "
            f"publish the merge"
        )
    if unnamed and (named or any(terms[model].published for model in unnamed)):
        told.append(f"{where}: no licence is said by {', '.join(unnamed)}; the model card names none")
    if gated := [model for model, each in terms.items() if each.gated]:
        told.append(
            f"{where}: gated: who downloads {', '.join(gated)} agrees to terms; a merge that is published may have to "
            f"ask for the same"
        )
    return told


def parse_front_matter(text: str) -> Mapping[str, str]:
    """Return the texts that the front matter of a card gives for its keys; empty where it has none, or is not YAML.

    It is another author's, and read no further than that: neither are its values made, which tags can make of anything,
    nor its merge keys followed. Of one that is cut off nothing is believed.
    """
    return _take_texts(_read_pairs(text))


def _read_pairs(text: str) -> Mapping[str, yaml.Node]:
    match = _FRONT.match(text)
    try:
        root = yaml.compose(match[1], Loader=ShallowLoader) if match else None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):  # ValueError: an escape of no character
        return {}
    pairs = root.value if isinstance(root, yaml.MappingNode) else ()
    return {key.value: value for key, value in pairs if key.tag == _TEXT}


def _take_texts(pairs: Mapping[str, yaml.Node]) -> dict[str, str]:
    return {key: node.value for key, node in pairs.items() if node.tag == _TEXT}


def _take_list(node: yaml.Node | None) -> tuple[str, ...]:
    """Return the texts of a list, or the one that stands for it; none where anything else is among them."""
    nodes: Sequence[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else [node] if node else []
    if len(nodes) > _MOST_LISTED or not all(each.tag == _TEXT and _is_plain(each.value) for each in nodes):
        return ()
    return tuple(each.value for each in nodes)


def _is_plain(text: str) -> bool:
    return text.isprintable() and 0 < len(text) <= _MOST
