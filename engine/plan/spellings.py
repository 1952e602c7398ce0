"""Models under several spellings: what a reference names is what is there, not how it is written.

``base/``, ``./base`` and a link to it are one model; so are ``org/name`` and ``org/name@main`` at one commit, and its
folder in the Hub's cache. And a local folder whose name holds ``+`` or ``@`` is that folder, where it is there and what
the text would otherwise mean is not (decided 2026-11-29: the language alone cannot know, and ``{path: …}`` always says
it).
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.errors import PlanError
from mergemill.engine.recipe import AnyRecipe, ModelRef, Recipe, Tokenizer
from mergemill.engine.recipe.vocabulary import ModelRow
from mergemill.engine.storage.ranges import is_remote
from mergemill.engine.storage.urls import is_url, parse_place

# A revision in the Hub's cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
_CACHED = re.compile(r".*/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})", re.DOTALL)
R = TypeVar("R", bound=AnyRecipe)


def read_paths(recipe: R, refs: Mapping[str, ModelRef], *, where: str) -> R:
    """Return the recipe with folders that are there for what looks like a revision or an adapter."""
    found = {name: path for name, ref in refs.items() if (path := _find_folder(name, ref, where)) is not None}
    return _replace_models(recipe, lambda ref: found.get(str(ref), ref)) if found else recipe


def join_spellings(
    recipe: R, checkpoints: Mapping[str, Checkpoint], *, where: str
) -> tuple[R, Mapping[str, Checkpoint], list[str]]:
    """Return the recipe and its models with one spelling, the first, for each model; and a warning for each other."""
    places = {name: _find_place(checkpoint) for name, checkpoint in checkpoints.items()}
    if len(set(places.values())) == len(places):
        return recipe, checkpoints, []
    first: dict[Any, str] = {}
    names = {name: first.setdefault(_identify(checkpoint), name) for name, checkpoint in checkpoints.items()}
    others = {name: kept for name, kept in names.items() if name != kept}
    if not others:
        return recipe, checkpoints, []
    refs: dict[str, ModelRef] = {}
    _replace_models(recipe, lambda ref: refs.setdefault(str(ref), ref))
    joined = _replace_models(recipe, lambda ref: refs[names[str(ref)]])
    kept = {name: checkpoint for name, checkpoint in checkpoints.items() if name not in others}
    return joined, kept, [f"{where}: {name} is the same model as {first}" for name, first in others.items()]


def _find_folder(name: str, ref: ModelRef, where: str) -> ModelRef | None:
    """Return the reference to the folder that is called as the whole text; None where there is none."""
    if (
        ref.adapters is not None
        or (ref.lora is None and ref.revision is None)
        or is_url(ref.path)
        or not _is_there(name)
    ):
        return None
    if ref.lora is not None and _is_there(ref.path):
        raise PlanError(
            f"{where}: {name}: there is a folder of this name, and also {ref.path}, to which +{ref.lora} may be an "
            f"adapter; write the folder as {{path: {name}}}, or the two as {{model: {ref.path}, lora: {ref.lora}}}"
        )
    return ModelRef.model_validate({"path": name, "override_architecture": ref.override_architecture})


def _is_there(path: str) -> bool:
    return Path(parse_place(path)).exists()


def _identify(checkpoint: Checkpoint) -> Any:
    """Return what two spellings of one model have in common: its place, where its weights lie, and what changes them.

    Of one file of ``torch.save`` there may be several models.
    """
    place, stored = _find_place(checkpoint), checkpoint.tensors.values()
    if place.startswith("hf://"):
        return place, frozenset((each.name, each.offset_bytes, each.nbytes) for each in stored), checkpoint.changes
    return place, frozenset((each.file, each.offset_bytes) for each in stored), checkpoint.changes


def _find_place(checkpoint: Checkpoint) -> str:
    """Return where a model is: a commit on the Hub and its folder in the Hub's cache are one place."""
    place = checkpoint.path if is_remote(checkpoint.path) else str(Path(checkpoint.path).resolve())
    cached = _CACHED.fullmatch(place)
    return "hf://{owner}/{name}@{commit}".format_map(cached.groupdict()) if cached else place


def _replace_models(recipe: R, change: Callable[[ModelRef], ModelRef]) -> R:
    """Return the recipe with each reference to a model changed."""
    changed: R = _change(recipe, change)
    if not isinstance(recipe, Recipe):
        return changed
    modules = recipe.modules and type(recipe.modules)({name: _change(m, change) for name, m in recipe.modules.items()})
    tokenizer = recipe.tokenizer and _change_tokenizer(recipe.tokenizer, change)
    made: R = changed.model_copy(update={"modules": modules, "tokenizer": tokenizer})  # type: ignore[assignment]
    return made


def _change_tokenizer(tokenizer: Tokenizer, change: Callable[[ModelRef], ModelRef]) -> Tokenizer:
    def change_source(source: Any) -> Any:
        if isinstance(source, ModelRow):
            return source.model_copy(update={"model": change(source.model)})
        return change(source) if isinstance(source, ModelRef) else source

    tokens = {
        text: token.model_copy(update={"source": change_source(token.source)})
        for text, token in tokenizer.tokens.items()
    }
    update = {"source": change_source(tokenizer.source), "tokens": type(tokenizer.tokens)(tokens)}
    return tokenizer.model_copy(update=update)


def _change(value: Any, change: Callable[[ModelRef], ModelRef]) -> Any:
    """Return a recipe or a part of it with its references changed, and those of its models, slices and sources."""
    update: dict[str, Any] = {}
    for name in ("model", "source_model", "delta_base", "base_model"):
        if (ref := getattr(value, name, None)) is not None:
            update[name] = change(ref)
    for name in ("models", "sources", "slices", "policy", "experts", "shared_experts"):
        if (items := getattr(value, name, None)) is not None:
            update[name] = tuple(_change(item, change) for item in items)
    return value.model_copy(update=update)
