"""The models to choose from: folders below the root, what headers say of one, and the Hub's answers to a search."""

import json
import os
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

from mergemill.cli.inspect import list_facts
from mergemill.cli.page.roots import check_model
from mergemill.engine import errors, inspect

MOST_FOLDERS, MOST_MODELS, MOST_DEPTH = 20_000, 500, 5
ENDPOINT = "https://huggingface.co"
MOST_HITS, MOST_BYTES, PATIENCE_S = 20, 4 << 20, 10.0  # of an answer of the Hub
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
    """Return public models of the Hub, those loaded most first; `StorageError` where it is not reached.

    One request without a token, by urllib (2026-11-29): huggingface_hub tries for 24 s where nothing answers, and asks
    the Hub once a day which agent may be calling it.
    """
    query = urlencode({"search": words, "limit": MOST_HITS, "sort": "downloads"})
    endpoint = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    try:
        with urlopen(f"{endpoint}/api/models?{query}", timeout=PATIENCE_S) as answer:
            hits = json.loads(answer.read(MOST_BYTES))
        return [{"path": str(hit["id"]), "kind": str(hit.get("pipeline_tag") or "model")} for hit in hits[:MOST_HITS]]
    except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
        raise errors.StorageError(f"the Hub is not reached ({type(error).__name__})") from None


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
