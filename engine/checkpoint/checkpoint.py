"""Opening a stored model: from a reference to its tensors' places (`weights.py`), config and files. Reads no weight."""

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mergemill.engine.checkpoint.changes import Change
from mergemill.engine.checkpoint.config import check_counts, parse_config
from mergemill.engine.checkpoint.family import choose_family, layer_stacks
from mergemill.engine.checkpoint.pipeline import PIPELINE_NAME, open_pipeline
from mergemill.engine.checkpoint.tied import join_ties
from mergemill.engine.checkpoint.unfinished import check_committed, check_layers
from mergemill.engine.checkpoint.weights import StoredTensor, is_weights, open_file, open_folder
from mergemill.engine.errors import Absent, CheckpointError, RunError
from mergemill.engine.storage import local
from mergemill.engine.storage.bounds import find_bound
from mergemill.engine.storage.ranges import (
    Pin,
    check_size,
    is_remote,
    join,
    list_files,
    pin_file,
    read_beginning,
    read_pieces,
    read_whole,
)
from mergemill.engine.storage.store import ENVIRONMENT, Storage, store_of
from mergemill.engine.storage.urls import PICKLED_ENDINGS, is_url, parse_place

if TYPE_CHECKING:  # only GGUF files need what is known of them
    from mergemill.engine.checkpoint.gguf.opening import GgufTensorFacts

CONFIG_NAME = "config.json"
TEMPLATES_FOLDER = "additional_chat_templates"
MODULES_NAME = "modules.json"  # of sentence-transformers: which folders hold the steps after the model
MOST_MODULES = 16
MOST_BESIDE = 1000  # names that are looked at for one that was meant
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # org/name
_CHOSEN = re.compile(rf"(?P<file>.+(?:{'|'.join(map(re.escape, PICKLED_ENDINGS))}))#(?P<path>[^/#]+)")  # file.pt#ema


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A stored model; nothing of its weights is in memory."""

    ref: str  # as the user wrote it
    path: str  # absolute path of its folder, or its URL
    tensors: Mapping[str, StoredTensor]  # by name, in the order of the names
    config: Mapping[str, Any]  # of config.json; empty where there is none
    config_text: bytes  # config.json as stored; empty where there is none
    pins: Mapping[str, Pin]  # the files beside the weights, by name, in its order
    storage: Storage = ENVIRONMENT  # how it is reached
    is_pipeline: bool = False  # of components: its tensors and files begin with the name of a folder
    left_out: tuple[str, ...] = ()  # what is no weight in the files of its weights, in words, for each that has such
    called: Mapping[str, str] = field(default_factory=dict)  # what is stored under another name, and that name
    gguf: "Mapping[str, GgufTensorFacts]" = field(default_factory=dict)  # of a GGUF file, by the names that it has here
    changes: tuple[Change, ...] = ()  # what adapters change in it, in their order
    made: Mapping[str, bytes] = field(default_factory=dict)  # files that lie nowhere, by name: of a stage, a GGUF file

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files beside the weights, sorted."""
        return tuple(sorted({*self.pins, *self.made})) if self.made else tuple(self.pins)


def open_checkpoint(ref: str, revision: str | None = None, storage: Storage = ENVIRONMENT) -> Checkpoint:
    """Open the model at `ref`: a folder, a URL, ``org/name`` on the Hub, or one file of weights; ``~`` is home.

    Of a file of ``torch.save`` that holds several, ``file.pt#ema`` says which. revision: a branch, tag or commit on the
    Hub. Raises `CheckpointError` (`HeaderError`, `IndexFileError`, `PickledError`) for what is not a whole, sound
    checkpoint.
    """
    try:
        file, chosen = _split_chosen(ref)
        place = resolve(file, revision, storage)
        return _open(f"{ref}@{revision}" if revision else ref, place, chosen, storage)
    except OSError as error:
        raise CheckpointError(f"{ref}: cannot be read: {error.strerror}") from error
    except RunError as error:  # of a header that its storage refuses
        raise CheckpointError(str(error)) from error


def read_file(checkpoint: Checkpoint, name: str) -> bytes:
    """Return the bytes of one of the checkpoint's `files`; `CheckpointError` for more than one of its name has."""
    if name in checkpoint.made:
        return checkpoint.made[name]
    with _explained():
        return read_whole(_find_file(checkpoint, name), find_bound(name), checkpoint.storage)


def read_beginning_of(checkpoint: Checkpoint, name: str, size_bytes: int) -> bytes:
    """Return the first bytes of one of the checkpoint's `files`, which may have any size."""
    if name in checkpoint.made:
        return checkpoint.made[name][:size_bytes]
    with _explained():
        return read_beginning(_find_file(checkpoint, name), size_bytes, checkpoint.storage)


def check_file(checkpoint: Checkpoint, name: str) -> Pin:
    """Return the pin of one of the checkpoint's `files`; `CheckpointError` for one that is larger than such files."""
    with _explained():
        check_size(pin := _find_file(checkpoint, name), find_bound(name))
    return pin


def digest_file(checkpoint: Checkpoint, name: str) -> str:
    """Return what is equal for `files` of equal content alone, of which little is in memory at a time."""
    if name in checkpoint.made:
        return hashlib.sha256(checkpoint.made[name]).hexdigest()
    digest = hashlib.sha256()
    with _explained():
        for piece in read_pieces(_find_file(checkpoint, name), find_bound(name), checkpoint.storage):
            digest.update(piece)
    return digest.hexdigest()


def _find_file(checkpoint: Checkpoint, name: str) -> Pin:
    if name not in checkpoint.pins:
        raise CheckpointError(f"{checkpoint.path}: has no file {name!r}")
    return checkpoint.pins[name]


def resolve(ref: str, revision: str | None = None, storage: Storage = ENVIRONMENT) -> str:
    """Return the absolute path or the URL that `ref` names; `CheckpointError` unless something is there.

    A folder that is there comes before a model of the same name on the Hub.
    """
    place = parse_place(ref)
    if is_remote(place):
        return store_of(place, storage).resolve(place, revision)
    path = local.resolve(place)
    if path is None and HUB_NAME.fullmatch(ref):
        return _resolve_on_hub(ref, revision, storage)
    if path is None:
        raise Absent(f"{ref}: no such file or folder{_suggest_beside(place)}")
    if revision is not None:
        raise CheckpointError(f"{ref}@{revision}: a folder has no revisions; only models on the Hub have")
    return path


def _resolve_on_hub(ref: str, revision: str | None, storage: Storage) -> str:
    try:
        return store_of("hf://", storage).resolve(f"hf://{ref}", revision)
    except CheckpointError as error:
        raise CheckpointError(f"{ref}: no such folder{_suggest_beside(ref)}; {error}") from error


def _suggest_beside(place: str) -> str:
    """Return the end of a message about a path that is not there: the nearest name beside it, if one is near."""
    try:
        names = [each.name for each in itertools.islice(Path(place).parent.iterdir(), MOST_BESIDE)]
    except OSError:
        return ""
    near = difflib.get_close_matches(Path(place).name, names, n=1, cutoff=0.75)
    return f"; did you mean {Path(place).with_name(near[0])}?" if near else ""


def _split_chosen(ref: str) -> tuple[str, str]:
    """Return a file and what is chosen of it; a file that is there under the whole name comes first.

    >>> _split_chosen("a/b.ckpt#ema"), _split_chosen("a#b/c.ckpt")
    (('a/b.ckpt', 'ema'), ('a#b/c.ckpt', ''))
    """
    found = _CHOSEN.fullmatch(ref)
    if found is None or (not is_url(ref) and local.resolve(parse_place(ref)) is not None):
        return ref, ""
    return found["file"], found["path"]


def _open(ref: str, place: str, chosen: str, storage: Storage) -> Checkpoint:
    found = list_files(place, TEMPLATES_FOLDER, storage)
    if found is None and place.endswith(".gguf"):
        return _open_gguf(ref, place, storage)
    if found is None:
        with _explained():
            weights = open_file(place, ref, chosen, storage)
        folder = place.rpartition("/")[0]
        return Checkpoint(ref, folder, weights.tensors, {}, b"", {}, storage, left_out=weights.left_out)
    if chosen:
        raise CheckpointError(f"{ref}: is a folder; what follows # chooses from a file")
    check_committed(place, ref, storage)
    if PIPELINE_NAME in found:
        return _open_pipeline(ref, place, found, storage)
    with _explained():
        weights = open_folder(place, found, storage)
    modules = read_modules(found[MODULES_NAME], storage) if MODULES_NAME in found else ()
    beneath = {name: pin for folder in modules for name, pin in _list_beneath(place, folder, storage)}
    config_text = read_small(found[CONFIG_NAME], CONFIG_NAME, storage) if CONFIG_NAME in found else b""
    config = parse_config(config_text, where=join(place, CONFIG_NAME)) if CONFIG_NAME in found else {}
    tensors = join_ties(weights.tensors, config)
    stacks = layer_stacks(tensors)
    check_counts(config, choose_family(config), stacks, where=ref)
    check_layers(stacks, config, ref)
    pins = dict(sorted((_pick_small(found) | beneath).items()))
    return Checkpoint(ref, place, tensors, config, config_text, pins, storage, left_out=weights.left_out)


def _open_gguf(ref: str, place: str, storage: Storage) -> Checkpoint:
    from mergemill.engine.checkpoint.gguf.opening import open_gguf, write_config

    with _explained():
        model = open_gguf(pin_file(place, storage), ref, storage)
    check_layers(layer_stacks(model.tensors), model.config, ref)
    text = write_config(model.config)
    folder = place.rpartition("/")[0]
    stored = Checkpoint(ref, folder, model.tensors, model.config, text, {}, storage, False, model.left_out)
    return replace(stored, gguf=model.facts, made=model.files)


def _open_pipeline(ref: str, place: str, found: Mapping[str, Pin], storage: Storage) -> Checkpoint:
    with _explained():
        weights, beneath = open_pipeline(place, found, storage)
    pins = dict(sorted((_pick_small(found) | beneath).items()))
    return Checkpoint(ref, place, weights.tensors, {}, b"", pins, storage, True, weights.left_out)


def read_modules(pin: Pin, storage: Storage) -> tuple[str, ...]:
    """Return the folders that a ``modules.json`` names, as far as it is one, and they lie in the model's own."""
    try:
        found = json.loads(read_small(pin, MODULES_NAME, storage))
    except (ValueError, RecursionError):
        return ()
    named = [each.get("path") for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    folders = [name for name in named if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name, re.ASCII)]
    return tuple(dict.fromkeys(folders))[:MOST_MODULES]


def _list_beneath(place: str, folder: str, storage: Storage) -> Iterable[tuple[str, Pin]]:
    found = list_files(place, folder, storage) or {}
    return sorted((name, pin) for name, pin in found.items() if name.startswith(f"{folder}/"))


def _pick_small(found: Mapping[str, Pin]) -> dict[str, Pin]:
    """Return the files beside the weights, and the chat templates, by name."""
    return {name: found[name] for name in sorted(found) if _is_small(PurePosixPath(name))}


def _is_small(path: PurePosixPath) -> bool:
    if path.parent.name:
        return path.suffix == ".jinja"
    return not is_weights(path.name) and not path.name.startswith(".")


def read_small(pin: Pin, name: str, storage: Storage) -> bytes:
    """Return the bytes of a small file; `CheckpointError` for more than one of its name has."""
    with _explained():
        return read_whole(pin, find_bound(name), storage)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what reading raises into what is wrong with a model."""
    try:
        yield
    except RunError as error:
        raise CheckpointError(str(error)) from error
