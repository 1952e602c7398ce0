"""``model.safetensors.index.json``: which shard holds which tensor, checked against the shards themselves.

Format: https://huggingface.co/docs/safetensors#sharded-models, as transformers writes it: an object with
``weight_map`` (tensor name to file name) and ``metadata``, of which nothing is used here. That of pickled shards,
``pytorch_model.bin.index.json``, is the same.
Names are judged as written, not where a link leads: the Hub's cache links every shard to ``../../blobs``.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from mergemill.engine.errors import IndexFileError

INDEX_NAME = "model.safetensors.index.json"


def parse_index(text: bytes, *, where: str, endings: tuple[str, ...] = (".safetensors",)) -> Mapping[str, str]:
    """Return the file name of each tensor's shard, in the order of the index; `endings`: those of shards.

    Raises `IndexFileError` for what is no index, and for a shard that would lie outside the folder.
    """
    weight_map = _parse_json(text, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IndexFileError(f"{where}: has no 'weight_map' from tensor names to file names")
    for name, shard in weight_map.items():
        _check_shard_name(name, shard, endings, where)
    return weight_map


def check_index(weight_map: Mapping[str, str], shards: Mapping[str, Collection[str]], *, where: str) -> None:
    """Raise `IndexFileError` unless `shards` (the names that each shard holds) are as the index says.

    `shards` has an entry for each file that the index names, see `check_shards`.
    """
    for shard, held in shards.items():
        for name in held:
            _check_held(name, shard, weight_map.get(name), shards, where)
    absent = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if absent:
        shard = weight_map[absent[0]]
        raise IndexFileError(f"{where}: {shard} does not hold {_count_names(absent, 'tensor')} named for it")


def check_shards(weight_map: Mapping[str, str], files: Collection[str], *, where: str) -> tuple[str, ...]:
    """Return the shards that the index names, sorted; `IndexFileError` unless all are among `files`."""
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if shard not in files]
    if missing:
        raise IndexFileError(
            f"{where}: {_count_names(missing, 'shard')} of {len(shards)} not there; is the download complete?"
        )
    return tuple(shards)


def _check_held(name: str, shard: str, named: str | None, shards: Mapping[str, Collection[str]], where: str) -> None:
    if named is None:
        raise IndexFileError(f"{where}: does not name tensor {name!r}, which {shard} holds")
    if named != shard and name in shards[named]:
        raise IndexFileError(f"{where}: tensor {name!r} is in two shards, {named} and {shard}")
    if named != shard:
        raise IndexFileError(f"{where}: tensor {name!r} is in {shard}, not in {named} as the index says")


def _check_shard_name(name: str, shard: object, endings: tuple[str, ...], where: str) -> None:
    where = f"{where}: tensor {name!r}"
    if not isinstance(shard, str):
        raise IndexFileError(f"{where} is mapped to {shard!r}, not to a file name")
    if any("\ud800" <= mark <= "\udfff" for mark in shard):
        raise IndexFileError(f"{where} is mapped to {shard!r}, which is no text")
    if _leaves_folder(shard):
        raise IndexFileError(f"{where} is mapped to {shard!r}, which is outside the folder")
    if not shard.endswith(endings):
        kind = "a safetensors file" if ".safetensors" in endings else "a file of torch.save"
        raise IndexFileError(f"{where} is mapped to {shard!r}, which is not {kind}")


def _leaves_folder(shard: str) -> bool:
    """Say whether a name may lead out of its folder, on any system or store.

    >>> [_leaves_folder(name) for name in ("a/b.safetensors", "../a", "/a", "C:a", "a/../../b", "s3://a/b")]
    [False, True, True, True, True, True]
    """
    return (
        any(mark in shard for mark in ("\\", ":", "\0")) or shard.startswith("/") or ".." in PurePosixPath(shard).parts
    )


def _parse_json(text: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, where))
    except (ValueError, RecursionError) as error:
        raise IndexFileError(f"{where}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise IndexFileError(f"{where}: is not a JSON object")
    return found


def _unique(pairs: Iterable[tuple[str, Any]], where: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise IndexFileError(f"{where}: has {name!r} more than once")
        fields[name] = value
    return fields


def _count_names(names: list[str], kind: str) -> str:
    """Name the first of several, and say how many more there are.

    >>> _count_names(["a", "b", "c"], "shard")
    "shard 'a' and 2 more"
    """
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{kind} {names[0]!r}{more}"
