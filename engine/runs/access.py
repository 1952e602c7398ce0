"""How storage is reached, as files of ours say it."""

from pathlib import Path

from mergemill.engine.recipe import load_cluster, load_document
from mergemill.engine.storage.store import Options, join_options


def load_storage(recipe: str | Path | None, cluster: str | Path | None = None) -> Options | None:
    """Return how a merge of this recipe, on the cluster of this file, reaches storage; None where neither is named."""
    if recipe is None and cluster is None:
        return None
    weak = load_cluster(cluster).storage if cluster else {}
    return join_options(weak, load_document(recipe).storage if recipe else {})
