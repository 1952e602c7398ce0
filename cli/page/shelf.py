"""The models to choose from: folders below the root, what headers say of one, and the Hub's answers to a search."""

import os
from collections.abc import Iterator
from pathlib import Path

from mergemill.cli.inspect import list_facts
from mergemill.cli.page.roots import check_model
from mergemill.engine import errors, inspect

MOST_FOLDERS, MOST_MODELS, MOST_DEPTH = 20_000, 500, 5
MOST_HITS = 20
ADAPTER = "adapter_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
STATE = ".mergemill"  # which an output has
PLOT = "plot.html"
SEARCH = {PLOT, "table.csv"}  # which a search has


def list_models(root: Path) -> list[dict[str, str]]:
    """Return the folders below a root that look like models, adapters or merges, by name, most near the root first."""
    found = list(_find(root))[:MOST_MODELS]
    return sorted(found, key=lambda model: (model["path"].count("/"), model["path"]))


def list_outputs(root: Path) -> list[str]:
    """Return the folders below a root that mergemill writes or wrote to, from the root."""
    return [str(folder.relative_to(root)) for folder, names in _walk(root) if STATE in names]


def list_searches(root: Path) -> list[str]:
    """Return the folders below a root of searches that have a plot, from the root."""
    return [str(folder.relative_to(root)) for folder, names in _walk(root) if names >= SEARCH]


def describe_model(root: Path, model: str) -> list[tuple[str, str]]:
    """Return what headers say of a model."""
    check_model(root, model)
    return [fact for fact in list_facts(inspect(model)) if fact[0] != "path"]


def search_hub(words: str) -> list[dict[str, str]]:
    """Return models of the Hub, those loaded most first; `StorageError` where it is not reached."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise errors.StorageError(f"{error.name} is not installed; pip install mergemill[hub]") from None
    try:
        client = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))  # as of now, like where models are read
        hits = list(client.list_models(search=words, limit=MOST_HITS, sort="downloads"))
    except Exception as error:  # noqa: BLE001 -- of its client's libraries, in whose words there may be addresses
        raise errors.StorageError(f"the Hub is not reached ({type(error).__name__})") from None
    return [{"path": hit.id, "kind": hit.pipeline_tag or hit.library_name or "model"} for hit in hits]


def _find(root: Path) -> Iterator[dict[str, str]]:
    for folder, names in _walk(root):
        path = str(folder.relative_to(root))
        weights = any(name.endswith(_WEIGHTS) for name in names)
        if folder == root or not (weights or STATE in names):
            continue
        kind = "merge" if STATE in names else "adapter" if ADAPTER in names else "model"
        if kind != "merge" or "config.json" in names:
            yield {"path": path, "kind": kind}


def _walk(root: Path) -> Iterator[tuple[Path, set[str]]]:
    """Yield folders and the names in them, hidden ones and links left alone."""
    for count, (place, folders, files) in enumerate(os.walk(root)):
        folder = Path(place)
        yield folder, {*folders, *files}
        depth = len(folder.relative_to(root).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and depth < MOST_DEPTH)
        if count > MOST_FOLDERS:
            return
