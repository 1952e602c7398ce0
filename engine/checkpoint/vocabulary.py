"""The ids that a model's tokenizer gives, and whether two models' agree."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergemill.engine.checkpoint.checkpoint import Checkpoint, digest_file, read_file
from mergemill.engine.checkpoint.copied_files import matches
from mergemill.engine.checkpoint.made import MadeFiles
from mergemill.engine.errors import CheckpointError
from mergemill.engine.storage.ranges import is_remote

_SENTENCEPIECE = "tokenizer.model"
# Files that are a whole vocabulary, in a form that is compared byte by byte where it is not understood.
_OPAQUE_VOCABULARIES = ("*.model", "*.tiktoken", "tekken.json", "vocab.txt")


def same_tokenizer(a: Checkpoint, b: Checkpoint) -> bool:
    """Say whether two models give every token the same id; so do two without any tokenizer.

    Merges, normalizers and templates do not count: they do not move the rows of an embedding. False where the
    two store their vocabularies in forms that cannot be compared. Raises `CheckpointError` for broken files.
    """
    if not any(isinstance(each.made, MadeFiles) for each in (a, b)) and is_same_file(a, b, "tokenizer.json"):
        return True
    first, second = read_vocabulary(a), read_vocabulary(b)
    if first is not None and second is not None:
        return first == second
    opaque = _read_opaque(a)
    # None for both means no opaque vocabulary at all: then equal only where there is no other either.
    return opaque == _read_opaque(b) and (opaque is not None or first is second)


def read_vocabulary(checkpoint: Checkpoint) -> Mapping[str, int] | None:
    """Return the id of each token, added tokens included; None where no file that is understood lists them.

    A `tokenizer.model` of SentencePiece lists them as well as JSON does (decided 2026-11-29): a model that was saved
    again with the one has the vocabulary of its like with the other. Raises `CheckpointError` for broken files.
    """
    found = _read_vocabulary(checkpoint)
    if found is not None and not {*map(type, found.values())} <= {int}:
        raise CheckpointError(f"{checkpoint.path}: its tokenizer has ids that are not whole numbers")
    return found


def _read_vocabulary(checkpoint: Checkpoint) -> Mapping[str, int] | None:
    if isinstance(checkpoint.made, MadeFiles):
        return checkpoint.made.list_vocabulary()
    if "tokenizer.json" in checkpoint.files:
        return parse_tokenizer(_read_json(checkpoint, "tokenizer.json"), f"{checkpoint.path}/tokenizer.json")
    if "vocab.json" in checkpoint.files:
        return read_object(checkpoint, "vocab.json") | _read_added(checkpoint)
    if _SENTENCEPIECE not in checkpoint.files:
        return None
    from mergemill.engine.checkpoint.sentencepiece import parse_pieces  # where nothing else tells the tokens

    pieces = parse_pieces(read_file(checkpoint, _SENTENCEPIECE))
    if pieces is None:
        return None
    return {piece: number for number, piece in enumerate(pieces)} | _read_added(checkpoint)


def parse_tokenizer(tokenizer: Any, where: str) -> dict[str, int]:
    """Return the id of each token of a ``tokenizer.json``; `CheckpointError` for what is none."""
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score], the id is the place
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = tokenizer.get("added_tokens") or ()
        if not isinstance(tokenizer["model"].get("merges", []), list):
            raise TypeError("merges are no list")
        return number_added(dict(vocabulary), [(token["content"], token["id"]) for token in added])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: has no model.vocab, or added_tokens that are none: {error}") from error


def number_added(vocabulary: dict[str, int], added: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Return the ids with those of added tokens as the `tokenizers` library numbers them (decided 2026-11-30).

    A token that the vocabulary has keeps its id there, whatever the file says beside; one without text is none; and
    others follow each other from the vocabulary's size on. Rows by the ids in the file were not those that loaders use.

    >>> number_added({"a": 0, "b": 1}, [("<s>", 7), ("b", 9), ("", 3)])
    {'a': 0, 'b': 1, '<s>': 2}
    """
    following = len(vocabulary)
    for token, number in added:
        if type(number) is not int or number < 0:
            vocabulary[token] = number  # which is told where ids are looked at
        elif token and token not in vocabulary:
            vocabulary[token], following = following, following + 1
    return vocabulary


def _read_added(checkpoint: Checkpoint) -> dict[str, Any]:
    added: dict[str, Any] = {}
    if "added_tokens.json" in checkpoint.files:
        added |= read_object(checkpoint, "added_tokens.json")
    if "tokenizer_config.json" in checkpoint.files:
        added |= parse_decoder(read_object(checkpoint, "tokenizer_config.json"), checkpoint.path)
    return added


def parse_decoder(config: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return the ids of the tokens that a ``tokenizer_config.json`` adds; `CheckpointError` where they are none."""
    decoder = config.get("added_tokens_decoder") or {}
    try:
        found = {token["content"]: int(number) for number, token in decoder.items()}
        if not all(isinstance(text, str) for text in found):
            raise TypeError("the content of one is no text")
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{where}/tokenizer_config.json: added_tokens_decoder is not a map from ids to tokens: {error}"
        ) from error


def read_object(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return the JSON object in one of a model's files; `CheckpointError` for one that holds none."""
    found = _read_json(checkpoint, name)
    if not isinstance(found, dict):
        raise CheckpointError(f"{checkpoint.path}/{name}: is not a JSON object")
    return found


def _read_json(checkpoint: Checkpoint, name: str) -> Any:
    try:
        return json.loads(read_file(checkpoint, name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint.path}/{name}: is not JSON: {error}") from error


def may_be_same(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    """Say whether two models have a file of one name and size."""
    if name not in a.files or name not in b.files:
        return False
    pins = [each.pins[name] for each in (a, b) if name not in each.made]
    return len(pins) < 2 or pins[0].size_bytes == pins[1].size_bytes


def is_same_pin(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    """Say whether storage has one checksum, or tag, for the file of two models: then nothing need be read."""
    if name in a.made or name in b.made:
        return False
    return a.pins[name].stamp == b.pins[name].stamp and all(is_remote(each.pins[name].url) for each in (a, b))


def is_same_file(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    """Say whether two models have a file of one content."""
    if not may_be_same(a, b, name):
        return False
    return is_same_pin(a, b, name) or digest_file(a, name) == digest_file(b, name)


def _read_opaque(checkpoint: Checkpoint) -> tuple[Mapping[str, str], Mapping[str, Any]] | None:
    names = [name for name in checkpoint.files if matches(name, _OPAQUE_VOCABULARIES)]
    if not names:
        return None
    return {name: digest_file(checkpoint, name) for name in names}, _read_added(checkpoint)
