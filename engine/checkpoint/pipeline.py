"""Pipelines of diffusers: a folder whose ``model_index.json`` names components, each in a folder of its own.

A component is ``"unet": ["diffusers", "UNet2DConditionModel"]``: a module and a class, or nulls where it was left out.
Those with weights are models; the others, schedulers and tokenizers, have files alone. A tensor of a pipeline is called
by its component first: ``unet/conv_in.weight``.
"""

import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from mergemill.engine.checkpoint.weights import HEADER_THREADS, StoredTensor, Weights, is_weights, open_folder
from mergemill.engine.errors import CheckpointError
from mergemill.engine.storage.bounds import find_bound
from mergemill.engine.storage.ranges import Pin, join, list_files, read_whole
from mergemill.engine.storage.store import Storage

PIPELINE_NAME = "model_index.json"
MOST_COMPONENTS = 32
_FOLDER = re.compile(r"[A-Za-z0-9]\w*", re.ASCII)


def open_pipeline(place: str, found: Mapping[str, Pin], storage: Storage) -> tuple[Weights, dict[str, Pin]]:
    """Return the weights of a pipeline's components, and the files beside them, by names that begin with a folder."""
    where = join(place, PIPELINE_NAME)
    names = read_components(read_whole(found[PIPELINE_NAME], find_bound(PIPELINE_NAME), storage), where=where)
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        opened = list(pool.map(lambda name: _open_component(join(place, name), where, storage), names))
    tensors: dict[str, StoredTensor] = {}
    left_out: list[str] = []
    pins: dict[str, Pin] = {}
    for name, (weights, files) in zip(names, opened, strict=True):
        tensors |= {f"{name}/{key}": each._replace(name=f"{name}/{key}") for key, each in weights.tensors.items()}
        left_out += weights.left_out
        pins |= {f"{name}/{key}": pin for key, pin in files.items()}
    if not tensors:
        raise CheckpointError(f"{where}: names no component with weights; is the download complete?")
    return Weights(dict(sorted(tensors.items())), tuple(left_out)), pins


def read_components(text: bytes, *, where: str) -> Mapping[str, str]:
    """Return the folders that a ``model_index.json`` names, and the library of each.

    >>> read_components(b'{"_class_name": "P", "unet": ["diffusers", "U"], "safety_checker": [null, null]}', where="")
    {'unet': 'diffusers'}
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not JSON: {error}") from error
    components = dict(_iter_components(found)) if isinstance(found, dict) else {}
    if not components or len(components) > MOST_COMPONENTS:
        raise CheckpointError(f"{where}: names {len(components)} components; a pipeline has 1 to {MOST_COMPONENTS}")
    return components


def _iter_components(found: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        pair = value if isinstance(value, list) else ()
        if _FOLDER.fullmatch(name) and len(pair) == 2 and all(isinstance(each, str) for each in pair):
            yield name, str(pair[0])


def _open_component(place: str, where: str, storage: Storage) -> tuple[Weights, Mapping[str, Pin]]:
    try:
        found = list_files(place, "", storage)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: names a component that cannot be read: {error}") from error
    if not found:
        raise CheckpointError(f"{where}: names {place.rpartition('/')[2]!r}, and there is no such folder")
    here = {name: pin for name, pin in found.items() if "/" not in name}
    files = {name: pin for name, pin in here.items() if not is_weights(name) and not name.startswith(".")}
    has = any(is_weights(name) for name in here)
    return open_folder(place, here, storage) if has else Weights({}), files
