"""A model's vocabulary, from the files of its tokenizer: tokens and their ids, what is added, roles.

``tokenizer.json`` is read as the `tokenizers` library writes it, which no library is needed for (decided 2026-11-29:
what is done with vocabularies here is work on JSON; the tests prove with the library how the result encodes). A
``tokenizer.model`` of BPE and a ``tekken.json`` are made one (`pieces.py`, `tekken.py`). Of other files only ids are
read (`checkpoint/vocabulary.py`), which is enough to compare them and no more.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergemill.engine.checkpoint.checkpoint import Checkpoint, read_file
from mergemill.engine.checkpoint.vocabulary import parse_decoder, parse_tokenizer, read_object, read_vocabulary
from mergemill.engine.errors import CheckpointError
from mergemill.engine.tokens.byte_marks import byte_table

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
DICTIONARIES = ("BPE", "WordPiece", "WordLevel")  # kinds of models whose vocabulary is a map
KINDS = (*DICTIONARIES, "Unigram")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched in the text before the model is asked."""

    content: str
    flags: tuple[bool, ...]  # in the order of `FLAGS`

    @property
    def special(self) -> bool:
        """Whether decoding may leave it out."""
        return self.flags[FLAGS.index("special")]

    def to_json(self) -> dict[str, Any]:
        """Return it as the files have it, without its id."""
        return {"content": self.content, **dict(zip(FLAGS, self.flags, strict=True))}


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """What a model's tokenizer says."""

    ids: Mapping[str, int]  # of every token, added ones included
    added: Mapping[str, AddedToken]  # by content, in the order of their ids
    kind: str  # of the model of the tokenizer: BPE, Unigram, …; empty where no tokenizer.json says it
    tokenizer: Mapping[str, Any]  # tokenizer.json; empty where there is none
    config: Mapping[str, Any]  # tokenizer_config.json; empty where there is none
    roles: Mapping[str, str] = field(default_factory=dict)  # the token of each role (eos), where the config says it

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    @property
    def model(self) -> Mapping[str, Any]:
        """The model of the tokenizer, as its file has it."""
        return self.tokenizer.get("model") or {}

    @property
    def is_byte_level(self) -> bool:
        """Whether each character of a regular token stands for a byte."""
        return any(_has(self.tokenizer.get(key), "ByteLevel") for key in ("pre_tokenizer", "decoder"))

    def within(self, rows: int) -> "Vocabulary":
        """Return it without the tokens whose ids are `rows` or more, for which a model has no rows."""
        if self.size <= rows:
            return self
        ids = {token: number for token, number in self.ids.items() if number < rows}
        added = {token: each for token, each in self.added.items() if token in ids}
        roles = {role: token for role, token in self.roles.items() if token in ids}
        return Vocabulary(ids, added, self.kind, self.tokenizer, self.config, roles)


def read_vocabulary_of(checkpoint: Checkpoint) -> Vocabulary | None:
    """Return what a model's tokenizer says; None where no file that is understood lists its tokens.

    Raises `CheckpointError` for files that are broken.
    """
    where, config = f"{checkpoint.path}/{TOKENIZER_NAME}", _read_object(checkpoint, TOKENIZER_CONFIG_NAME)
    tokenizer = _read_object(checkpoint, TOKENIZER_NAME) or _convert(checkpoint, config)
    ids = parse_tokenizer(tokenizer, where) if tokenizer else read_vocabulary(checkpoint)
    if tokenizer and (more := _list_configured(config, ids or {}, checkpoint.path)):
        tokenizer = {**tokenizer, "added_tokens": [*(tokenizer.get("added_tokens") or ()), *more]}
        ids = parse_tokenizer(tokenizer, where)
    if ids is None:
        return None
    if not {*map(type, ids.values())} <= {int} or min(ids.values(), default=0) < 0:
        raise CheckpointError(f"{checkpoint.path}: its tokenizer has ids that are not whole numbers from 0 on")
    kind = str(tokenizer["model"].get("type") or _guess_kind(tokenizer["model"])) if tokenizer else ""
    roles = {role: token for role in ROLES if (token := find_role(config, role)) in ids}
    return Vocabulary(ids, dict(_iter_added(tokenizer, config, ids, where)), kind, tokenizer, config, roles)


def _convert(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``tokenizer.json`` would say where the tokenizer has another form that is understood."""
    found = None
    if "tokenizer.model" in checkpoint.files:
        from mergemill.engine.tokens.pieces import convert_sentencepiece  # which few models need

        beside = _read_object(checkpoint, "added_tokens.json").items()
        if not all(type(number) is int for _, number in beside):
            raise CheckpointError(f"{checkpoint.path}/added_tokens.json: has ids that are not whole numbers")
        parse_decoder(config, checkpoint.path)  # which says what is wrong with it
        added = {str(number): {"content": text} for text, number in beside}
        added |= config.get("added_tokens_decoder") or {}
        data = read_file(checkpoint, "tokenizer.model")
        found = convert_sentencepiece(data, {**config, "added_tokens_decoder": added})
    elif "tekken.json" in checkpoint.files:
        from mergemill.engine.tokens.tekken import convert_tekken

        found = convert_tekken(_read_object(checkpoint, "tekken.json"))
    return found or {}


def _read_object(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    return read_object(checkpoint, name) if name in checkpoint.files else {}


def spell_bytes(token: str, vocabulary: Vocabulary) -> bytes:
    """Return the bytes of text that a token stands for.

    A word's start is a space: ``▁`` in front, or in a WordPiece no ``##``. An added token stands for what it says.
    """
    if token in vocabulary.added:
        return token.encode("utf-8", "surrogatepass")
    if vocabulary.is_byte_level:
        table = byte_table()
        known = all(character in table for character in token)
        return bytes(table[character] for character in token) if known else token.encode("utf-8", "surrogatepass")
    if len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    if vocabulary.kind == "WordPiece":
        prefix = str(vocabulary.model.get("continuing_subword_prefix", "##"))
        inside = bool(prefix) and token.startswith(prefix) and len(token) > len(prefix)
        return (token.removeprefix(prefix) if inside else f" {token}").encode("utf-8", "surrogatepass")
    return token.replace("▁", " ").encode("utf-8", "surrogatepass")


def _iter_added(
    tokenizer: Mapping[str, Any], config: Mapping[str, Any], ids: Mapping[str, int], where: str
) -> Iterator[tuple[str, AddedToken]]:
    entries = tokenizer.get("added_tokens") or ()
    if not tokenizer:
        entries = tuple((config.get("added_tokens_decoder") or {}).values())
    try:
        found = [_make_added(entry) for entry in entries]
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where}: an added token is not as it should be: {error}") from error
    known = {each.content: each for each in reversed(found) if each.content}  # of two with one text the first counts
    yield from sorted(known.items(), key=lambda each: ids[each[0]])


def _list_configured(config: Mapping[str, Any], ids: Mapping[str, int], where: str) -> list[Mapping[str, Any]]:
    """Return the tokens that a ``tokenizer_config.json`` alone has, as entries, in the order in which loaders add them.

    Those that it lists, by their ids there; the roles'; further special ones (as of transformers 5.24). Without them
    another model's tokens got the ids, and so the rows, that these have once the tokenizer is loaded.
    """
    listed = parse_decoder(config, where)
    entries = {str(each["content"]): each for each in (config.get("added_tokens_decoder") or {}).values()}
    further = [find_role(config, role) for role in ROLES]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        found = config.get(key) or ()
        each = found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else ()
        further += [find_role({"x_token": token}, "x") for token in each]
    texts = dict.fromkeys((*sorted(listed, key=listed.__getitem__), *further))
    special = {"special": True, "id": 0}  # an id that is not looked at
    return [{**special, "content": text, **entries.get(text, {})} for text in texts if text and text not in ids]


def _make_added(entry: Mapping[str, Any]) -> AddedToken:
    content = entry["content"]
    if not isinstance(content, str):
        raise TypeError(f"its content is {content!r}")
    usual = {"normalized": not entry.get("special", False)}
    return AddedToken(content, tuple(bool(entry.get(flag, usual.get(flag, False))) for flag in FLAGS))


def _guess_kind(model: Mapping[str, Any]) -> str:
    """Return the kind of a model that does not name it, as files of old versions do not."""
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def find_role(config: Mapping[str, Any], role: str) -> str:
    """Return the token that a ``tokenizer_config.json`` gives a role; empty where it gives none."""
    found = config.get(f"{role}_token")
    if isinstance(found, dict):
        found = found.get("content")
    return found if isinstance(found, str) else ""


def _has(part: Any, kind: str) -> bool:
    """Whether a part of a tokenizer is of a kind, or a sequence with one."""
    if not isinstance(part, dict):
        return False
    inner: Sequence[Any] = part.get("pretokenizers") or part.get("decoders") or part.get("normalizers") or ()
    return part.get("type") == kind or any(_has(each, kind) for each in inner)
