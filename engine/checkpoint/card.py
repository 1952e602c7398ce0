"""The model card: ``README.md`` with the front matter that the Hub reads.

Format: https://huggingface.co/docs/hub/model-cards (YAML between two lines of ``---``).
Only what is stored beside the inputs is looked at; the network never is.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mergemill.engine.checkpoint.checkpoint import HUB_NAME, Checkpoint, read_beginning_of
from mergemill.engine.storage.bounds import CARD_BYTES
from mergemill.engine.storage.shallow import ShallowLoader

_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_HUB = "hf://"
_ABSOLUTE = re.compile(r"(file://|local://)?/")
_LORA = re.compile(r"\+(?=/)")  # before an adapter in a folder
_IN_COMMENT = re.compile(r"(?<![\w.~:/-])/(?:[^\s/]+/)+([^\s/]*)")
_LICENSE_KEYS = ("license", "license_name", "license_link")
_MOST_LICENSE = 1000  # characters of one of them
_TEXT = "tag:yaml.org,2002:str"
_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a model card tells of a merge."""

    title: str
    method_title: str
    method_source: str  # one line; an ``arXiv:`` number in it becomes a link
    models: Sequence[str]  # as the recipe writes them, base first; Hub names among them go into ``base_model``
    recipe_text: str
    dtypes: Sequence[str]
    tensor_count: int
    parameter_count: int
    license_fields: Mapping[str, str]  # see `common_license`
    code: Mapping[str, str] = field(default_factory=dict)  # files of methods beside the card, each with its sha256


def make_card(card: Card) -> str:
    """Return the text of a ``README.md`` for a merge.

    Of folders given by an absolute path, as models and in the recipe, only the last name is written: a card is for all.
    """
    models = [shorten_path(model) for model in card.models]
    front = yaml.safe_dump(_make_front(models, card.license_fields), sort_keys=False, allow_unicode=True)
    counts = f"{card.tensor_count:,} tensors, {card.parameter_count:,} parameters, {', '.join(card.dtypes)}."
    body = [
        f"# {card.title}",
        "A merge of models, made with mergemill.",
        f"## Method\n\n**{card.method_title}.** {_link_papers(card.method_source)}".rstrip(),
        "## Models\n\n" + "\n".join(f"* {_mention(model)}" for model in models),
        f"## Tensors\n\n{counts}",
        f"## Recipe\n\n{_fence(shorten_paths(card.recipe_text))}",
        *([f"## Code\n\n{_describe_code(card.code)}"] if card.code else []),
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(body) + "\n"


def make_adapter_card(model: str, base: str, lines: Sequence[str], recipe_text: str) -> str:
    """Return the text of a ``README.md`` for an adapter of `base` that was extracted from `model`."""
    model, base = shorten_path(model), shorten_path(base)
    named = {"base_model": list(names)} if (names := hub_names([base])) else {}
    front = {**named, "base_model_relation": "adapter", "library_name": "peft", "tags": ["lora", "mergemill"]}
    body = [
        f"# {model} as an adapter of {base}",
        "Extracted from a model and its base, made with mergemill.",
        f"## Base\n\n{_mention(base)}",
        "## Modules\n\n" + "\n".join(f"* {line}" for line in lines),
        f"## Recipe\n\n{_fence(shorten_paths(recipe_text))}",
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n" + "\n\n".join(body) + "\n"


def shorten_path(text: str) -> str:
    """Return the last name of an absolute path of this machine; any other text as it is.

    >>> shorten_path("/home/me/base/"), shorten_path("/home/me/base@v1+/home/me/lora"), shorten_path("./org/base")
    ('base', 'base@v1+lora', './org/base')
    """
    if not _ABSOLUTE.match(text):
        return text
    return "+".join(part.rstrip("/").rpartition("/")[2] for part in _LORA.split(text))


def shorten_paths(recipe: str) -> str:
    """Return a recipe with the last name alone of each absolute path, also in its comments.

    >>> shorten_paths("- model: /home/me/base  # was /home/me/old\\n- model: org/tuned")
    '- model: base  # was old\\n- model: org/tuned'
    """
    pieces, at = [], 0
    for token in yaml.scan(recipe, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.ScalarToken):
            start, stop = token.start_mark.index, token.end_mark.index
            written = shorten_path(token.value)
            pieces += [
                _IN_COMMENT.sub(r"\1", recipe[at:start]),
                recipe[start:stop] if written == token.value else written,
            ]
            at = stop
    return "".join(pieces) + _IN_COMMENT.sub(r"\1", recipe[at:])


def hub_names(models: Iterable[str]) -> tuple[str, ...]:
    """Return those of `models` that name repositories of the Hub: no folder here, no path, no revision.

    >>> hub_names(["org/base", "org/tuned@main", "./org/local", "s3://bucket/model", "hf://org/base/folder"])
    ('org/base', 'org/tuned')
    """
    return tuple(dict.fromkeys(name for model in models if (name := _find_hub_name(model))))


def _find_hub_name(model: str) -> str:
    """Return the repository of the Hub that a model names; empty for any other."""
    if Path(model).exists():
        return ""  # a folder whose name may hold the marks of a revision and an adapter
    place = re.split("[@+]", model)[0]
    place = f"{_HUB}{place[len(_HUB) :]}" if place.lower().startswith(_HUB) else place
    name = "/".join(place.removeprefix(_HUB).split("/")[:2]) if place.startswith(_HUB) else place
    return name if HUB_NAME.fullmatch(name) and (place.startswith(_HUB) or not Path(place).exists()) else ""


def common_license(checkpoints: Sequence[Checkpoint]) -> Mapping[str, str]:
    """Return the licence fields of the inputs' own cards where all agree; else nothing."""
    found = [_read_license(checkpoint) for checkpoint in checkpoints]
    return found[0] if found and all(fields == found[0] for fields in found) else {}


def parse_front_matter(text: str) -> Mapping[str, str]:
    """Return the texts that the front matter of a card gives for its keys; empty where it has none, or is not YAML.

    It is another author's, and read no further than that: neither are its values made, which tags can make of anything,
    nor its merge keys followed. Of one that is cut off nothing is believed.
    """
    match = _FRONT.match(text)
    try:
        root = yaml.compose(match[1], Loader=ShallowLoader) if match else None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):  # ValueError: an escape of no character
        return {}
    pairs = root.value if isinstance(root, yaml.MappingNode) else ()
    return {key.value: value.value for key, value in pairs if value.tag == _TEXT and key.tag == _TEXT}


def _read_license(checkpoint: Checkpoint) -> Mapping[str, str]:
    if "README.md" not in checkpoint.files:
        return {}
    front = parse_front_matter(read_beginning_of(checkpoint, "README.md", CARD_BYTES).decode(errors="replace"))
    fields = {key: front[key] for key in _LICENSE_KEYS if _is_plain(front.get(key, ""))}
    return fields if "license" in fields else {}


def _is_plain(text: str) -> bool:
    return text.isprintable() and 0 < len(text) <= _MOST_LICENSE


def _make_front(models: Sequence[str], license_fields: Mapping[str, str]) -> dict[str, Any]:
    bases = {"base_model": list(names)} if (names := hub_names(models)) else {}
    return {
        **bases,
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "mergemill"],
        **license_fields,
    }


def _link_papers(source: str) -> str:
    """Turn the numbers of papers into links.

    >>> _link_papers("Ilharco et al., arXiv:2212.04089, eq. 1.")
    'Ilharco et al., [arXiv:2212.04089](https://arxiv.org/abs/2212.04089), eq. 1.'
    """
    return _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def _mention(model: str) -> str:
    name = next(iter(hub_names([model])), None)
    return f"[{model}](https://huggingface.co/{name})" if name else f"`{model}`"


def _describe_code(code: Mapping[str, str]) -> str:
    files = "\n".join(f"* `{name}`, sha256 `{checksum}`" for name, checksum in code.items())
    return f"The method is not of mergemill's own. These files, here beside the recipe, hold it:\n\n{files}"


def _fence(recipe_text: str) -> str:
    # A recipe may hold a fence of its own, in a chat template: the outer one must be longer.
    longest = max((len(run) for run in re.findall("`{3,}", recipe_text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}yaml\n{recipe_text.rstrip()}\n{fence}"
