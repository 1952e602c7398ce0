"""Opening an adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, as peft saves them.

The tensors' names are the truth of what it changes. After ``base_model.model.`` comes the path of a module of the
model, then what of it is changed; the name that the adapter has among others (``default``), which some trainers leave
in, is taken out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mergemill.engine.checkpoint.adapter_config import CONFIG_NAME, AdapterConfig, parse_adapter_config
from mergemill.engine.checkpoint.checkpoint import (
    TEMPLATES_FOLDER,
    read_small,
    resolve,
)
from mergemill.engine.checkpoint.weights import StoredTensor, open_pinned
from mergemill.engine.errors import CheckpointError, RunError
from mergemill.engine.storage.pin import Pin
from mergemill.engine.storage.ranges import join, list_files
from mergemill.engine.storage.store import ENVIRONMENT, Storage

WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there

_PREFIX = re.compile(r"^(?:_orig_mod\.|module\.)*base_model\.model\.")
_PARTS = (
    ("B", re.compile(r"\.lora_B(?:\.\w+)?\.weight$")),
    ("A", re.compile(r"\.lora_A(?:\.\w+)?\.weight$")),
    ("bias", re.compile(r"\.lora_B(?:\.\w+)?\.bias$")),
    ("embedding_A", re.compile(r"\.lora_embedding_A(?:\.\w+)?$")),
    ("embedding_B", re.compile(r"\.lora_embedding_B(?:\.\w+)?$")),
    ("magnitude", re.compile(r"\.lora_magnitude_vector(?:\.(?!weight$)\w+)?(?:\.weight)?$")),
    ("tokens", re.compile(r"\.token_adapter\.trainable_tokens_delta(?:\.\w+)?$")),
)
_REPLACES = re.compile(r"\.(?:base_layer|modules_to_save(?:\.(?!weight$|bias$)\w+)?)(?=\.\w+$)")
_FACTOR = re.compile(r"\.(?:lora_|token_adapter\.|hada_|lokr_|oft_|ia3_|vera_|original_module\.)")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A stored adapter; nothing of its weights is in memory."""

    ref: str  # as the user wrote it
    path: str  # absolute path of its folder, or its URL
    config: AdapterConfig
    parts: Mapping[str, Mapping[str, StoredTensor]]  # by module and what of it: "A", "B", "bias", …
    whole: Mapping[str, StoredTensor]  # tensors that stand for the model's own, by their names there
    files: Mapping[str, Pin]  # what lies in its folder, by name


def open_adapter(ref: str, revision: str | None = None, storage: Storage = ENVIRONMENT) -> Adapter:
    """Open the adapter at `ref`: a folder, a URL, or ``org/name`` on the Hub.

    Raises `CheckpointError` for what is no adapter, or one of a kind that cannot be merged.
    """
    named = f"{ref}@{revision}" if revision else ref
    try:
        return _open(named, resolve(ref, revision, storage), storage)
    except OSError as error:
        raise CheckpointError(f"{named}: cannot be read: {error.strerror}") from error
    except RunError as error:
        raise CheckpointError(str(error)) from error


def is_adapter(ref: str, storage: Storage = ENVIRONMENT) -> bool:
    """Whether `ref` names a folder with an adapter's config; a `CheckpointError` for one that is not there."""
    return CONFIG_NAME in (list_files(resolve(ref, None, storage), TEMPLATES_FOLDER, storage) or {})


def _open(ref: str, place: str, storage: Storage) -> Adapter:
    found = list_files(place, TEMPLATES_FOLDER, storage)
    if found is None:
        raise CheckpointError(f"{ref}: is a file; an adapter is a folder with {CONFIG_NAME} and {WEIGHTS_NAMES[0]}")
    if CONFIG_NAME not in found:
        raise CheckpointError(f"{ref}: is no adapter: it has no {CONFIG_NAME}")
    config = parse_adapter_config(read_small(found[CONFIG_NAME], CONFIG_NAME, storage), where=join(ref, CONFIG_NAME))
    name = next((name for name in WEIGHTS_NAMES if name in found), None)
    if name is None:
        raise CheckpointError(f"{ref}: has no {WEIGHTS_NAMES[0]}")
    tensors = open_pinned(found[name], join(place, name), storage).tensors
    if not tensors:
        raise CheckpointError(f"{join(ref, name)}: holds no tensors")
    parts, whole = sort_tensors(tensors, ref)
    return Adapter(ref, place, config, parts, whole, found)


def sort_tensors(
    tensors: Mapping[str, StoredTensor], ref: str
) -> tuple[Mapping[str, Mapping[str, StoredTensor]], Mapping[str, StoredTensor]]:
    """Return the tensors that change a module, by module and part, and those that stand for one of the model's."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    for key, stored in tensors.items():
        if 0 in stored.shape:
            raise CheckpointError(
                f"{ref}: tensor {key} holds no data (shape {list(stored.shape)}); was it saved under ZeRO-3?"
            )
        if stored.axes is not None:
            raise CheckpointError(f"{ref}: tensor {key} is stored with its axes in another order; save it contiguous")
        name = _PREFIX.sub("", key)
        part, match = next(((part, m) for part, regex in _PARTS if (m := regex.search(name))), ("", None))
        if match is None and _FACTOR.search(name):
            raise CheckpointError(f"{ref}: tensor {key} is of no kind that can be merged")
        place = whole if match is None else parts.setdefault(name[: match.start()], {})
        short = _REPLACES.sub("", name) if match is None else part
        if short in place:
            raise CheckpointError(
                f"{ref}: tensors {place[short].name} and {key} stand for the same; has it several adapters?"
            )
        place[short] = stored
    return parts, whole
