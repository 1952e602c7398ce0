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

from mergemill.engine.checkpoint.checkpoint import HUB_NAME
from mergemill.engine.checkpoint.terms import HUB, Terms, common_license, common_lists

_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_ABSOLUTE = re.compile(r"(file://|local://)?/")
_LORA = re.compile(r"\+(?=/)")  # before an adapter in a folder
_TITLE = re.compile(r"^# .*$", re.MULTILINE)
_LOADED = 'name = "'
_IN_COMMENT = re.compile(r"(?<![\w.~:/-])/(?:[^\s/]+/)+([^\s/]*)")


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
    terms: Mapping[str, Terms] = field(default_factory=dict)  # of the models, as far as they have cards
    commits: Mapping[str, str] = field(default_factory=dict)  # at which models of the Hub were read
    loader: str = ""  # the class of transformers that loads it; empty: no usage is shown
    about: str = "A merge of models, made with mergemill."
    library: str = ""  # that loads it; empty: it is not said
    code: Mapping[str, str] = field(default_factory=dict)  # files of methods beside the card, each with its sha256


def make_card(card: Card) -> str:
    """Return the text of a ``README.md`` for a merge.

    Of folders given by an absolute path, as models and in the recipe, only the last name is written: a card is for all.
    """
    models = [shorten_path(model) for model in card.models]
    front = yaml.safe_dump(_make_front(card, models), sort_keys=False, allow_unicode=True)
    counts = f"{card.tensor_count:,} tensors, {card.parameter_count:,} parameters, {', '.join(card.dtypes)}."
    body = [
        f"# {card.title}",
        card.about,
        *([f"## Usage\n\n{_show_usage(card.loader)}"] if card.loader else []),
        f"## Method\n\n**{card.method_title}.** {_link_papers(card.method_source)}".rstrip(),
        "## Models\n\n" + "\n".join(f"* {_describe(card, model)}" for model in card.models),
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
    place = f"{HUB}{place[len(HUB) :]}" if place.lower().startswith(HUB) else place
    name = "/".join(place.removeprefix(HUB).split("/")[:2]) if place.startswith(HUB) else place
    return name if HUB_NAME.fullmatch(name) and (place.startswith(HUB) or not Path(place).exists()) else ""


def name_card(text: str, name: str) -> str:
    """Return a card of `make_card` as that of a repository: its name is the title, and what the usage loads.

    >>> name_card('---\\na: b\\n---\\n# a + b\\nname = "."', "org/name")
    '---\\na: b\\n---\\n# name\\nname = "org/name"'
    """
    front, marks, body = text.partition("\n---\n")
    body = _TITLE.sub(f"# {name.rpartition('/')[2]}", body, count=1)
    return front + marks + body.replace(f'{_LOADED}."', f'{_LOADED}{name}"', 1)


def _make_front(card: Card, models: Sequence[str]) -> dict[str, Any]:
    bases = {"base_model": list(names)} if (names := hub_names(models)) else {}
    library = {"library_name": card.library} if card.library else {}
    return {
        **bases,
        "base_model_relation": "merge",
        **library,
        "tags": ["merge", "mergemill"],
        **common_license(card.terms.values()),
        **{key: list(values) for key, values in common_lists(card.terms.values()).items()},
    }


def _show_usage(loader: str) -> str:
    lines = [
        f"from transformers import {loader}, AutoTokenizer",
        "",
        f'{_LOADED}."',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f'model = {loader}.from_pretrained(name, dtype="auto", device_map="auto")',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _link_papers(source: str) -> str:
    """Turn the numbers of papers into links.

    >>> _link_papers("Ilharco et al., arXiv:2212.04089, eq. 1.")
    'Ilharco et al., [arXiv:2212.04089](https://arxiv.org/abs/2212.04089), eq. 1.'
    """
    return _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def _mention(model: str) -> str:
    name = next(iter(hub_names([model])), None)
    return f"[{model}](https://huggingface.co/{name})" if name else f"`{model}`"


def _describe(card: Card, model: str) -> str:
    """Return a model, at which commit it was read, and what its card says where not all cards say the same."""
    written = shorten_path(model)
    name = next(iter(hub_names([written])), None)
    commit = card.commits.get(model)
    told = [_mention(written)]
    if name and commit:
        told.append(f"at commit [`{commit[:12]}`](https://huggingface.co/{name}/tree/{commit})")
    terms = card.terms.get(model)
    if terms and any(each.license_fields for each in card.terms.values()) and not common_license(card.terms.values()):
        told.append(f"licence `{terms.license.replace('`', '')[:80]}`" if terms.license_fields else "says no licence")
    return ", ".join([*told, *(["gated"] if terms and terms.gated else [])])


def _describe_code(code: Mapping[str, str]) -> str:
    files = "\n".join(f"* `{name}`, sha256 `{checksum}`" for name, checksum in code.items())
    return f"The method is not of mergemill's own. These files, here beside the recipe, hold it:\n\n{files}"


def _fence(recipe_text: str) -> str:
    # A recipe may hold a fence of its own, in a chat template: the outer one must be longer.
    longest = max((len(run) for run in re.findall("`{3,}", recipe_text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}yaml\n{recipe_text.rstrip()}\n{fence}"
