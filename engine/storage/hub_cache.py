"""What the Hub's own cache on this machine holds, without asking the Hub.

Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache. A file of a snapshot is a link to a blob whose
name is its hash, SHA-256 for a large file and Git's for others; where the disk knows no links it is the file itself.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from mergemill.engine.storage import local
from mergemill.engine.storage.pin import Pin
from mergemill.engine.storage.urls import WEIGHT_ENDINGS

_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # the first that is there counts
_KINDS = {64: "sha256", 40: "git"}  # by the digits of a blob's name
_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def find_snapshot(repo: str, revision: str) -> Path | None:
    """Return the cached folder of a revision, whole or not; its name is the commit."""
    try:
        # Without patterns it takes for incomplete what lacks a file that no merge needs.
        return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None


def list_snapshot(folder: Path, url: str) -> Mapping[str, Pin]:
    """Return the pins of a snapshot's files by their paths in it; as those of the Hub, where the blobs have names."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: Pin(f"{url}/{name}", path.stat().st_size, _stamp(path, folder.name)) for name, path in found.items()}


def find_cached(pin: Pin, repo: str, commit: str, path: str) -> Pin | None:
    """Return the local pin of a file of the Hub; None unless the cache has it as it was pinned."""
    found = try_to_load_from_cache(repo, path, revision=commit)
    if not isinstance(found, str):
        return None
    here, stamp = local.pin_file(found), _stamp(Path(found), commit)
    same = stamp == pin.stamp or not (is_hash(stamp) and is_hash(pin.stamp))
    return here if same and here.size_bytes == pin.size_bytes else None


def is_hash(stamp: str) -> bool:
    """Whether a stamp is of the content itself.

    >>> is_hash("sha256:" + "0" * 64), is_hash("commit:" + "0" * 40)
    (True, False)
    """
    return stamp.partition(":")[0] in _KINDS.values()


def find_missing(folder: Path, files: Collection[str]) -> str:
    """Return what a cached folder of these files lacks of a model, in words; empty if it is whole."""
    missing = sorted(_list_shards(folder) - set(files))
    if missing:
        return missing[0] + (f" and {len(missing) - 1} more" if missing[1:] else "")
    return "" if any(name.endswith(WEIGHT_ENDINGS) for name in files) else "its weights"


def _list_shards(folder: Path) -> set[str]:
    """Return the shards that an index names; none where it is missing, or broken, which its reader will say."""
    index = next((path for name in _INDEX_NAMES if (path := folder / name).exists()), folder / _INDEX_NAMES[0])
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _stamp(path: Path, commit: str) -> str:
    """Return the hash that a file's blob is named by, or the commit, which fixes the content as well."""
    blob = path.readlink().name if path.is_symlink() else ""
    return f"{_KINDS[len(blob)]}:{blob}" if _HASH.fullmatch(blob) else f"commit:{commit}"
