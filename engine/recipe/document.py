"""YAML text to plain data, with the line of every value. YAML 1.1 as PyYAML reads it safely, but stricter.

A key given twice is an error (PyYAML keeps the last), keys are always text (``no:`` is the token "no"),
``1e-5`` is a number as in YAML 1.2 and JSON (PyYAML takes it for text), and dates stay text. Anchors, aliases
and merge keys work.

A key of one's own at the top that defines an anchor which later keys use (``const_tag: &MODEL org/name``) is a place
for it and nothing else, as mergekit's users write it (decided 2026-11-29): `Document.holders` names such keys.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe.faults import Loc, shorten
from mergemill.engine.storage.shallow import ShallowLoader

MOST_VALUES = 200_000  # aliases of aliases, and merges of merges, can unfold a few lines into billions
MOST_DIGITS = 400  # of a number: PyYAML's reading of some forms is quadratic

_CORE = "tag:yaml.org,2002:"
_TEXT = f"{_CORE}str"
_SCALARS = frozenset({_TEXT, *(f"{_CORE}{name}" for name in ("null", "bool", "int", "float"))})
_FLOAT = re.compile(r"[-+]?(?:[0-9]+|[0-9]*\.[0-9]+|[0-9]+\.)[eE][-+]?[0-9]+$")


@dataclass(frozen=True, slots=True)
class Form:
    """What a file of ours is: how messages call it."""

    called: str
    """With its article, such as ``a recipe``."""
    needs: str
    """What one that is empty lacks."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a file."""

    data: Any
    """Mappings, lists and scalars."""
    lines: dict[Loc, int]
    """The line of every key and item, counted from 1; the path ``()`` is the document's own."""
    holders: frozenset[str] = frozenset()
    """The keys at the top that define what a later key uses by its anchor."""


@dataclass(slots=True)
class _Reader:
    loader: yaml.SafeLoader
    name: str
    form: Form
    lines: dict[Loc, int] = field(default_factory=dict)
    pairs: dict[int, "Pairs"] = field(default_factory=dict)  # of each mapping node, by its id: aliases come again
    merged: int = 0  # keys that merge keys have brought


class _Loader(ShallowLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 where 1.1 surprises."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in (f"{_CORE}timestamp", f"{_CORE}value")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_CORE}float", _FLOAT, list("-+.0123456789"))


def read_document(text: str, form: Form, *, name: str) -> Document:
    """Return the data of the YAML `text`; `RecipeError` with ``name:line:`` where it is not one document."""
    first, *others = read_documents(text, form, name=name)
    if others:
        raise _error(name, others[0].lines[()] - 1, "a second document begins here; a file holds one")
    return first


def read_documents(text: str, form: Form, *, name: str) -> list[Document]:
    """Return the data of each document of the YAML `text` that is not empty; `RecipeError` where all are."""
    loader = _make_loader(text, name=name)
    try:
        roots = list(_compose_all(loader, name=name))
        if not roots:
            raise _error(name, 0, f"{_the(form)} is empty; it needs {form.needs}")
        return [_read_root(_Reader(loader, name, form), root) for root in roots]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _error(name, mark.line if mark else 0, f"not valid YAML: {shorten(error.problem)}") from None
    except RecursionError:
        raise _error(name, 0, "nested too deeply, or an anchor that contains itself") from None
    finally:
        loader.dispose()


def _make_loader(text: str, *, name: str) -> yaml.SafeLoader:
    try:
        return _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        raise _error(name, line, f"not valid YAML: character {error.character!r} is not allowed") from None


def _compose_all(loader: yaml.SafeLoader, *, name: str) -> Iterator[yaml.Node]:
    try:
        while (root := loader.get_node() if loader.check_node() else None) is not None:
            if root.tag != f"{_CORE}null" or root.value:
                yield root
    except (ValueError, OverflowError):  # of PyYAML's scanner, for an escape of no character, or a version of no number
        raise _error(name, loader.line, "not valid YAML: an escape or a directive has a number too large") from None


def _read_root(reader: _Reader, root: yaml.Node) -> Document:
    reader.lines[()] = root.start_mark.line + 1
    return Document(_read_node(reader, root, ()), reader.lines, _find_holders(root))


def _read_node(reader: _Reader, node: yaml.Node, path: Loc) -> Any:
    _check_count(reader, len(reader.lines), node)
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_CORE}map":
        return _read_mapping(reader, node, path)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_CORE}seq":
        return _read_sequence(reader, node, path)
    if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
        return _read_scalar(reader, node)
    raise _error(reader.name, node.start_mark.line, f"the YAML tag '{shorten(node.tag)}' has no meaning here")


def _check_count(reader: _Reader, count: int, node: yaml.Node) -> None:
    if count > MOST_VALUES:
        raise _error(reader.name, node.start_mark.line, f"{_the(reader.form)} holds more than {MOST_VALUES} values")


def _find_holders(root: yaml.Node) -> frozenset[str]:
    """Return the top keys below which a node stands that also stands below a later one, as an alias does."""
    owners: dict[int, str] = {}
    holders: set[str] = set()
    for key_node, value_node in root.value if isinstance(root, yaml.MappingNode) else ():
        waiting, seen = [value_node], set[int]()
        while waiting:
            node = waiting.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            owner = owners.setdefault(id(node), str(key_node.value))
            if owner != str(key_node.value):
                holders.add(owner)
            elif isinstance(node, yaml.MappingNode):
                waiting.extend(each for pair in node.value for each in pair)
            elif isinstance(node, yaml.SequenceNode):
                waiting.extend(node.value)
    return frozenset(holders)


def _read_mapping(reader: _Reader, node: yaml.MappingNode, path: Loc) -> dict[str, Any]:
    data = {}
    for key, (key_node, value_node) in _find_pairs(reader, node).items():
        reader.lines[(*path, key)] = key_node.start_mark.line + 1
        data[key] = _read_node(reader, value_node, (*path, key))
    return data


def _read_sequence(reader: _Reader, node: yaml.SequenceNode, path: Loc) -> list[Any]:
    data = []
    for place, item in enumerate(node.value):
        reader.lines[(*path, place)] = item.start_mark.line + 1
        data.append(_read_node(reader, item, (*path, place)))
    return data


def _read_scalar(reader: _Reader, node: yaml.ScalarNode) -> Any:
    """Return a scalar; with an explicit tag it may be anything, which PyYAML answers with any of these errors."""
    try:
        if node.tag == _TEXT:
            return _join_surrogates(node.value)
        if len(node.value) > MOST_DIGITS:
            raise ValueError
        return reader.loader.construct_object(node)
    except (ValueError, KeyError, IndexError, OverflowError):
        words = f"'{shorten(node.value)}' cannot be read as {node.tag.removeprefix(_CORE)}"
        raise _error(reader.name, node.start_mark.line, words) from None


def _join_surrogates(text: str) -> str:
    r"""Return `text` with pairs such as ``\ud83d\ude00``, which JSON writes, as the characters they mean."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


Pairs = dict[str, tuple[yaml.Node, yaml.Node]]


def _find_pairs(reader: _Reader, node: yaml.MappingNode) -> Pairs:
    """Return the mapping's key and value nodes: merged ones first, its own over them."""
    if id(node) not in reader.pairs:
        reader.pairs[id(node)] = _collect_pairs(reader, node)
    return reader.pairs[id(node)]


def _collect_pairs(reader: _Reader, node: yaml.MappingNode) -> Pairs:
    own: Pairs = {}
    merged: Pairs = {}
    for key_node, value_node in node.value:
        if key_node.tag == f"{_CORE}merge":
            merged = _find_merged(reader, value_node) | merged
        else:
            _add_own(reader, own, key_node, value_node)
    return merged | own


def _add_own(reader: _Reader, own: Pairs, key_node: yaml.Node, value_node: yaml.Node) -> None:
    line = key_node.start_mark.line
    if not isinstance(key_node, yaml.ScalarNode):
        raise _error(reader.name, line, "a key must be text, not a list or a mapping")
    key = _read_key(reader, key_node)
    if key in own:
        first = own[key][0].start_mark.line + 1
        raise _error(reader.name, line, f"the key '{shorten(key)}' is already given in line {first}")
    own[key] = (key_node, value_node)


def _read_key(reader: _Reader, node: yaml.ScalarNode) -> str:
    try:
        return _join_surrogates(node.value)
    except ValueError:
        raise _error(reader.name, node.start_mark.line, "a key holds half a surrogate pair") from None


def _find_merged(reader: _Reader, node: yaml.Node) -> Pairs:
    """Return what ``<<: *a`` or ``<<: [*a, *b]`` brings; of several, the first that has a key gives it."""
    merged: Pairs = {}
    for part in _list_merged(node):
        if not isinstance(part, yaml.MappingNode):
            raise _error(reader.name, part.start_mark.line, "'<<' takes a mapping, or a list of mappings")
        pairs = _find_pairs(reader, part)
        reader.merged += len(pairs) + 1
        _check_count(reader, reader.merged, node)
        merged = pairs | merged
    return merged


def _list_merged(node: yaml.Node) -> Iterator[yaml.Node]:
    yield from node.value if isinstance(node, yaml.SequenceNode) else [node]


def _the(form: Form) -> str:
    return f"the {form.called.partition(' ')[2]}"


def _error(name: str, line: int, words: str) -> RecipeError:
    return RecipeError(f"{name}:{line + 1}: {words}")
